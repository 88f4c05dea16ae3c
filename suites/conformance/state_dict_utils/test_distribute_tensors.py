"""_distribute_tensors: whole tensors that each rank holds, cut into the DTensors beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Placement

from conformance.kit.collectives import Collectives
from conformance.kit.compare import fingerprint
from conformance.kit.data import DTYPES, SHAPES, VIEWS, numbers
from conformance.kit.groups import group
from conformance.kit.landing import assert_landed, target
from conformance.kit.layouts import SOME_OF_TWO_D, THREE_D, TWO_D, R, S, placement_id
from conformance.kit.levels import IDENTITY
from conformance.kit.nested import assert_apart, spoil
from conformance.kit.refusals import refused

CPU = torch.device("cpu")
ON_META = pytest.mark.parametrize("meta", [False, True], ids=["real", "meta"])


@pytest.mark.judges("_state_dict_utils._distribute_tensors")
class TestDistributeTensors:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @ON_META
    @pytest.mark.thorough(but=["meta"])
    def test_every_dtype_lands_to_the_bit(
        self, judged: Any, mesh: Any, device: torch.device, meta: bool
    ) -> None:
        """Tensors of every dtype land bit for bit, in memory and on meta targets alike."""
        line = mesh(2)
        for dtype in DTYPES:
            full = numbers(5, 3, dtype=dtype, device=device)
            state = {"w": (target(full, line, [S(0)], meta=meta), full)}
            judged(state, ["w"], device)
            assert_landed(state["w"], full, line, [S(0)], str(dtype))

    @pytest.mark.law("values")
    @pytest.mark.world(1, 2, 3, 4)
    @ON_META
    @pytest.mark.thorough(but=["w3-real"])
    def test_every_shape_lands(
        self, judged: Any, mesh: Any, world: Any, device: torch.device, meta: bool
    ) -> None:
        """Even, uneven and empty shards, 0-dim and zero-size tensors land."""
        line = mesh(world.size)
        for shape in SHAPES:
            full = numbers(*shape, device=device)
            for place in (R, *(S(dim) for dim in range(len(shape)))):
                state = {"w": (target(full, line, [place], meta=meta), full)}
                judged(state, ["w"], device)
                assert_landed(state["w"], full, line, [place], f"{shape} as {place}")

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
        for shape in [(8, 8), (9, 5), (7, 7), (5, 6), (3, 3), (2, 2), (1, 1), (0, 3)]:
            full = numbers(*shape, device=device)
            for meta in (False, True):
                state = {"w": (target(full, grid, placements, meta=meta), full)}
                judged(state, ["w"], device)
                assert_landed(state["w"], full, grid, placements, f"{shape}, {meta=}")

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
            full = numbers(8, 6, device=device)
            state = {"w": (target(full, cube, placements), full)}
            judged(state, ["w"], device)
            assert_landed(state["w"], full, cube, placements, f"{placements}")

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("view", VIEWS)
    @pytest.mark.thorough(but=["transposed"])
    def test_sources_of_every_layout_are_read(
        self, judged: Any, mesh: Any, device: torch.device, view: str
    ) -> None:
        """The whole tensor is read in logical order, whatever its strides and offset."""
        line = mesh(2)
        full = VIEWS[view](numbers(5, 4, device=device))
        for place in (R, S(0), S(1)):
            for meta in (False, True):
                state = {"w": (target(full.contiguous(), line, [place], meta=meta), full)}
                judged(state, ["w"], device)
                assert_landed(state["w"], full, line, [place], f"{place}, {meta=}")

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_a_meta_target_gives_the_dtype(
        self, judged: Any, mesh: Any, device: torch.device
    ) -> None:
        """A meta target materialises with its own dtype."""
        line = mesh(2)
        full = numbers(5, 3, device=device)
        state = {"w": (target(full, line, [S(0)], dtype=torch.bfloat16, meta=True), full)}
        judged(state, ["w"], device)
        assert_landed(state["w"], full.to(torch.bfloat16), line, [S(0)], "w")

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_only_pairs_among_the_keys_change(
        self, judged: Any, mesh: Any, device: torch.device
    ) -> None:
        """Entries that are not named, plain tensors and absent keys must stay; no key appears."""
        line = mesh(2)
        full = numbers(5, 3, device=device)
        plain = numbers(3, device=device)
        pair = (target(full, line, [S(0)]), full)
        view = pair[0].detach()
        state: dict[str, Any] = {"z": pair, "w": pair, "view": (view, full), "plain": plain, "n": 3}
        judged(state, ["plain", "w", "view", "absent"], device)
        assert list(state) == ["z", "w", "view", "plain", "n"], f"keys {list(state)}"
        assert state["z"] is pair, f"z, which is not named: {state['z']!r}, expected its pair"
        assert state["plain"] is plain, f"plain: {state['plain']!r}, expected the tensor there was"
        assert state["n"] == 3, f"n: {state['n']!r}, expected 3"
        assert_landed(state["w"], full, line, [S(0)], "w")
        assert_landed(state["view"], full, line, [S(0)], "view")

    @pytest.mark.law("structure")
    @pytest.mark.should(IDENTITY)
    @pytest.mark.world(2)
    def test_a_dtensor_stays_the_object_that_it_was(
        self, judged: Any, mesh: Any, device: torch.device
    ) -> None:
        """A DTensor with memory must stay the same object, also beside a view of it."""
        full = numbers(5, 3, device=device)
        given = target(full, mesh(2), [S(0)])
        view = given.detach()
        state: dict[str, Any] = {"w": (given, full), "view": (view, full)}
        judged(state, ["w", "view"], device)
        assert state["w"] is given, "w: another DTensor, expected the one that was there"
        assert state["view"] is view, "view: another DTensor, expected the one that was there"

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_tied_meta_targets_stay_tied(
        self, judged: Any, mesh: Any, device: torch.device
    ) -> None:
        """One meta target under two keys becomes one tensor under both."""
        line = mesh(2)
        full = numbers(6, 3, device=device)
        tied = target(full, line, [S(0)], meta=True)
        state: dict[str, Any] = {"a": (tied, full), "b": (tied, full)}
        judged(state, ["a", "b"], device)
        for key in "ab":
            assert_landed(state[key], full, line, [S(0)], key)
        a, b = (state[key]._local_tensor.data_ptr() for key in "ab")
        assert a == b, "a and b have come apart"

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    @ON_META
    @pytest.mark.thorough(but=["w1-real", "w2-meta"])
    def test_the_source_is_only_read(
        self, judged: Any, mesh: Any, world: Any, device: torch.device, meta: bool
    ) -> None:
        """The whole tensor stays as it is, and the result is not in its memory."""
        line = mesh(world.size)
        for place in (R, S(0)):
            full = numbers(4, 3, device=device)
            before = fingerprint(full)
            state: dict[str, Any] = {"w": (target(full, line, [place], meta=meta), full)}
            judged(state, ["w"], device)
            assert fingerprint(full) == before, f"{place}: the source has changed"
            assert_apart({"w": state["w"]}, {"w": full}, str(place))
            spoil(full)
            assert_landed(state["w"], numbers(4, 3), line, [place], f"{place}, source changed")

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
        state = {"w": (target(full, line, [S(0)]), full)}
        judged(state, ["w"], device, members)
        assert_landed(state["w"], full, line, [S(0)], "w")

    @pytest.mark.law("autograd")
    @pytest.mark.world(2)
    def test_a_trained_parameter_takes_the_values(
        self, judged: Any, mesh: Any, device: torch.device
    ) -> None:
        """A target that requires grad, outside `no_grad`, gets the values and no graph."""
        line = mesh(2)
        full = numbers(5, 3, device=device).requires_grad_()
        state: dict[str, Any] = {"w": (nn.Parameter(target(full, line, [S(0)])), full)}
        judged(state, ["w"], device)
        assert state["w"].grad_fn is None, f"the result keeps {state['w'].grad_fn}"
        assert state["w"].is_leaf
        assert_landed(state["w"], full.detach(), line, [S(0)], "w")

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("size", [(7, 3), (1,), (5,)], ids=str)
    def test_a_wrong_shape_changes_nothing(
        self, judged: Any, mesh: Any, device: torch.device, size: tuple[int, ...]
    ) -> None:
        """A whole tensor of another shape than its target is refused by key; nothing is written."""
        line = mesh(2)
        fine = numbers(5, 3, device=device)
        wrong = numbers(*size, device=device)
        state: dict[str, Any] = {
            "fine": (target(fine, line, [S(0)]), fine),
            "layer.odd": (target(fine, line, [S(0)]), wrong),
        }
        before = fingerprint(state)
        refused(
            lambda: judged(state, ["fine", "layer.odd"], device),
            "layer.odd",
            what=f"{size} for (5, 3)",
        )
        assert fingerprint(state) == before, "the state dict has changed"

    @pytest.mark.law("cost")
    @pytest.mark.world(2)
    def test_no_collective_runs(self, judged: Any, mesh: Any, device: torch.device) -> None:
        """Every rank holds the data: nothing is communicated."""
        line = mesh(2)
        full = numbers(5, 3, device=device)
        state: dict[str, Any] = {}
        for meta in (False, True):
            for place in (R, S(0), S(1)):
                state[f"{meta}{place}"] = (target(full, line, [place], meta=meta), full)
        with Collectives() as seen:
            judged(state, list(state), device)
        assert not seen.count, f"collectives: {dict(seen.names)}"
