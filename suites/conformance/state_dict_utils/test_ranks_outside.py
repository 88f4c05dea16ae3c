"""Ranks that are no part of a group or of a mesh, and call all the same: nothing is made up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.two_tensor import TwoTensor

from conformance.kit.agree import assert_raises_everywhere
from conformance.kit.compare import assert_same, fingerprint, local
from conformance.kit.data import numbers
from conformance.kit.functions import COPIES, Function, each
from conformance.kit.groups import group
from conformance.kit.landing import assert_landed, target
from conformance.kit.layouts import R, S, dtensor, part, rows, sharded_tensor
from conformance.kit.refusals import MISSING, refused

FULL = (5, 4)


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherOutside:
    @pytest.mark.law("values")
    @pytest.mark.world(3)
    def test_shards_of_others(self, judged: Any, rank: int) -> None:
        """A rank outside the group of a ShardedTensor must be told so, not be given some memory."""
        group = dist.new_group([0, 1])
        full = numbers(*FULL)
        tensor = sharded_tensor(full, rows(FULL, [3, 2]))
        if rank == 2:
            refused(lambda: judged({"layer.w": tensor}, pg=group), "layer.w", kinds=MISSING)
        else:
            assert_same(judged({"layer.w": tensor}, pg=group)["layer.w"], full)

    @pytest.mark.law("group")
    @pytest.mark.world(3)
    @pytest.mark.parametrize("ranks", [[0, 1], [1, 2], [2, 0]], ids=str)
    def test_a_mesh_of_others(self, judged: Any, mesh: Any, ranks: list[int]) -> None:
        """A DTensor on a mesh that lacks this rank must come out as the nothing that is here."""
        line, full = mesh(2, ranks=ranks), numbers(*FULL)
        for placement in (S(0), R):
            got = judged({"w": dtensor(full, line, [placement]), "n": 1})
            if _inside(line):
                assert_same(got["w"], full, f"{placement}")
            else:
                assert not got["w"].numel(), f"{placement}: {got['w']} outside of the mesh"

    @pytest.mark.law("symmetry")
    @pytest.mark.world(4, collective=8, limit=30)
    def test_a_mesh_wider_than_the_group(self, judged: Any, mesh: Any, world: Any) -> None:
        """A leaf on more ranks than `pg` must come out whole, or be refused on all of these."""
        halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        mine, full = halves[world.rank // 2], numbers(8, 3)
        value = {"layer.w": dtensor(full, mesh(4), [S(0)])}
        assert_same(judged(value, pg=mine)["layer.w"], full)
        if world.rank == 3:
            value["layer.w"]._local_tensor = numbers(1, 3)
        assert_raises_everywhere(world, lambda: judged(value, pg=mine), "layer.w", kinds=MISSING)


@pytest.mark.judges("_state_dict_utils._all_gather_sharded_tensor")
class TestAllGatherOutside:
    @pytest.mark.law("values")
    @pytest.mark.world(3)
    def test_shards_of_others(self, judged: Any, rank: int) -> None:
        """A rank outside the group of a ShardedTensor must be told so, not be given some memory."""
        group = dist.new_group([0, 1])
        full = numbers(*FULL)
        tensor = sharded_tensor(full, rows(FULL, [3, 2]))
        if rank == 2:
            refused(lambda: judged(tensor, group))
        else:
            assert_same(judged(tensor, group), full)


# Name -> (full tensor, shape of the target, placements). torch's `from_local` makes no target
# without dimensions outside of a mesh: it takes the empty local tensor's shape.
CASES: dict[str, tuple[torch.Tensor, tuple[int, ...], list[Placement]]] = {
    "rows": (numbers(*FULL), FULL, [S(0)]),
    "0-dim": (numbers(salt=1), (), [R]),
    "one for 0-dim": (numbers(1, salt=2), (), [R]),
    "a wrapper": (numbers(*FULL, salt=3), FULL, [R]),
}


def _targets(mesh: DeviceMesh) -> dict[str, Any]:
    """Of each kind that decides by its part what it takes, on a mesh that may lack this rank."""
    made: dict[str, Any] = {}
    for key, (full, shape, placements) in CASES.items():
        whole = torch.zeros(shape)
        mine = part(whole, mesh, placements).clone() if _inside(mesh) else torch.empty(0)
        held = TwoTensor(mine, mine.clone()) if key == "a wrapper" else mine
        meta = TensorMeta(whole.shape, whole.stride(), full.dtype)
        spec = DTensorSpec(mesh, tuple(placements), tensor_meta=meta)
        made[key] = DTensor(held, spec, requires_grad=False)
    return made


def _inside(mesh: DeviceMesh) -> bool:
    return mesh.get_coordinate() is not None


def _assert_all_landed(got: dict[str, Any], mesh: DeviceMesh) -> None:
    for key, (full, shape, placements) in CASES.items():
        held: Any = local(got[key])
        if not _inside(mesh):
            assert not held.numel(), f"{key}: {held} outside of the mesh"
            continue
        for mine in (held.a, held.b) if key == "a wrapper" else (held,):
            assert_same(mine, part(full.view(shape), mesh, placements), key)


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastOutside:
    @pytest.mark.law("group")
    @pytest.mark.world(3)
    def test_a_group_without_this_rank(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """A rank outside the group must keep what it has, and neither wait nor be waited for."""
        group = dist.new_group([0, 1])
        full = {"w": numbers(*FULL, device=device)}
        mine = {"w": numbers(*FULL, salt=1, device=device), "extra": 1}
        before = fingerprint(mine)
        judged(full if rank == 0 else {}, mine, device, pg=group, strict=True)
        if rank == 2:
            assert fingerprint(mine) == before
        else:
            assert_same(mine["w"], full["w"])
            assert set(mine) == {"w"}

    @pytest.mark.law("values")
    @pytest.mark.world(3)
    @pytest.mark.parametrize("ranks", [[0, 1], [1, 2], [2]], ids=str)
    def test_targets_on_other_ranks(
        self, judged: Any, rank: int, device: torch.device, ranks: list[int]
    ) -> None:
        """A target on a mesh that lacks this rank must take nothing here, and its part there."""
        mesh = DeviceMesh(device.type, ranks)
        mine, full = _targets(mesh), {key: case[0] for key, case in CASES.items()}
        judged(full if rank == 0 else {}, mine, device)
        _assert_all_landed(mine, mesh)

    @pytest.mark.law("values")
    @pytest.mark.world(3)
    def test_a_group_smaller_than_the_mesh(
        self, judged: Any, rank: int, device: torch.device, mesh: Any
    ) -> None:
        """Ranks of a group must get their parts of targets on more ranks, uneven ones, too."""
        group = dist.new_group([0, 1])
        line = mesh(3)
        full = {str(n): numbers(n, 3, salt=n) for n in (5, 4, 7, 6)}
        mine: dict[str, Any] = {key: target(value, line, [S(0)]) for key, value in full.items()}
        if rank == 2:
            return
        judged(full if rank == 0 else {}, mine, device, pg=group)
        for key, value in full.items():
            assert_landed(mine[key], value, line, [S(0)], key)


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeOutside:
    @pytest.mark.law("values")
    @pytest.mark.world(3)
    @pytest.mark.parametrize("ranks", [[0, 1], [1, 2]], ids=str)
    def test_targets_on_other_ranks(
        self, judged: Any, device: torch.device, ranks: list[int]
    ) -> None:
        """A target on a mesh that lacks this rank must take nothing here, and its part there."""
        mesh = DeviceMesh(device.type, ranks)
        mine, full = _targets(mesh), {key: case[0] for key, case in CASES.items()}
        judged(full | {"a wrapper": TwoTensor(*[full["a wrapper"]] * 2)}, mine, device)
        _assert_all_landed(mine, mesh)


@pytest.mark.law("group")
@pytest.mark.world(3, collective=8, limit=30)
@each(lambda function: function.name in COPIES)
def test_copies_of_shards_belong_to_their_group(
    function: Function, subject: Any, rank: int
) -> None:
    """The copy of a ShardedTensor must be gathered by the ranks of the original, and no others."""
    members = group(1, 2)
    if rank == 0:
        return
    judged = subject.function(f"_state_dict_utils.{function.name}")
    gather = subject.function("_state_dict_utils._gather_state_dict")
    gather_one = subject.function("_state_dict_utils._all_gather_sharded_tensor")
    full = numbers(*FULL)
    made = [sharded_tensor(full, rows(FULL, [3, 2]), members) for _ in range(2)]
    value = {"w": made[0], "deep": [made[1]]}
    got = COPIES[function.name](judged, value)
    if not function.values:  # buffers, which are filled as a checkpoint fills them
        subject.function("_state_dict_utils._copy_state_dict")(value, got)
    for name, copy in (("w", got["w"]), ("deep", got["deep"][0])):
        assert copy._process_group is members, f"{name}: another group than the original's"
    assert_same(gather_one(got["w"], members), full, "w")
    assert_same(gather(got, pg=members)["deep"][0], full, "deep")
