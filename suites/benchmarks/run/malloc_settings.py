"""What makes two runs of a measurement the same: the C library's memory, kept as it is.

By default glibc learns from what a process frees whether to map large memory anew each time, and
gives the end of its heap back: so a copy of 30 MiB pays for page faults in one run and not in the
next, three times its own time. Here all memory stays with the rank, for all arms alike; only where
single tensors are so large that glibc maps them anew whatever it has learned, it still does.
"""

from __future__ import annotations

import ctypes

# From malloc.h and mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_LARGEST_MMAP_THRESHOLD = 32 << 20
_NEVER = (1 << 31) - 1


def keep_memory(largest: int) -> None:
    """From now on freed memory stays with this process; where the C library is not glibc nothing.

    A floor moves in one piece what the tensors of a model are in many. Were that piece mapped anew
    for each call, the floor alone would pay for page faults; worse, only in worlds whose heap has
    no free piece of that size: 58 ms in one, 8 in the next. So below the largest threshold that
    glibc takes nothing is mapped at all.

    Args:
        largest: bytes of the largest tensor that is measured.

    Raises:
        RuntimeError: glibc refused a setting.

    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    settings = [(_TRIM_THRESHOLD, _NEVER), (_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)]
    if largest < _LARGEST_MMAP_THRESHOLD:
        settings.append((_MMAP_MAX, 0))
    for name, value in settings:
        if not libc.mallopt(name, value):
            raise RuntimeError(f"mallopt refused {name}={value}")
