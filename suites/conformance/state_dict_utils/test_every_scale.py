"""More tensors, and larger ones, than any batch or buffer takes, through each function."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conformance.kit.functions import Function, Place, each
from conformance.kit.scales import LARGE, MANY

_copies = each(lambda function: function.values and not function.same_objects)


@pytest.mark.law("values")
@pytest.mark.world(2)
@pytest.mark.parametrize("scales", ["many", "large"])
@_copies
def test_each_tensor(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device, scales: str
) -> None:
    """Each tensor must arrive, however many there are, and of whatever size in bytes."""
    place, known = Place(world, mesh(2), subject, device), function.kinds()
    for name, make in (MANY if scales == "many" else LARGE).items():
        leaves = {
            key: (kind if kind in known else next(iter(known)), full.to(device))
            for key, (kind, full) in make().items()
        }
        if "rows" not in known:
            # One call a tensor: what many of them share is nothing here.
            leaves = dict(list(leaves.items())[:40])
        call = function.call(place, leaves)
        try:
            call.check(call.run())
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
