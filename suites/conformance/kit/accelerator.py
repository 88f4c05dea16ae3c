"""An accelerator in name only: tensors on it have shape, dtype and a device index, and no data."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "shardproofdevice"


def pretend() -> dist.ProcessGroup:
    """From now on tensors may lie on `NAME:i`; gives a group of all ranks that serves them.

    torch finds one device of the kind on each rank. The kind stays known to this process: for
    checks in a world of their own.
    """
    _setup_privateuseone_for_python_backend(NAME)
    group = dist.new_group(backend=f"{NAME}:gloo")
    assert group is not None
    return group


def empty(*shape: int, index: int) -> torch.Tensor:
    """A tensor on device `NAME:index`."""
    with FakeTensorMode():
        return torch.empty(shape, device=f"{NAME}:{index}")
