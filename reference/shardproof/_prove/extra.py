"""Extra states of modules (get_extra_state), and other values, as text; changes before a load."""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shardproof._prove.digests import digest
from shardproof._prove.leaves import leaves_of
from shardproof._prove.reach import attributes_of

_LONG = 120


def told(module: nn.Module) -> str:
    """The extra state as text: equal where the states are; what raises is a text, too."""
    try:
        return text_of_state(module.get_extra_state())
    except Exception as error:
        return f"raises {type(error).__name__}: {error}"


def text_of_state(value: Any) -> str:
    """Short text of any state; long ones end in a digest of the rest."""
    text = _text(value, 8)
    if len(text) <= _LONG:
        return text
    return f"{text[:_LONG]}... ({hashlib.sha256(text.encode()).hexdigest()[:12]})"


def spoil(module: nn.Module) -> str:
    """Change numbers and tensors of the extra state; why not, where it cannot be changed."""
    try:
        before = module.get_extra_state()
        said = text_of_state(before)
        other = _other(copy.deepcopy(before))
        if text_of_state(other) == said:
            return "it has no numbers and tensors that prove could change"
        kept = copy.deepcopy(before)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    try:
        module.set_extra_state(other)
        if told(module) == said:
            return "set_extra_state() changes nothing"
    except Exception as error:
        module.set_extra_state(kept)
        return f"{type(error).__name__}: {error}"
    return ""


def _text(value: Any, deep: int) -> str:
    if isinstance(value, torch.Tensor):
        parts = [
            f"{tuple(leaf.tensor.shape)} {leaf.tensor.dtype} {digest(leaf.tensor):016x}"
            for leaf in leaves_of(value, -1)
        ]
        return f"tensor({'; '.join(parts)})"
    if isinstance(value, io.BytesIO):
        value = value.getvalue()
    if isinstance(value, bytes | bytearray):
        return f"bytes({len(value)}, {hashlib.sha256(value).hexdigest()[:12]})"
    if not deep:
        return "..."
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {_text(v, deep - 1)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_text(one, deep - 1) for one in value) + "]"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(_text(one, deep - 1) for one in value)) + "}"
    if hasattr(value, "tobytes"):  # numpy
        return f"{getattr(value, 'dtype', '')}({_text(value.tobytes(), 1)})"
    if " at 0x" not in (text := repr(value)):
        return text
    if (name := getattr(value, "__qualname__", None)) is not None:
        return f"{type(value).__name__} {name}"
    return f"{type(value).__name__}{_text(attributes_of(value), deep - 1)}"


def _other(value: Any) -> Any:
    """The same with other numbers and bits; not other flags and names, which code may look at."""
    if isinstance(value, torch.Tensor):
        for leaf in leaves_of(value, -1):
            raw = leaf.tensor.view(torch.uint8) if leaf.tensor.is_contiguous() else None
            if raw is not None and raw.numel() and leaf.tensor.dtype is not torch.bool:
                raw.bitwise_not_()
        return value
    if isinstance(value, dict):
        for key, one in value.items():
            value[key] = _other(one)
    elif isinstance(value, list):
        value[:] = [_other(one) for one in value]
    elif type(value) is tuple:
        return tuple(_other(one) for one in value)
    elif type(value) in (int, float):
        return value + 1
    return value
