"""Results that can be trained and written, made under ``torch.inference_mode()``.

What is made there can never be saved for a backward, nor be written outside of it. A checkpoint
that is taken during an evaluation, or loaded, is to be used afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from shardproof._core.tensors.properties import local_parts

P = ParamSpec("P")
T = TypeVar("T")


def outside_inference_mode(function: Callable[P, T]) -> Callable[P, T]:
    """The function, out of inference mode and without autograd where it is called under it.

    Where an argument, or a value of one that is a dict, was made under it, nothing is left: only
    there such a tensor can be written.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        if any(map(_holds_inference, (*args, *kwargs.values()))):
            return function(*args, **kwargs)
        with torch.inference_mode(mode=False), torch.no_grad():
            return function(*args, **kwargs)

    return call


def _holds_inference(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_inference, value.values()))
    parts = local_parts(value) if isinstance(value, torch.Tensor) else []
    return any(part.is_inference() for part in parts)
