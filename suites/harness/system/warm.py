"""The warm parent: everything that ranks would import is imported once, before the first fork.

A fork copies one thread only, and a CUDA context not at all; so the parent has one thread and no
context, and this is asserted before every start. Importing torch again on each rank costs seconds
a check; a fork from here costs tens of milliseconds.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import os
import threading
from pathlib import Path

from harness.system import processes

MODULES = (
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed._shard.sharded_tensor",
    "torch.distributed.tensor.debug",
    "torch.distributed._composable.replicate",
    "torch.testing",
    "torch._dynamo",  # imported lazily by DTensor and FSDP
    "torch.fx.experimental.symbolic_shapes",
    "sympy",
    "numpy.random",
)

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def limit_threads() -> None:
    """Keep numeric libraries from starting threads; must come before they are imported."""
    for name in THREAD_VARIABLES:
        os.environ[name] = "1"


def warm_up(*, everything: bool = True) -> None:
    """Import what ranks will need, and become_rank the heap so that forks share its pages."""
    import torch

    for name in MODULES if everything else ():
        importlib.import_module(name)
    torch.set_num_threads(1)
    # A fork tears torch's thread pool, and whoever asks for it first in the child makes another,
    # without a lock: autograd's threads, one for each device, all ask at once, and a rank dies in
    # "Invalid thread pool!" (https://github.com/pytorch/pytorch/issues/178535). Here one asks.
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))
    torch.manual_seed(0)  # what it imports on its first call
    gc.collect()
    gc.freeze()
    use_large_pages()


_MADV_COLLAPSE = 25
_LARGE_PAGE = 2 << 20


def use_large_pages() -> None:
    """Have the kernel put this process's heap into large pages, which a fork shares as one entry.

    A fork copies an entry for each page of the heap and drops it again when the child ends: half of
    what a rank costs that does little. A kernel before 6.1 refuses, and so does one without room.
    """
    madvise = ctypes.CDLL(None).madvise
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, mode, *_, inode = line.split()[:5]
        if mode != "rw-p" or inode != "0":
            continue
        begin, end = (int(address, 16) for address in span.split("-"))
        for address in range(-(-begin // _LARGE_PAGE) * _LARGE_PAGE, end, _LARGE_PAGE):
            if address + _LARGE_PAGE <= end:
                madvise(ctypes.c_void_p(address), ctypes.c_size_t(_LARGE_PAGE), _MADV_COLLAPSE)


def unfit() -> str:
    """Why ranks cannot be forked from this process now, or an empty text."""
    import torch

    if (count := processes.thread_count()) != 1:
        names = ", ".join(t.name for t in threading.enumerate())
        return (
            f"the parent has {count} threads (Python's own: {names}), and a fork copies only one: "
            "find who started them (asking NVIDIA's driver starts one: ask on a rank, or through "
            "harness.system.devices), or use --start-method spawn"
        )
    if torch.cuda.is_initialized():
        return "the parent holds a CUDA context, which no fork survives: use --start-method spawn"
    return ""
