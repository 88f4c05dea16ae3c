"""What makes two runs of a measurement the same: the C library's memory, kept as it is.

By default glibc learns from what a process frees whether to map large memory anew each time, and
gives the end of its heap back: so a copy of 30 MiB pays for page faults in one run and not in the
next, three times its own time. Here memory below the largest threshold that glibc takes stays with
the rank, for all arms alike; larger memory is mapped anew for each call, for all arms alike, too.
"""

from __future__ import annotations

import ctypes

# From malloc.h and mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
_NEVER = (1 << 31) - 1


def keep_memory() -> None:
    """From now on freed memory stays with this process; where the C library is not glibc nothing.

    Raises:
        RuntimeError: glibc refused a setting.

    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    for name, value in ((_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), (_TRIM_THRESHOLD, _NEVER)):
        if not libc.mallopt(name, value):
            raise RuntimeError(f"mallopt refused {name}={value}")
