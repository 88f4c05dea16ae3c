"""Who gets the tensors of a model that lies on none of the ranks that `ranks_only` names."""

from __future__ import annotations

from typing import Any

import pytest

from conformance.kit.agree import exchange
from conformance.kit.data import numbers
from conformance.kit.layouts import R, S, dtensor
from conformance.kit.refusals import attempt


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherOtherTakers:
    @pytest.mark.law("cost")
    @pytest.mark.world(4, collective=8, limit=25)
    def test_no_more_than_one_rank_has_them(self, judged: Any, mesh: Any, world: Any) -> None:
        """A model on ranks 2 and 3 that is gathered for one rank must be whole on no more."""
        half = mesh(2, ranks=[2, 3])
        for placement in (S(0), R):
            value = {"w": dtensor(numbers(4, 4), half, [placement])} if world.rank >= 2 else {}
            got: list[Any] = []
            attempt(lambda: got.append(judged(value, ranks_only=(0,))))  # noqa: B023
            told = exchange(world, got not in ([], [{}]), f"outcome of {placement}")
            takers = [rank for rank, has in enumerate(told) if has]
            assert len(takers) <= 1, f"{placement}: on ranks {takers}"
