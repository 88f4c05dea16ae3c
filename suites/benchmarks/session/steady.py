"""What makes two runs of a measurement the same: the C library's memory, kept as it is.

By default glibc learns from what a process frees whether to map large memory anew each time, and
gives the end of its heap back: so a copy of 30 MiB pays for page faults in one run and not in the
next, three times its own time. Here memory below the largest threshold that glibc takes stays with
the rank, for all arms alike; larger memory is mapped anew for each call, for all arms alike, too.
"""

from __future__ import annotations

import ctypes

import torch

# From malloc.h and mallopt(3), and from madvise(2).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
_NEVER = (1 << 31) - 1
_MADV_HUGEPAGE, _PAGE = 14, 4096
_LIBC = ctypes.CDLL(None)


def keep_memory() -> None:
    """From now on freed memory stays with this process; where the C library is not glibc nothing.

    Raises:
        RuntimeError: glibc refused a setting.

    """
    if not hasattr(_LIBC, "mallopt"):
        return
    for name, value in ((_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), (_TRIM_THRESHOLD, _NEVER)):
        if not _LIBC.mallopt(name, value):
            raise RuntimeError(f"mallopt refused {name}={value}")


def new_bytes(count: int, device: torch.device | None = None) -> torch.Tensor:
    """Uninitialised bytes for a floor: on the CPU in the kernel's large pages, where it has any.

    The least that new memory costs: a page fault for each 4 KiB of it takes longer than to fill it.
    """
    fresh = torch.empty(count, dtype=torch.uint8, device=device)
    if fresh.device.type == "cpu" and count > 2 * _PAGE:
        first = -(-fresh.data_ptr() // _PAGE) * _PAGE
        whole = (fresh.data_ptr() + count - first) // _PAGE * _PAGE
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(whole), _MADV_HUGEPAGE)
    return fresh
