"""_broadcast_tensors and _TensorInfo: some of the source's tensors land in every rank's dict."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

from conformance.kit.agree import assert_raises_everywhere
from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_same, fingerprint
from conformance.kit.data import SHAPES, SOME_DTYPES, VIEWS, dtype_id, numbers
from conformance.kit.groups import UNSORTED, group
from conformance.kit.landing import assert_landed, blank, target
from conformance.kit.layouts import TWO_D, R, S, placement_id
from conformance.kit.levels import BYTES, COUNT
from conformance.kit.nested import assert_apart, spoil

ROOM = 64 * 1024
"""Bytes that the ranks may spend on agreeing, whatever the size of the tensors."""


@pytest.fixture
def given(subject: Any, rank: int) -> Any:
    """Makes of a full dict what a rank hands in: tensors on the source, else `_TensorInfo`."""
    info = subject.function("_state_dict_utils._TensorInfo")

    def make(full: dict[str, Any], source: int = 0) -> dict[str, Any]:
        if rank == source:
            return dict(full)
        return {k: info(t.size(), t.dtype) for k, t in full.items()}

    return make


@pytest.mark.judges("_state_dict_utils._TensorInfo")
class TestTensorInfo:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_it_is_a_tuple_of_size_and_dtype(self, judged: Any) -> None:
        """A tuple of `size` and `dtype` that equals another of the same and survives pickling."""
        info = judged(torch.Size([2, 3]), torch.bfloat16)
        assert issubclass(judged, tuple)
        assert (info.size, info.dtype) == (torch.Size([2, 3]), torch.bfloat16)
        assert tuple(info) == (info.size, info.dtype)
        assert info == judged(size=torch.Size([2, 3]), dtype=torch.bfloat16)
        assert info != judged(torch.Size([2, 3]), torch.float16)
        assert pickle.loads(pickle.dumps(info)) == info


@pytest.mark.judges("_state_dict_utils._broadcast_tensors")
class TestBroadcastTensors:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("dtype", [*SOME_DTYPES, torch.float8_e5m2, torch.int64], ids=dtype_id)
    @pytest.mark.thorough(but=["float8_e5m2"])
    def test_every_dtype_lands_to_the_bit(
        self, judged: Any, mesh: Any, given: Any, device: torch.device, dtype: torch.dtype
    ) -> None:
        """A tensor of any dtype lands bit for bit, alone and with others."""
        line = mesh(2)
        for number in (1, 3):
            full = {f"k{i}": numbers(5, 3, dtype=dtype, salt=i).to(device) for i in range(number)}
            mine: dict[str, Any] = {k: target(t, line, [S(0)]) for k, t in full.items()}
            if number > 1:
                mine["k1"] = blank(full["k1"])
            judged(given(full), mine, list(full), device)
            for key, tensor in full.items():
                if key == "k1":
                    assert_same(mine[key], tensor, f"{key} of {number}")
                else:
                    assert_landed(mine[key], tensor, line, [S(0)], f"{key} of {number}")

    @pytest.mark.law("values")
    @pytest.mark.world(1, 2, 3, 4)
    @pytest.mark.thorough(but=["w2"])
    def test_every_shape_lands(
        self, judged: Any, mesh: Any, world: Any, given: Any, device: torch.device
    ) -> None:
        """Even, uneven and empty shards and zero-size tensors land, on meta targets and others."""
        line = mesh(world.size)
        full: dict[str, torch.Tensor] = {}
        mine, places = {}, {}
        for shape in SHAPES:
            for place in (R, *(S(dim) for dim in range(len(shape)))):
                for meta in (False, True):
                    key = f"{shape} as {place}, {meta=}"
                    full[key] = numbers(*shape, device=device, salt=len(full))
                    mine[key] = target(full[key], line, [place], meta=meta)
                    places[key] = place
        judged(given(full), mine, list(full), device)
        for key, tensor in full.items():
            assert_landed(mine[key], tensor, line, [places[key]], key)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_every_placement_on_a_2d_mesh_lands(
        self, judged: Any, mesh: Any, given: Any, device: torch.device
    ) -> None:
        """Every combination on a 2-D mesh lands for every length, FSDP over TP included."""
        grid = mesh(2, 2)
        full: dict[str, torch.Tensor] = {}
        mine, places = {}, {}
        for placements in TWO_D:
            for shape in [(8, 8), (9, 5), (7, 7), (5, 6), (3, 3), (2, 2), (1, 1), (0, 3)]:
                key = f"{shape} as {placement_id(placements)}"
                full[key] = numbers(*shape, salt=len(full), device=device)
                mine[key] = target(full[key], grid, placements)
                places[key] = placements
        judged(given(full), mine, list(full), device)
        for key, tensor in full.items():
            assert_landed(mine[key], tensor, grid, places[key], key)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("view", VIEWS)
    @pytest.mark.thorough(but=["contiguous", "transposed", "expanded"])
    def test_sources_of_every_layout_are_read(
        self, judged: Any, given: Any, device: torch.device, view: str
    ) -> None:
        """A source tensor is read in logical order, whatever its strides and offset."""
        for number in (1, 2):
            full = {
                f"k{i}": VIEWS[view](numbers(5, 4, salt=i, device=device)) for i in range(number)
            }
            mine = {k: blank(t) for k, t in full.items()}
            judged(given(full), mine, list(full), device)
            for key, tensor in full.items():
                assert_same(mine[key], tensor, f"{key} of {number}")

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.parametrize(
        "keys",
        [["w"], ["w", "absent"], ["absent"], []],
        ids=["one", "one absent", "absent", "none"],
    )
    def test_only_the_keys_that_are_named_and_there_change(
        self, judged: Any, mesh: Any, given: Any, device: torch.device, keys: list[str]
    ) -> None:
        """Keys that are not named stay as they are; a key that the target lacks is not added."""
        line = mesh(2)
        full = {k: numbers(5, 3, salt=i, device=device) for i, k in enumerate(("z", "w", "absent"))}
        other = blank(full["z"])
        mine: dict[str, Any] = {"z": other, "w": target(full["w"], line, [S(0)])}
        judged(given(full), mine, keys, device)
        assert list(mine) == ["z", "w"], f"keys {list(mine)}, expected z and w"
        assert mine["z"] is other
        landed = full["w"] if "w" in keys else blank(full["w"])
        assert_landed(mine["w"], landed, line, [S(0)], "w")

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_meta_targets_keep_dtype_and_ties(
        self, judged: Any, mesh: Any, given: Any, device: torch.device
    ) -> None:
        """Meta targets materialise with their own dtype, and tied ones stay tied."""
        line = mesh(2)
        tensor = numbers(6, 3, device=device)
        tied = target(tensor, line, [S(0)], dtype=torch.bfloat16, meta=True)
        mine = {"a": tied, "b": tied}
        judged(given({"a": tensor, "b": tensor}), mine, ["a", "b"], device)
        for key in "ab":
            assert_landed(mine[key], tensor.to(torch.bfloat16), line, [S(0)], key)
        a, b = (value._local_tensor.data_ptr() for value in mine.values())
        assert a == b, "a and b have come apart"

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("number", [1, 2], ids=["one", "several"])
    @pytest.mark.thorough(but=["w1-one"])
    def test_the_source_is_only_read(
        self, judged: Any, mesh: Any, world: Any, given: Any, device: torch.device, number: int
    ) -> None:
        """The source's dict stays as it is and lends no memory."""
        line = mesh(world.size)
        full = {f"k{i}": numbers(4, 3, salt=i, device=device) for i in range(number)}
        handed = given(full)
        before = fingerprint(handed)
        mine: dict[str, Any] = {k: blank(t) for k, t in full.items()}
        if number > 1:
            mine["k1"] = target(full["k1"], line, [R], meta=True)
        judged(handed, mine, list(full), device)
        assert fingerprint(handed) == before, "the full dict has changed"
        assert_apart(mine, full)
        spoil(full)
        assert_same(mine["k0"], numbers(4, 3), "k0, after the source changed")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    def test_a_source_value_that_is_no_tensor(
        self, judged: Any, world: Any, subject: Any, device: torch.device
    ) -> None:
        """A value on the source that is no tensor raises the same on every rank, naming it."""
        info = subject.function("_state_dict_utils._TensorInfo")
        odd: Any = "text" if world.rank == 0 else info(torch.Size([4]), torch.float32)
        mine = {"layer.odd": numbers(4, device=device)}
        before = fingerprint(mine)
        assert_raises_everywhere(
            world, lambda: judged({"layer.odd": odd}, mine, ["layer.odd"], device), "layer.odd"
        )
        assert fingerprint(mine) == before, "the local dict has changed"

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    @pytest.mark.parametrize(
        "members", [(0, 2), (1, 2), pytest.param((3, 1), marks=UNSORTED)], ids=str
    )
    @pytest.mark.thorough(but=["(1, 2)"])
    def test_the_groups_first_rank_is_the_source(
        self,
        judged: Any,
        mesh: Any,
        rank: int,
        given: Any,
        device: torch.device,
        members: tuple[int, int],
    ) -> None:
        """The first rank of `pg`, in its own numbers, is the source; no other rank is needed."""
        some, line = group(*members), mesh(2, ranks=sorted(members))
        if rank not in members:
            return
        full = {"w": numbers(5, 3, device=device), "p": numbers(4, device=device)}
        mine: dict[str, Any] = {"w": target(full["w"], line, [S(0)]), "p": blank(full["p"])}
        judged(given(full, members[0]), mine, ["w", "p"], device, some)
        assert_landed(mine["w"], full["w"], line, [S(0)], "w")
        assert_same(mine["p"], full["p"], "p")

    @pytest.mark.law("autograd")
    @pytest.mark.world(2)
    def test_no_graph_is_kept(
        self, judged: Any, mesh: Any, given: Any, device: torch.device
    ) -> None:
        """Trained tensors on both sides, outside `no_grad`, take the values and leave no graph."""
        line = mesh(2)
        full = {k: numbers(5, 3, device=device).requires_grad_() for k in ("p", "w")}
        mine: dict[str, Any] = {
            "p": nn.Parameter(blank(full["p"].detach())),
            "w": nn.Parameter(target(full["w"], line, [S(0)])),
        }
        judged(given(full), mine, ["p", "w"], device)
        for key, value in mine.items():
            assert value.grad_fn is None, f"{key} keeps {value.grad_fn}"
        assert_same(mine["p"], full["p"].detach(), "p")
        assert_landed(mine["w"], full["w"].detach(), line, [S(0)], "w")

    @pytest.mark.law("cost")
    @pytest.mark.should(COUNT)
    @pytest.mark.world(2)
    def test_collectives_do_not_grow_with_the_tensors(
        self, judged: Any, given: Any, device: torch.device
    ) -> None:
        """Forty tensors need as many collectives as four."""
        counts = []
        for number in (4, 40):
            full = {f"k{i}": numbers(8, 2, salt=i, device=device) for i in range(number)}
            mine = {k: blank(t) for k, t in full.items()}
            with Collectives() as seen:
                judged(given(full), mine, list(full), device)
            counts.append(seen.count)
        assert counts[0] == counts[1] > 0, f"collectives for 4 and for 40 tensors: {counts}"

    @pytest.mark.law("cost")
    @pytest.mark.should(BYTES)
    @pytest.mark.world(4)
    def test_a_rank_does_not_receive_the_parts_of_others(
        self, judged: Any, mesh: Any, rank: int, given: Any, device: torch.device
    ) -> None:
        """A rank that holds a quarter is handed less than half of the tensor."""
        full = {"w": numbers(512, 512, device=device)}
        mine = {"w": target(full["w"], mesh(4), [S(0)])}
        with Collectives() as seen:
            judged(given(full), mine, ["w"], device)
        assert_landed(mine["w"], full["w"], mesh(4), [S(0)], "w")
        # A quarter is its own; another would already be someone else's.
        if rank != 0:
            whole = full["w"].nbytes
            assert seen.bytes < whole // 2, f"{seen.bytes} bytes of {whole} moved"

    @pytest.mark.law("cost")
    @pytest.mark.should(BYTES)
    @pytest.mark.world(2)
    def test_keys_that_nobody_wants_do_not_travel(
        self, judged: Any, given: Any, device: torch.device
    ) -> None:
        """A key that no rank's local dict has is not moved, though it is named."""
        full = {"w": numbers(4, device=device), "big": numbers(512, 512, device=device)}
        mine = {"w": blank(full["w"])}
        with Collectives() as seen:
            judged(given(full), mine, ["big", "w"], device)
        assert_same(mine["w"], full["w"], "w")
        assert seen.bytes < ROOM, f"{seen.bytes} bytes moved"
