"""Meshes that list their ranks out of order: state dicts lie as torch's full_tensor() reads them.

torch sorts the ranks of a mesh's groups, and all that it moves goes by the number in the group:
what `fully_shard` cuts, what a collective of a forward puts together. Only a rank's coordinate goes
by the mesh. `part` says the same of the groups that there are.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.groups import UNSORTED, group
from conformance.kit.landing import assert_landed, target
from conformance.kit.layouts import SS, R, S, dtensor, number_in_groups, placement_id, read_whole

Case = tuple[str, DeviceMesh, list[Any]]

# Grids by whose groups some ranks hold the same shards of both dimensions, and some shards nobody
# holds, are not here: of these torch's ranks read different tensors.
EACH_SIZE = pytest.mark.parametrize("size", [(12, 8), (7, 5)], ids=["even", "uneven"])

_GRIDS = ([3, 1, 2, 0], [2, 3, 0, 1], [1, 0, 3, 2])


def _cases(mesh: Any) -> Iterator[Case]:
    """(name, mesh, placements) where torch reads back what it has distributed."""
    for dim in (0, 1):
        yield "a line", mesh(4, ranks=[3, 1, 0, 2]), [S(dim)]
    for ranks in _GRIDS:
        over = mesh(2, 2, ranks=ranks)
        layouts: list[list[Any]] = [
            [S(0), R],
            [R, S(0)],
            [S(0), S(0)],
            [S(1), S(0)],
            [SS(0, 2), S(0)],
        ]
        for placements in layouts:
            yield f"grid {ranks}", over, placements
    for shape in (1, 4), (4, 1):
        for placements in ([R, S(0)], [S(1), S(0)], [S(0), S(1)], [S(0), S(0)]):
            yield f"a grid of {shape}", mesh(*shape, ranks=[3, 1, 2, 0]), placements
    yield "a grid with one row turned", mesh(2, 2, ranks=[0, 1, 3, 2]), [S(0), S(1)]
    yield "a grid that is sharded along one dimension", mesh(2, 2, ranks=[0, 3, 2, 1]), [R, S(0)]
    yield "a line of a grid", mesh(2, 2, ranks=[3, 1, 2, 0])["tp"], [S(0)]


def _kept(mesh: Any, rank: int) -> Iterator[Case]:
    """Meshes whose groups keep the mesh's order: those of the user, and where torch can its own."""
    kind = mesh(4).device_type
    yield "a line", DeviceMesh.from_group(group(3, 1, 0, 2), kind), [S(0)]
    table = [[1, 0], [3, 2]]
    columns, lines = [group(1, 3), group(0, 2)], [group(1, 0), group(3, 2)]
    mine = [columns[0 if rank in (1, 3) else 1], lines[rank // 2]]
    grid = DeviceMesh.from_group(mine, kind, mesh=table, mesh_dim_names=("rows", "columns"))
    yield "a grid", grid, [S(0), S(1)]
    if "preserve_rank_order" in inspect.signature(DeviceMesh.__init__).parameters:
        for ranks in ([[3, 1], [0, 2]], [[0, 1], [3, 2]]):
            own = DeviceMesh(kind, ranks, preserve_rank_order=True)  # type: ignore[call-arg]
            yield f"torch's own {ranks}", own, [S(0), S(1)]


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherUnsortedMeshes:
    @pytest.mark.law("group")
    @pytest.mark.world(4)
    def test_what_torch_distributes(self, judged: Any, mesh: Any) -> None:
        """What distribute_tensor() has distributed is gathered as it was, as by full_tensor()."""
        full = numbers(12, 8)  # even: distribute_tensor() itself loses rows of uneven shards there
        some: Case = ("some ranks", mesh(3, ranks=[3, 0, 2]), [S(0)])
        for name, over, placements in (*_cases(mesh), some):
            if over.get_coordinate() is None:
                continue
            what = f"{name}, {placement_id(placements)}"
            leaf = distribute_tensor(full, over, placements)
            assert_same(leaf.to_local(), dtensor(full, over, placements).to_local(), what)
            assert_same(judged({"w": leaf})["w"], full, what)

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("ndim", [1, 2], ids=["lines", "grids"])
    @pytest.mark.thorough(but=["lines"])
    def test_uneven_shards(self, judged: Any, mesh: Any, ndim: int) -> None:
        """Uneven shards come to where the numbers of their ranks say."""
        for name, over, placements in _cases(mesh):
            if over.ndim == ndim:
                what, full = f"{name}, {placement_id(placements)}", numbers(7, 5)
                assert_same(judged({"w": dtensor(full, over, placements)})["w"], full, what)

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    def test_sums_of_shards(self, judged: Any, mesh: Any, rank: int) -> None:
        """Where sums are pending those shards are summed that full_tensor() sums."""
        for ranks in (*_GRIDS, [0, 1, 3, 2]):
            over = mesh(2, 2, ranks=ranks)
            for placements in ([Partial(), S(0)], [S(0), Partial()]):
                shard = [R if p.is_partial() else p for p in placements]
                leaf = dtensor(numbers(6, 3, salt=rank), over, shard)
                leaf = dtensor(numbers(6, 3), over, placements, local=leaf.to_local())
                assert_same(judged({"w": leaf})["w"], read_whole(leaf), f"{ranks} {placements}")

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    @UNSORTED
    def test_groups_in_the_order_of_the_mesh(self, judged: Any, mesh: Any, rank: int) -> None:
        """Where the groups keep the mesh's order each shard comes to its coordinate's place."""
        for name, over, placements in _kept(mesh, rank):
            assert number_in_groups(over) == list(over.get_coordinate() or ()), name
            full = numbers(7, 5)
            assert_same(judged({"w": dtensor(full, over, placements)})["w"], full, name)


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastUnsortedMeshes:
    @pytest.mark.law("group")
    @pytest.mark.world(4)
    @EACH_SIZE
    def test_where_full_tensor_reads(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, size: tuple[int, int]
    ) -> None:
        """Each rank gets the part that full_tensor() reads there."""
        cases = {f"{name}, {placement_id(p)}": (over, p) for name, over, p in _cases(mesh)}
        full = {key: numbers(*size, salt=n) for n, key in enumerate(cases)}
        mine = {key: target(full[key], over, p) for key, (over, p) in cases.items()}
        judged(full if rank == 0 else {}, mine, device)
        for key, (over, placements) in cases.items():
            assert_landed(mine[key], full[key], over, placements, key)

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    @UNSORTED
    def test_groups_in_the_order_of_the_mesh(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """Where the groups keep the mesh's order each rank gets its coordinate's part."""
        cases = {name: (over, placements) for name, over, placements in _kept(mesh, rank)}
        full = {key: numbers(7, 5, salt=n) for n, key in enumerate(cases)}
        mine = {key: target(full[key], over, p) for key, (over, p) in cases.items()}
        judged(full if rank == 0 else {}, mine, device)
        for key, (over, placements) in cases.items():
            assert_landed(mine[key], full[key], over, placements, key)

    @pytest.mark.law("group")
    @pytest.mark.should("full_tensor() reads another tensor on each of these ranks anyhow")
    @pytest.mark.world(4)
    def test_a_grid_whose_groups_are_at_odds(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """On a grid by whose groups no rank would hold some shard, all of a tensor must land."""
        full = numbers(4, 4)
        over = mesh(2, 2, ranks=[3, 1, 0, 2])
        mine = {"w": target(full, over, [S(0), S(1)])}
        judged({"w": full} if rank == 0 else {}, mine, device)
        expected = dtensor(full, over, [S(0), S(1)], at=over.get_coordinate()).to_local()
        assert_same(mine["w"].to_local(), expected)


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeUnsortedMeshes:
    @pytest.mark.law("group")
    @pytest.mark.world(4)
    @EACH_SIZE
    @pytest.mark.thorough(but=["even"])
    def test_where_full_tensor_reads(
        self, judged: Any, mesh: Any, device: torch.device, size: tuple[int, int]
    ) -> None:
        """Each rank keeps the part that full_tensor() reads there."""
        cases = {
            f"{name}, {placement_id(p)}": (over, p)
            for name, over, p in _cases(mesh)
            if not any(isinstance(one, _StridedShard) for one in p)  # torch refuses uneven ones
        }
        full = {key: numbers(*size, salt=n) for n, key in enumerate(cases)}
        mine = {key: target(full[key], over, p) for key, (over, p) in cases.items()}
        judged(full, mine, device)
        for key, (over, placements) in cases.items():
            assert_landed(mine[key], full[key], over, placements, key)
