"""DTensors with a kind of Partial of its own, as norms have: reduced as that kind does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial

from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.layouts import S, dtensor


def pending_norm(mesh: Any, *placements: Any, salt: int = 0) -> DTensor:
    """A norm that is still to be reduced over ranks."""
    full = numbers(4, 6, dtype=torch.float64, salt=salt)
    norm = torch.linalg.vector_norm(dtensor(full, mesh, list(placements)), dim=0)
    assert any(type(p) is not Partial and p.is_partial() for p in norm.placements), norm.placements
    return norm


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherPartialKinds:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_a_pending_norm_is_gathered(self, judged: Any, mesh: Any, rank: int) -> None:
        """A norm that is still to be reduced comes out as torch reduces it, sharded or not."""
        grid = mesh(2, 2)
        given = {
            "line": pending_norm(mesh(4), S(0)),
            "grid": pending_norm(grid, S(0), S(0), salt=1),
            "sharded": pending_norm(grid, S(0), S(1), salt=2),
            "rows": dtensor(numbers(7, 3), grid, [S(0), S(0)]),
        }
        whole = {name: value.full_tensor() for name, value in given.items()}
        for options in ({}, {"cpu_offload": True}, {"ranks_only": (2,)}):
            got = judged(given, **options)
            assert set(got) == (set(given) if "ranks_only" not in options or rank == 2 else set())
            for name in got:
                assert_same(got[name], whole[name], f"{name} {options}")


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestCopyPartialKinds:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_a_pending_norm_is_copied(self, judged: Any, mesh: Any) -> None:
        """A norm that is still to be reduced takes another one's parts."""
        source, target = (pending_norm(mesh(2), S(0), salt=salt) for salt in (1, 2))
        judged({"norm": source}, {"norm": target})
        assert_same(target.to_local(), source.to_local())
