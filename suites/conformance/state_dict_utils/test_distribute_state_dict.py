"""_distribute_state_dict: a full state dict that every rank holds lands in the local ones."""

from __future__ import annotations

import threading
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Placement

from conformance.kit.agree import attempt, exchange
from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_same, fingerprint
from conformance.kit.data import DTYPES, SHAPES, VIEWS, numbers
from conformance.kit.groups import group
from conformance.kit.landing import assert_landed, blank, target
from conformance.kit.layouts import SOME_OF_TWO_D, THREE_D, TWO_D, R, S, placement_id
from conformance.kit.levels import STRIDES
from conformance.kit.nested import assert_apart, spoil
from conformance.kit.refusals import refused

ON_META = pytest.mark.parametrize("meta", [False, True], ids=["real", "meta"])


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeStateDict:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @ON_META
    @pytest.mark.thorough(but=["meta"])
    def test_every_dtype_lands_to_the_bit(
        self, judged: Any, mesh: Any, device: torch.device, meta: bool
    ) -> None:
        """Tensors of every dtype land bit for bit, in sharded and in plain targets."""
        line = mesh(2)
        full: dict[str, torch.Tensor] = {}
        local: dict[str, torch.Tensor] = {}
        for dtype in DTYPES:
            for key in ("rows", "plain"):
                name = f"{dtype}.{key}"
                full[name] = numbers(5, 3, dtype=dtype, device=device)
                if key == "rows":
                    local[name] = target(full[name], line, [S(0)], meta=meta)
                else:
                    local[name] = blank(full[name])
        judged(full, local, device)
        for name, tensor in full.items():
            if name.endswith("rows"):
                assert_landed(local[name], tensor, line, [S(0)], name)
            else:
                assert_same(local[name], tensor, name)

    @pytest.mark.law("values")
    @pytest.mark.world(1, 2, 3, 4)
    @ON_META
    @pytest.mark.thorough(but=["w3-real"])
    def test_every_shape_lands(
        self, judged: Any, mesh: Any, world: Any, device: torch.device, meta: bool
    ) -> None:
        """Even, uneven and empty shards and zero-size tensors land."""
        line = mesh(world.size)
        full: dict[str, torch.Tensor] = {}
        local, places = {}, {}
        for shape in filter(len, SHAPES):
            for place in (R, *(S(dim) for dim in range(len(shape)))):
                key = f"{shape} as {place}"
                full[key] = numbers(*shape, device=device, salt=len(full))
                local[key] = target(full[key], line, [place], meta=meta)
                places[key] = place
        judged(full, local, device)
        for key, tensor in full.items():
            assert_landed(local[key], tensor, line, [places[key]], key)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @ON_META
    @pytest.mark.thorough(but=["meta"])
    def test_a_0dim_tensor_lands_in_a_dtensor(
        self, judged: Any, mesh: Any, device: torch.device, meta: bool
    ) -> None:
        """A 0-dim tensor lands in a 0-dim DTensor target as in any other."""
        line = mesh(2)
        full = {"step": numbers(device=device)}
        local = {"step": target(full["step"], line, [R], meta=meta)}
        judged(full, local, device)
        assert_landed(local["step"], full["step"], line, [R], "step")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("placements", TWO_D, ids=placement_id)
    @SOME_OF_TWO_D
    @pytest.mark.thorough(but=["S0-S1"])
    def test_every_placement_on_a_2d_mesh_lands(
        self, judged: Any, mesh: Any, device: torch.device, placements: list[Placement]
    ) -> None:
        """Every combination on a 2-D mesh lands for every length, FSDP over TP included."""
        grid = mesh(2, 2)
        shapes = [(8, 8), (9, 5), (7, 7), (5, 6), (3, 3), (2, 2), (1, 1), (0, 3)]
        full = {str(s): numbers(*s, salt=i, device=device) for i, s in enumerate(shapes)}
        for meta in (False, True):
            local = {k: target(full[k], grid, placements, meta=meta) for k in full}
            judged(full, local, device)
            for key, tensor in full.items():
                assert_landed(local[key], tensor, grid, placements, f"{key}, {meta=}")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("shape", [(1, 2, 2), (2, 1, 2), (2, 2, 1)], ids=str)
    @pytest.mark.thorough(but=["(2, 2, 1)"])
    def test_every_placement_on_a_3d_mesh_lands(
        self, judged: Any, mesh: Any, device: torch.device, shape: tuple[int, ...]
    ) -> None:
        """On 3-D meshes every combination lands."""
        cube = mesh(*shape)
        for placements in THREE_D:
            full = {"w": numbers(8, 6, device=device)}
            local = {"w": target(full["w"], cube, placements)}
            judged(full, local, device)
            assert_landed(local["w"], full["w"], cube, placements, f"{placements}")

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_sources_of_every_layout_are_read(
        self, judged: Any, mesh: Any, device: torch.device
    ) -> None:
        """A full tensor is read in logical order, whatever its strides and offset."""
        line = mesh(2)
        for name, view in VIEWS.items():
            full = view(numbers(5, 4, device=device))
            local = {"w": target(full.contiguous(), line, [S(0)]), "p": blank(full)}
            judged({"w": full, "p": full}, local, device)
            assert_landed(local["w"], full, line, [S(0)], name)
            assert_same(local["p"], full, name)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_each_rank_takes_its_own_values(
        self, judged: Any, mesh: Any, device: torch.device, rank: int
    ) -> None:
        """What lands on a rank is the part of the dict that this rank holds."""
        line = mesh(2)
        mine = numbers(6, 3, salt=rank, device=device)
        local = {"w": target(mine, line, [S(0)]), "r": target(mine, line, [R]), "p": blank(mine)}
        judged(dict.fromkeys(local, mine), local, device)
        assert_landed(local["w"], mine, line, [S(0)], "w")
        assert_landed(local["r"], mine, line, [R], "r")
        assert_same(local["p"], mine, "p")

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_values_that_are_no_tensors_land(
        self, judged: Any, mesh: Any, device: torch.device
    ) -> None:
        """Numbers, text, None and 0-dim tensors land in the keys that the target has."""
        full: dict[str, Any] = {"n": 3, "s": "text", "x": 2.5, "l": [1, 2], "step": numbers(salt=3)}
        local: dict[str, Any] = {"n": 0, "s": "", "x": 0.0, "l": [], "step": numbers(salt=1)}
        judged(full, local, device)
        assert_same(local["step"], full["step"], "step")
        rest = [k for k in full if k != "step"]
        assert {k: local[k] for k in rest} == {k: full[k] for k in rest}

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_values_that_have_no_copy_land(self, judged: Any, device: torch.device) -> None:
        """A value of a class that cannot be copied, as extra states hold them, lands as it is."""
        full = {"lock": threading.Lock(), "view": MappingProxyType({"rate": 0.1}), "n": 3}
        local: dict[str, Any] = dict.fromkeys(full)
        judged(full, local, device)
        assert local == full

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("kind", ["tensor", "scalar tensor", "number", "text"])
    def test_no_key_is_added(self, judged: Any, mesh: Any, device: torch.device, kind: str) -> None:
        """A key that the target lacks is left out; one that the full dict lacks stays as it is."""
        line = mesh(2)
        extra = {
            "tensor": numbers(4, device=device),
            "scalar tensor": numbers(device=device),
            "number": 3,
            "text": "text",
        }[kind]
        tensor = numbers(5, 3, device=device)
        kept = numbers(2, device=device)
        local = {"kept": kept, "w": target(tensor, line, [S(0)])}
        judged({"extra": extra, "w": tensor}, local, device)
        assert list(local) == ["kept", "w"], f"keys {list(local)}, expected kept and w"
        assert local["kept"] is kept
        assert_landed(local["w"], tensor, line, [S(0)], "w")

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "plain"])
    def test_meta_targets_keep_dtype_and_ties(
        self, judged: Any, mesh: Any, device: torch.device, sharded: bool
    ) -> None:
        """Meta targets materialise with their own dtype, and tied ones stay tied."""
        line = mesh(2)
        full = numbers(6, 3, device=device)
        if sharded:
            tied: Any = target(full, line, [S(0)], dtype=torch.bfloat16, meta=True)
        else:
            tied = torch.empty(6, 3, dtype=torch.bfloat16, device="meta")
        local = {"a": tied, "b": tied}
        judged({"a": full, "b": full}, local, device)
        for key in "ab":
            if sharded:
                assert_landed(local[key], full.to(torch.bfloat16), line, [S(0)], key)
            else:
                assert_same(local[key], full.to(torch.bfloat16), key)
        a, b = ((t._local_tensor if sharded else t).data_ptr() for t in local.values())
        assert a == b, "a and b have come apart"

    @pytest.mark.law("structure")
    @pytest.mark.should(STRIDES)
    @pytest.mark.world(1)
    def test_channels_last_survives(self, judged: Any, device: torch.device) -> None:
        """A channels_last tensor lands right, and as channels_last, in such a target."""
        image = numbers(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
        local = {"w": blank(image).to(memory_format=torch.channels_last)}
        judged({"w": image}, local, device)
        assert_same(local["w"], image, "w")
        got, expected = local["w"].stride(), image.stride()
        assert got == expected, f"strides {got}, expected {expected}"

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    @ON_META
    @pytest.mark.thorough(but=["w1-real"])
    def test_the_full_dict_is_only_read(
        self, judged: Any, mesh: Any, world: Any, device: torch.device, meta: bool
    ) -> None:
        """The full dict stays as it is, lends no memory, and a second call lands the same."""
        line = mesh(world.size)
        places = {"rows": S(0), "whole": R}
        full = {k: numbers(4, 3, salt=i) for i, k in enumerate(("rows", "whole", "plain", "n"))}
        full["n"] = numbers(salt=4)
        before = fingerprint(full)
        expected = {key: tensor.clone() for key, tensor in full.items()}
        results = []
        for _ in range(2):
            local: dict[str, Any] = {
                k: target(full[k], line, [p], meta=meta) for k, p in places.items()
            }
            local |= {"plain": blank(full["plain"]), "n": numbers(salt=1)}
            judged(full, local, device)
            assert fingerprint(full) == before, "the full dict has changed"
            assert_apart(local, full)
            results.append(local)
        assert_apart(results[0], results[1], "the first result beside the second")
        spoil(full)
        for local in results:
            for key, place in places.items():
                assert_landed(local[key], expected[key], line, [place], key)
            assert_same(local["plain"], expected["plain"], "plain")
            assert_same(local["n"], expected["n"], "n")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2)
    def test_keys_in_another_order_on_each_rank(
        self, judged: Any, mesh: Any, device: torch.device, rank: int
    ) -> None:
        """Ranks whose dicts hold the same keys in another order get the right tensors."""
        line = mesh(2)
        keys = [f"k{i}" for i in range(4)]
        turned = keys[rank:] + keys[:rank]
        full = {k: numbers(6, 3, salt=keys.index(k), device=device) for k in turned}
        local = {k: target(full[k], line, [S(0)]) for k in keys}
        judged(full, local, device)
        for key in keys:
            assert_landed(local[key], full[key], line, [S(0)], key)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    def test_a_dict_that_only_one_rank_holds(
        self, judged: Any, mesh: Any, world: Any, device: torch.device
    ) -> None:
        """A rank with an empty dict keeps its targets; the other is not kept waiting for it."""
        line = mesh(2)
        tensor = numbers(6, 3, device=device)
        local = {"w": target(tensor, line, [S(0)])}
        full = {"w": tensor} if world.rank == 0 else {}
        error = attempt(lambda: judged(full, local, device))
        told = exchange(world, repr(error))
        assert told == ["None", "None"], f"by rank: {told}"
        assert_landed(local["w"], blank(tensor) if world.rank else tensor, line, [S(0)], "w")

    @pytest.mark.law("group")
    @pytest.mark.world(3)
    def test_a_group_and_mesh_without_global_rank_0(
        self, judged: Any, mesh: Any, device: torch.device, rank: int
    ) -> None:
        """With `pg` and targets of a submesh only its ranks take part."""
        members, line = group(1, 2), mesh(2, ranks=[1, 2])
        if rank == 0:
            return
        full = numbers(5, 3, device=device)
        local = {"w": target(full, line, [S(0)])}
        judged({"w": full}, local, device, members)
        assert_landed(local["w"], full, line, [S(0)], "w")

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    def test_a_mesh_in_another_rank_order(
        self, judged: Any, mesh: Any, device: torch.device
    ) -> None:
        """On a mesh of unsorted ranks each gets the part that full_tensor() reads there."""
        turned = mesh(4, ranks=[3, 1, 0, 2])
        full = numbers(9, 3, device=device)
        local = {"w": target(full, turned, [S(0)])}
        judged({"w": full}, local, device)
        assert_landed(local["w"], full, turned, [S(0)], "w")

    @pytest.mark.law("autograd")
    @pytest.mark.world(2)
    def test_no_graph_is_kept(self, judged: Any, mesh: Any, device: torch.device) -> None:
        """Trained tensors on both sides, outside `no_grad`, leave no graph."""
        line = mesh(2)
        full = {key: numbers(5, 3, device=device).requires_grad_() for key in ("w", "p")}
        local: dict[str, Any] = {
            "w": nn.Parameter(target(full["w"], line, [S(0)])),
            "p": nn.Parameter(blank(full["p"])),
        }
        judged(full, local, device)
        for key, value in local.items():
            assert value.grad_fn is None, f"{key} keeps {value.grad_fn}"
        assert_landed(local["w"], full["w"].detach(), line, [S(0)], "w")
        assert_same(local["p"], full["p"].detach(), "p")

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("size", [(7, 3), (5,)], ids=str)
    @pytest.mark.thorough(but=["(5,)"])
    def test_a_wrong_shape_changes_nothing(
        self, judged: Any, mesh: Any, device: torch.device, size: tuple[int, ...]
    ) -> None:
        """A full tensor of another shape than its target is refused by key; nothing is written."""
        line = mesh(2)
        fine = numbers(5, 3, device=device)
        local = {key: target(fine, line, [S(0)]) for key in ("fine", "layer.odd")}
        before = fingerprint(local)
        full = {"fine": fine, "layer.odd": numbers(*size, device=device)}
        refused(lambda: judged(full, local, device), "layer.odd", what=f"{size} for (5, 3)")
        assert fingerprint(local) == before, "the local dict has changed"

    @pytest.mark.law("cost")
    @pytest.mark.world(2)
    @ON_META
    def test_no_collective_runs(
        self, judged: Any, mesh: Any, device: torch.device, meta: bool
    ) -> None:
        """Every rank holds the dict: nothing is communicated."""
        line = mesh(2)
        full = {f"k{i}": numbers(6, 4, salt=i, device=device) for i in range(4)}
        places = {"k0": R, "k1": S(0), "k2": S(1)}
        local: dict[str, Any] = {
            k: target(full[k], line, [p], meta=meta) for k, p in places.items()
        }
        local["k3"] = blank(full["k3"])
        with Collectives() as seen:
            judged(full, local, device)
        assert not seen.count, f"collectives: {dict(seen.names)}"
