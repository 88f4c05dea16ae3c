"""Tensors so large that an implementation may send each by itself: where their values land.

Small tensors are packed with others; large ones may take a way of their own, which the small
tensors of the other checks never see. Each is a few MiB, and no two of its elements are equal.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conformance.kit.compare import assert_same, local
from conformance.kit.data import VIEWS
from conformance.kit.landing import assert_landed, blank, target
from conformance.kit.layouts import (
    ONE_D,
    TWO_D,
    R,
    S,
    dtensor,
    part,
    placement_id,
    rows,
    sharded_tensor,
)

SHAPES = [(1024, 640), (1, 1024, 640), (1023, 641)]
"""Even, with rows inside a dimension of size one, and uneven."""

DEEP = (3, 3000, 1001)
"""Slices of 11 MiB, of which a bucket takes a piece that ends in the middle of a row."""

EACH_DEPTH = pytest.mark.parametrize("all_placements", [ONE_D, TWO_D], ids=["1-D", "2-D"])

EACH_MESH = pytest.mark.parametrize("ranks", [[0, 1, 2, 3], [3, 1, 2, 0]], ids=["sorted", "turned"])

EACH_RUN = pytest.mark.thorough(but=["sorted-1-D", "turned-2-D"])


LYING = {**VIEWS, "negated": torch._neg_view, "conjugated": torch.conj}
"""Name -> another layout, or other values that the same memory means: negative, conjugate ones."""


def distinct(*shape: int, salt: int = 0) -> torch.Tensor:
    """A tensor whose elements all differ, exact in float32."""
    count = torch.Size(shape).numel()
    return torch.arange(salt, salt + count, dtype=torch.float32).view(shape)


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherLargeTensors:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @EACH_DEPTH
    @EACH_MESH
    @EACH_RUN
    @pytest.mark.thorough(but=["turned-2-D"])
    def test_any_placement(
        self, judged: Any, mesh: Any, ranks: list[int], all_placements: Any
    ) -> None:
        """Large shards come to where full_tensor() reads them, on unsorted meshes, too."""
        over = mesh(*(4,) if all_placements is ONE_D else (2, 2), ranks=ranks)
        cases = {
            f"{placement_id(p)} {shape}": (p, shape) for p in all_placements for shape in SHAPES
        }
        fulls = {k: distinct(*shape, salt=n) for n, (k, (_, shape)) in enumerate(cases.items())}
        got = judged({key: dtensor(full, over, cases[key][0]) for key, full in fulls.items()})
        for key, full in fulls.items():
            assert_same(got[key], full, key)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_several_threads(self, judged: Any, mesh: Any) -> None:
        """A process whose operations run on several threads must get the same values."""
        torch.set_num_threads(2)
        full = distinct(1024, 640)
        value = {
            "rows": dtensor(full, mesh(2), [S(0)]),
            "plain": full,
            "r": dtensor(full, mesh(2), [R]),
        }
        for key, whole in judged(value).items():
            assert_same(whole, full, key)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("view", LYING)
    @pytest.mark.thorough(but=["negated"])
    def test_a_rank_whose_part_is_laid_out_otherwise(
        self, judged: Any, mesh: Any, view: str
    ) -> None:
        """A part that lies otherwise on one rank alone must be gathered right, and nobody hangs."""
        line = mesh(2)
        full = distinct(1024, 640)
        if view == "conjugated":
            full = torch.complex(full, full + 1)
        mine = part(full, line, [S(0)]).clone()
        if line.get_coordinate()[0] == 1:
            mine = LYING[view](mine)
        other = LYING[view](part(full, line, [S(0)], [1]).clone())
        got = judged({"w": dtensor(full, line, [S(0)], local=mine)})
        assert_same(got["w"], torch.cat([part(full, line, [S(0)], [0]), other]))


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastLargeTensors:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @EACH_DEPTH
    @EACH_MESH
    @EACH_RUN
    @pytest.mark.thorough(but=["turned-2-D"])
    def test_any_placement(
        self,
        judged: Any,
        mesh: Any,
        rank: int,
        device: torch.device,
        ranks: list[int],
        all_placements: Any,
    ) -> None:
        """Each rank gets the part that full_tensor() reads there, on unsorted meshes, too."""
        over = mesh(*(4,) if all_placements is ONE_D else (2, 2), ranks=ranks)
        cases = {
            f"{placement_id(p)} {shape}": (p, shape) for p in all_placements for shape in SHAPES
        }
        full = {
            key: distinct(*shape, salt=n).to(device)
            for n, (key, (_, shape)) in enumerate(cases.items())
        }
        mine = {key: target(tensor, over, cases[key][0]) for key, tensor in full.items()}
        judged(full if rank == 0 else {}, mine, device)
        for key, tensor in full.items():
            assert_landed(mine[key], tensor, over, cases[key][0], key)

    @pytest.mark.law("values")
    @pytest.mark.world(2, limit=60)
    @pytest.mark.thorough
    def test_rows_larger_than_any_bucket(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """A row of 80 MiB, larger than any bucket, must arrive: pieces begin within each row."""
        count = 80 << 20
        full = torch.arange(2 * count, dtype=torch.int32).remainder_(251).to(torch.uint8)
        full = full.view(2, 1, count).to(device)
        for placements in [R], [S(2)]:
            mine = {"w": dtensor(torch.zeros_like(full), mesh(2), placements)}
            judged({"w": full} if rank == 0 else {}, mine, device)
            assert torch.equal(local(mine["w"]), part(full, mesh(2), placements))

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("dim", [0, 1])
    @pytest.mark.thorough(but=["0"])
    def test_slices_larger_than_a_bucket(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, dim: int
    ) -> None:
        """Where pieces end in the middle of a row each element must land, in uneven parts, too."""
        full, line = distinct(*DEEP).to(device), mesh(2)
        mine = {"w": dtensor(torch.zeros_like(full), line, [S(dim)]), "small": blank(full[0, 0])}
        judged({} if rank else {"w": full, "small": full[0, 0]}, mine, device)
        assert_same(local(mine["w"]), part(full, line, [S(dim)]))
        assert_same(mine["small"], full[0, 0])

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("kinds", ["SS", "SR", "RS", "SP", "PS", "PR"])
    @pytest.mark.thorough(but=["SP"])
    def test_ranks_with_other_targets(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, kinds: str
    ) -> None:
        """Sharded targets on two ranks, replicated or plain on others, must all take the values."""
        lines = [mesh(2, ranks=[0, 1]), mesh(2, ranks=[2, 3])]
        line, kind = lines[rank // 2], kinds[rank // 2]
        full = distinct(1024, 640).to(device)
        placements = [S(0)] if kind == "S" else [R]
        mine: dict[str, Any] = {"w": blank(full) if kind == "P" else target(full, line, placements)}
        judged({"w": full} if rank == 0 else {}, mine, device)
        if kind == "P":
            assert_same(mine["w"], full, "plain")
        else:
            assert_landed(mine["w"], full, line, placements, placement_id(placements))


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherDeepTensors:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("takers", [(), (0,), (1,)], ids=str)
    @pytest.mark.thorough(but=["(0,)"])
    def test_slices_larger_than_a_bucket(
        self, judged: Any, mesh: Any, rank: int, takers: tuple[int, ...]
    ) -> None:
        """Where pieces end in the middle of a row each element must arrive, whoever takes them."""
        full = distinct(*DEEP)
        got = judged({"w": dtensor(full, mesh(2), [S(0)])}, ranks_only=takers)
        if rank in takers or not takers:
            assert_same(got["w"], full)
        else:
            assert got == {}


@pytest.mark.judges("_state_dict_utils._all_gather_sharded_tensor")
class TestAllGatherDeepShards:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_slices_larger_than_a_bucket(self, judged: Any, device: torch.device) -> None:
        """Where pieces end in the middle of a row each element must arrive, from uneven shards."""
        full = distinct(*DEEP).to(device)
        assert_same(judged(sharded_tensor(full, rows(DEEP, (2, 1)))), full)
