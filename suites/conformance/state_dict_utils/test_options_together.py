"""Options, kinds of leaves and meshes that meet: what each does right alone, they do together.

A path of its own for one option is easily left out where another one is given, too.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from conformance.kit.agree import assert_raises_everywhere, exchange
from conformance.kit.compare import assert_same, local, shares_memory
from conformance.kit.data import numbers
from conformance.kit.layouts import R, S, dtensor, part, rows, sharded_tensor
from conformance.kit.nested import tensors
from conformance.kit.refusals import MISSING

_TAKERS: list[tuple[int, ...]] = [(), (0,), (1,), (1, 0)]


def _same(tensor: Any, *_: Any) -> Any:
    return tensor


def _tied(full: torch.Tensor, line: DeviceMesh) -> dict[str, Any]:
    """Two names for each kind of leaf, and plain tensors that overlap without being alike."""
    sharded = dtensor(full, line, [S(0)])
    columns = nn.Parameter(dtensor(full + 1, line, [S(1)]))
    table = sharded_tensor(full + 2, rows(full.shape, (2, 2)))
    plain = full + 3
    replica = dtensor(full + 4, line, [R])
    return {
        "rows": sharded,
        "columns": columns,
        "replica": replica,
        "table": table,
        "plain": plain,
        "again": {"rows": sharded, "columns": columns.detach(), "table": table, "replica": replica},
        "transposed": plain.t(),
        "slice": plain[1:],
    }


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherOptionsTogether:
    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("ranks", [(0, 1), (1, 0)], ids=["in-order", "turned"])
    def test_takers_and_cpu_offload(
        self, judged: Any, mesh: Any, rank: int, ranks: tuple[int, ...]
    ) -> None:
        """Whoever takes the result, on the CPU or not, must have all values, and all ties."""
        full, line = numbers(4, 4), mesh(2, ranks=ranks)
        for takers, cpu_offload in product(_TAKERS, (False, True)):
            got = judged(_tied(full, line), ranks_only=takers, cpu_offload=cpu_offload)
            what = f"ranks_only={takers}, cpu_offload={cpu_offload}"
            if takers and rank not in takers:
                assert got == {}, f"{what}: {got} where nothing was asked for"
                continue
            expected = {
                "rows": full,
                "columns": full + 1,
                "table": full + 2,
                "plain": full + 3,
                "replica": full + 4,
                "transposed": (full + 3).t(),
                "slice": (full + 3)[1:],
            }
            for name, whole in expected.items():
                assert_same(got[name].detach(), whole, f"{what}: {name}")
            for name, again in got["again"].items():
                assert_same(again.detach(), expected[name], f"{what}: {name} again")
                assert shares_memory(got[name], again), f"{what}: {name} came apart"
            for name in ("transposed", "slice"):
                storage = got[name].untyped_storage().data_ptr()
                together = storage == got["plain"].untyped_storage().data_ptr()
                assert together, f"{what}: {name} came apart from the tensor that it is a view of"

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=30)
    def test_one_rank_puts_it_on_meta(self, judged: Any, mesh: Any, world: Any) -> None:
        """A leaf without data on one rank must be heard of on all, whatever went well before."""
        line, full = mesh(2), numbers(4, 4)
        for at in (0, 1):
            value: dict[str, Any] = {n: dtensor(full, line, [S(0)]) for n in ("fine", "layer.odd")}
            for whole in judged(value).values():
                assert_same(whole, full)
            if world.rank == at:
                value["layer.odd"] = value["layer.odd"].to("meta")
            call = partial(judged, value)
            assert_raises_everywhere(world, call, "layer.odd", kinds=MISSING, name=f"at {at}")


@pytest.mark.judges("_state_dict_utils._create_cpu_state_dict")
class TestCreateOptionsTogether:
    @pytest.mark.law("structure")
    @pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
    @pytest.mark.world(2)
    def test_shared_and_tied(self, judged: Any, mesh: Any) -> None:
        """With `share_memory` the buffer of every leaf must be shared, also of those tied."""
        got = tensors(judged(_tied(numbers(4, 4), mesh(2)), share_memory=True))
        for path, tensor in got.items():
            shards = getattr(tensor, "local_shards", None)
            held = [shard.tensor for shard in shards()] if shards else [local(tensor)]
            assert all(each.is_shared() for each in held), f"{path} is not shared"


def _frozen_twins(line: DeviceMesh) -> dict[str, Any]:
    """A weight that trains, and a frozen Parameter over its memory; as DTensors and as plain."""
    found: dict[str, Any] = {}
    for name, placements in {"plain": None, "rows": [S(0)], "replica": [R]}.items():
        full = numbers(4, 4)
        weight = nn.Parameter(full if placements is None else dtensor(full, line, placements))
        frozen = nn.Parameter(weight.detach(), requires_grad=False)
        found[name] = {"first": weight, "second": frozen}
        found[f"{name}, turned"] = {"first": frozen, "second": weight}
    return found


def _assert_twins(got: dict[str, Any]) -> None:
    for name, pair in got.items():
        trained = [pair[key].requires_grad for key in ("first", "second")]
        expected = [False, True] if name.endswith("turned") else [True, False]
        assert trained == expected, f"{name}: requires_grad {trained}, expected {expected}"
        assert shares_memory(pair["first"], pair["second"]), f"{name} came apart"


@pytest.mark.judges("_state_dict_utils._offload_state_dict_to_cpu")
class TestOffloadOptionsTogether:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_a_frozen_twin(self, judged: Any, mesh: Any) -> None:
        """What trains and what is frozen over one memory must each stay so, and stay tied."""
        _assert_twins(judged(_frozen_twins(mesh(1))))

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_a_shard_of_a_flat_tensor(self, judged: Any) -> None:
        """A shard over a plain leaf's memory must lie over that leaf's snapshot, too."""
        got = judged(_over_a_flat_tensor())
        got["flat"].fill_(7)
        assert_same(got["table"].local_shards()[0].tensor, torch.full((2, 3), 7.0))


def _over_a_flat_tensor() -> dict[str, Any]:
    flat = numbers(8)
    table = sharded_tensor(numbers(2, 3), rows((2, 3), (2,)))
    table.local_shards()[0].tensor = flat[1:7].view(2, 3)
    return {"flat": flat, "table": table}


@pytest.mark.judges("_state_dict_utils._iterate_state_dict")
class TestIterateOptionsTogether:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_a_frozen_twin(self, judged: Any, mesh: Any) -> None:
        """What trains and what is frozen over one memory must each stay so, and stay tied."""
        _assert_twins(judged(_frozen_twins(mesh(1)), _same, _same, _same, cpu_offload=True))

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_a_shard_of_a_flat_tensor(self, judged: Any) -> None:
        """A shard over a plain leaf's memory must lie over that leaf's copy, too."""
        got = judged(_over_a_flat_tensor(), _same, _same, _same, cpu_offload=True)
        got["flat"].fill_(7)
        assert_same(got["table"].local_shards()[0].tensor, torch.full((2, 3), 7.0))


def _assert_tied_targets(load: Any, line: DeviceMesh, world: Any) -> None:
    """One DTensor on meta under two names: as many objects on ranks without a part as elsewhere."""
    full = numbers(2, 3)
    tied = dtensor(torch.zeros(2, 3), line, [S(0)]).to("meta")
    into = {"a": tied, "b": tied, "alone": dtensor(torch.zeros(2, 3), line, [S(0)]).to("meta")}
    load({"a": full, "b": full, "alone": full}, into)
    tied_still = into["a"] is into["b"] or shares_memory(local(into["a"]), local(into["b"]))
    if part(full, line, [S(0)]).numel():
        assert tied_still, "a and b came apart"
    told = exchange(world, str(into["a"] is into["b"]), "one object")
    assert len(set(told)) == 1, f"a and b are one object on some ranks, two on others: {told}"
    for name, got in into.items():
        assert_same(local(got), part(full, line, [S(0)]), name)


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastOptionsTogether:
    @pytest.mark.law("structure")
    @pytest.mark.world(3)
    def test_tied_on_meta_without_a_part(
        self, judged: Any, mesh: Any, world: Any, device: torch.device
    ) -> None:
        """A tied target on meta must stay tied on a rank whose part of it is empty."""

        def load(full: dict[str, Any], into: dict[str, Any]) -> None:
            judged({} if world.rank else full, into, device)

        _assert_tied_targets(load, mesh(3), world)

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_strict_and_none(self, judged: Any, mesh: Any, rank: int, device: torch.device) -> None:
        """With `strict` a key that the source lacks must go, whatever it held: also None."""
        into: dict[str, Any] = {
            "w": dtensor(torch.zeros(4, 4), mesh(2), [S(0)]),
            "none": None,
            "number": 3,
            "tensor": numbers(2),
        }
        judged({} if rank else {"w": numbers(4, 4)}, into, device, strict=True)
        assert list(into) == ["w"], f"{list(into)} is left"


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeOptionsTogether:
    @pytest.mark.law("structure")
    @pytest.mark.world(3)
    def test_tied_on_meta_without_a_part(
        self, judged: Any, mesh: Any, world: Any, device: torch.device
    ) -> None:
        """A tied target on meta must stay tied on a rank whose part of it is empty."""
        _assert_tied_targets(lambda full, into: judged(full, into, device), mesh(3), world)

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_placed_already_and_on_meta(self, judged: Any, mesh: Any, device: torch.device) -> None:
        """What is placed as its target must be copied there, whether the target has data or not."""
        line, full = mesh(2), numbers(4, 4)
        source = {name: dtensor(full, line, [S(0)]) for name in ("meta", "real")}
        into: dict[str, Any] = {name: dtensor(torch.zeros(4, 4), line, [S(0)]) for name in source}
        into["meta"] = into["meta"].to("meta")
        judged(dict(source), into, device)
        for name, leaf in source.items():
            assert_same(local(into[name]), part(full, line, [S(0)]), name)
            apart = not shares_memory(local(into[name]), local(leaf))
            assert apart, f"{name}: the model writes into the state dict that it was loaded from"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("shape", [(1,), (1, 1), (2,), (0,)], ids=str)
    def test_none_and_one_element(
        self, judged: Any, device: torch.device, shape: tuple[int, ...]
    ) -> None:
        """A local None must stay None where the state dict offers a tensor with dimensions."""
        into: dict[str, Any] = {"none": None, "w": numbers(2)}
        judged({"none": numbers(*shape), "w": numbers(2, salt=1)}, into, device)
        assert into["none"] is None, f"None became {into['none']}"
        assert_same(into["w"], numbers(2, salt=1))
