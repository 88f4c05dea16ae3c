"""A subject that warns wherever it can, in every way that there is, and is the reference else."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

import shardproof
from shardproof import installed
from shardproof._state_dict_utils import __name__ as _state_dict_utils
from shardproof.tensor.parallel import _data_parallel_utils, ddp, fsdp

__all__ = ["__version__", "installed"]
__version__ = shardproof.__version__

warnings.warn("loud will go: import something else", DeprecationWarning, stacklevel=1)


class LoudWarning(UserWarning):
    """A kind of its own."""


def _deprecated_torch() -> None:
    torch.tensor([1]).storage()  # TypedStorage is deprecated: a UserWarning, from within torch


def _in_a_thread() -> None:
    thread = threading.Thread(target=lambda: warnings.warn("from a thread", stacklevel=1))
    thread.start()
    thread.join()


def _with_filters_of_its_own() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("despite filters", FutureWarning, stacklevel=1)


def _as_an_error_that_it_handles() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with contextlib.suppress(UserWarning):
            warnings.warn("a detour", stacklevel=1)
    warnings.warn("took a detour", LoudWarning, stacklevel=1)


_WAYS: tuple[Callable[[], Any], ...] = (
    lambda: warnings.warn("will go", DeprecationWarning, stacklevel=1),
    lambda: warnings.warn("will change", FutureWarning, stacklevel=2),
    lambda: warnings.warn("is slow", UserWarning, stacklevel=3),
    _deprecated_torch,
    _in_a_thread,
    _with_filters_of_its_own,
    _as_an_error_that_it_handles,
)


def _loud(function: Any, way: Callable[[], Any]) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            way()
        return function(*args, **kwargs)

    return call


def _module(source: types.ModuleType, name: str) -> None:
    made = types.ModuleType(f"{__name__}.{name}")
    ways = itertools.cycle(_WAYS)
    for key, value in vars(source).items():
        if not key.startswith("__"):
            plain = isinstance(value, types.FunctionType)
            setattr(made, key, _loud(value, next(ways)) if plain else value)
    sys.modules[made.__name__] = made


_module(sys.modules[_state_dict_utils], "_state_dict_utils")
_module(_data_parallel_utils, "tensor.parallel._data_parallel_utils")
_module(ddp, "tensor.parallel.ddp")
_module(fsdp, "tensor.parallel.fsdp")
