"""Every bit pattern that a dtype has, in every kind of leaf, through each function."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conformance.kit.data import DTYPES
from conformance.kit.functions import Function, Place, each
from conformance.kit.patterns import patterns, uneven

# What Gloo moves, and torch computes with.
USUAL = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
]
# A kind whose numbers are added to others, and kinds that take collectives of torch's own.
_COMPUTED = {"pending"}
_WITH_TORCH = {"unfinished", "unfinished rows", "rows of wrappers"}

_copies = each(lambda function: function.values and not function.same_objects)


@pytest.mark.law("values")
@pytest.mark.world(2)
@pytest.mark.parametrize("kinds", ["usual", "unusual"])
@pytest.mark.parametrize("dtypes", ["usual", "rare"])
@_copies
def test_every_bit(
    function: Function,
    mesh: Any,
    world: Any,
    subject: Any,
    device: torch.device,
    dtypes: str,
    kinds: str,
) -> None:
    """Each bit pattern of each dtype must arrive as it left, in each kind of leaf."""
    place = Place(world, mesh(2), subject, device)
    names = function.kinds(usual=kinds == "usual").keys() - _COMPUTED
    chosen = USUAL if dtypes == "usual" else [dtype for dtype in DTYPES if dtype not in USUAL]
    leaves = {
        f"{name} of {dtype}": (name, uneven(patterns(dtype)).to(device))
        for dtype in chosen
        for name in sorted(names)
        if name not in _WITH_TORCH or dtype in USUAL
    }
    call = function.call(place, leaves)
    call.check(call.run())
