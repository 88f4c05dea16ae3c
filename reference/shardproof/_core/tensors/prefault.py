"""Page faults of new host memory, taken in one call before it is written in full.

The C library maps large memory anew for each tensor, and the kernel gives each of its pages at the
first write to it: on a virtual machine 64 MiB take 50 ms so, of which the bytes themselves take 8.
Asked for all pages at once it is 33 and 8, and a broadcast of whole tensors 0.7 of its time.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

LARGE = 1 << 20
"""Bytes from which on memory is worth a look."""
# From madvise(2); since Linux 5.14.
_POPULATE_WRITE = 23
_PAGE = mmap.PAGESIZE


def _kernel() -> ctypes.CDLL:
    """The C library with both calls."""
    found = ctypes.CDLL(None)
    found.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    found.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    return found


# They are Linux's.
_LIBC = _kernel() if sys.platform == "linux" else None


def prefault(tensor: torch.Tensor, *, alone: bool = False) -> torch.Tensor:
    """Map the memory of a dense tensor of LARGE bytes or more, whose contents do not matter yet.

    Returns the same tensor. Nothing happens where that would not help: on a device, where the
    memory is there already, and where several threads would share the writing, and so the pages;
    ``alone`` says that they will not, since a GPU's driver writes.
    """
    if (
        _LIBC is None
        or type(tensor) is not torch.Tensor
        or tensor.device.type != "cpu"
        or not (alone or torch.get_num_threads() == 1)
    ):
        return tensor
    begin = -(-tensor.data_ptr() // _PAGE) * _PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
    middle = (begin + end) // 2 // _PAGE * _PAGE
    state = ctypes.create_string_buffer(1)
    # Memory that a heap has kept: walking over its pages would cost a tenth of writing them.
    if end <= begin or _LIBC.mincore(middle, _PAGE, state) or state.raw[0] & 1:
        return tensor
    # Advice: an older kernel refuses it, and maps each page at the first write, as ever.
    _LIBC.madvise(begin, end - begin, _POPULATE_WRITE)
    return tensor
