"""_broadcast_state_dict, what lands: values and structure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import Placement

from conformance.kit.compare import assert_same, fingerprint, local
from conformance.kit.data import EACH_DTYPE, SHAPES, VIEWS, numbers
from conformance.kit.landing import assert_landed, blank, target
from conformance.kit.layouts import SOME_OF_TWO_D, THREE_D, TWO_D, R, S, placement_id
from conformance.kit.levels import IDENTITY, STRIDES

ON_META = pytest.mark.parametrize("meta", [False, True], ids=["real", "meta"])


def _given(rank: int, full: dict[str, Any]) -> dict[str, Any]:
    """The full dict as callers hand it in: whole on the source, empty elsewhere."""
    return full if rank == 0 else {}


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastStateDictValues:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @EACH_DTYPE
    @pytest.mark.thorough(but=["float8_e4m3fn"])
    def test_every_dtype_lands_to_the_bit(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """A tensor of every dtype lands bit for bit, in sharded, whole and plain targets."""
        line = mesh(2)
        full = {k: numbers(5, 3, dtype=dtype, device=device, salt=ord(k)) for k in "abcd"}
        mine: dict[str, Any] = {
            "a": target(full["a"], line, [S(0)]),
            "b": target(full["b"], line, [R]),
            "c": blank(full["c"]),
            "d": target(full["d"], line, [S(1)], meta=True),
        }
        judged(_given(rank, full), mine, device)
        assert_landed(mine["a"], full["a"], line, [S(0)], "rows")
        assert_landed(mine["b"], full["b"], line, [R], "whole")
        assert_same(mine["c"], full["c"], "plain")
        assert_landed(mine["d"], full["d"], line, [S(1)], "columns on meta")

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
        mine, places = {}, {}
        for shape in filter(len, SHAPES):
            for place in (R, *(S(dim) for dim in range(len(shape)))):
                key = f"{shape} as {place}"
                full[key] = numbers(*shape, device=device, salt=len(full))
                mine[key] = target(full[key], line, [place], meta=meta)
                places[key] = place
        judged(_given(world.rank, full), mine, device)
        for key, tensor in full.items():
            assert_landed(mine[key], tensor, line, [places[key]], key)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @ON_META
    @pytest.mark.thorough(but=["real"])
    def test_a_0dim_tensor_lands_in_a_dtensor(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, meta: bool
    ) -> None:
        """A 0-dim tensor lands in a 0-dim DTensor target as in any other."""
        line = mesh(2)
        full = {"step": numbers(device=device, salt=3)}
        mine = {"step": target(full["step"], line, [R], meta=meta)}
        judged(_given(rank, full), mine, device)
        assert_landed(mine["step"], full["step"], line, [R], "step")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("placements", TWO_D, ids=placement_id)
    @SOME_OF_TWO_D
    @pytest.mark.thorough(but=["R-S1"])
    def test_every_placement_on_a_2d_mesh_lands(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, placements: list[Placement]
    ) -> None:
        """Every combination on a 2-D mesh lands for every length, FSDP over TP included."""
        grid = mesh(2, 2)
        shapes = [(8, 8), (9, 5), (7, 7), (5, 6), (3, 3), (2, 2), (1, 1), (0, 3)]
        full = {str(s): numbers(*s, salt=i, device=device) for i, s in enumerate(shapes)}
        for meta in (False, True):
            mine = {k: target(full[k], grid, placements, meta=meta) for k in full}
            judged(_given(rank, full), mine, device)
            for key, tensor in full.items():
                assert_landed(mine[key], tensor, grid, placements, f"{key}, {meta=}")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("shape", [(1, 2, 2), (2, 1, 2), (2, 2, 1)], ids=str)
    @pytest.mark.thorough(but=["(1, 2, 2)"])
    def test_every_placement_on_a_3d_mesh_lands(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, shape: tuple[int, ...]
    ) -> None:
        """On 3-D meshes every combination lands."""
        cube = mesh(*shape)
        full = {placement_id(p): numbers(8, 6, salt=i) for i, p in enumerate(THREE_D)}
        mine = {placement_id(p): target(full[placement_id(p)], cube, p) for p in THREE_D}
        judged(_given(rank, full), mine, device)
        for placements in THREE_D:
            key = placement_id(placements)
            assert_landed(mine[key], full[key], cube, placements, key)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("view", VIEWS)
    @pytest.mark.thorough(but=["offset"])
    def test_sources_of_every_layout_are_read(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, view: str
    ) -> None:
        """A full tensor is read in logical order, whatever its strides and offset."""
        line = mesh(2)
        tensor = VIEWS[view](numbers(5, 4, device=device))
        places = {"rows": S(0), "columns": S(1), "whole": R}
        mine: dict[str, Any] = {k: target(tensor.clone(), line, [p]) for k, p in places.items()}
        mine["plain"] = blank(tensor)
        judged(_given(rank, dict.fromkeys(mine, tensor)), mine, device)
        for key, place in places.items():
            assert_landed(mine[key], tensor, line, [place], key)
        assert_same(mine["plain"], tensor, "plain")

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_values_that_are_no_tensors_land(
        self, judged: Any, rank: int, device: torch.device
    ) -> None:
        """Numbers, text, None, lists and 0-dim tensors land in the keys that the target has."""
        full: dict[str, Any] = {
            "n": 3,
            "s": "text",
            "x": 2.5,
            "none": None,
            "l": [1, 2],
            "step": numbers(salt=3),
        }
        mine: dict[str, Any] = dict.fromkeys(full, 0) | {"step": numbers(salt=1)}
        judged(_given(rank, full), mine, device)
        assert_same(mine["step"], full["step"], "step")
        rest = [k for k in full if k != "step"]
        assert {k: mine[k] for k in rest} == {k: full[k] for k in rest}

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_a_tensor_larger_than_a_bucket(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """A tensor of 100 MB lands beside small ones, in however many pieces it travels."""
        line = mesh(2)
        full = {
            "before": numbers(7, device=device),
            "big": torch.arange(25_000_003, dtype=torch.int32, device=device),
            "after": numbers(5, dtype=torch.bfloat16, device=device),
        }
        mine = {k: target(t, line, [S(0)], meta=True) for k, t in full.items()}
        judged(_given(rank, full), mine, device)
        for key, tensor in full.items():
            assert_landed(mine[key], tensor, line, [S(0)], key)

    @pytest.mark.law("values")
    @pytest.mark.world(3)
    def test_targets_may_differ_by_rank(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """Each rank's keys, in its own order, get their values; others need not have them."""
        line = mesh(3)
        full = {k: numbers(6, 3, salt=i, device=device) for i, k in enumerate("abcd")}
        mine: dict[str, Any] = {k: target(full[k], line, [S(0)]) for k in ("ab", "ba", "ab")[rank]}
        own = ("", "c", "d")[rank]
        if own:
            mine[own] = blank(full[own])
        order = list(mine)
        judged(_given(rank, full), mine, device)
        assert list(mine) == order, f"keys {list(mine)}, expected {order}"
        for key in "ab":
            assert_landed(mine[key], full[key], line, [S(0)], key)
        if own:
            assert_same(mine[own], full[own], own)


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastStateDictStructure:
    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
    @pytest.mark.thorough(but=["w1-lenient", "w2-strict", "w2-lenient"])
    def test_strict_removes_keys_that_the_source_lacks(
        self, judged: Any, mesh: Any, world: Any, device: torch.device, strict: bool
    ) -> None:
        """Keys that the full dict lacks go with `strict`, and stay as they are without it."""
        line = mesh(world.size)
        full: dict[str, Any] = {
            "w": numbers(5, 3, device=device),
            "n": 3,
            "bias": numbers(3, device=device),
        }
        mine: dict[str, Any] = {
            "own.tensor": numbers(2, device=device),
            "w": target(full["w"], line, [S(0)]),
            "own.rows": target(full["w"], line, [S(0)]),
            "own.number": 7,
            "n": 0,
            "bias": None,
        }
        before = {key: fingerprint(value) for key, value in mine.items() if "own" in key}
        judged(_given(world.rank, full), mine, device, strict=strict)
        if strict:
            assert list(mine) == ["w", "n", "bias"], f"keys {list(mine)}, expected w, n and bias"
        else:
            assert list(mine) == ["own.tensor", "w", "own.rows", "own.number", "n", "bias"]
            for key, print_ in before.items():
                assert fingerprint(mine[key]) == print_, f"{key} has changed"
        assert_landed(mine["w"], full["w"], line, [S(0)], "w")
        assert mine["n"] == 3
        assert mine["bias"] is None

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
    @pytest.mark.parametrize("offload", [True, False], ids=["offload", "stay"])
    @pytest.mark.thorough(but=["offload-strict"])
    def test_no_key_is_added(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, strict: bool, offload: bool
    ) -> None:
        """A key that the target lacks is left out, a tensor or not, `cpu_offload` or not."""
        line = mesh(2)
        full: dict[str, Any] = {
            "first": numbers(4, device=device),
            "w": numbers(5, 3, device=device),
            "scalar": numbers(),
            "number": 3,
            "last": numbers(4, device=device),
        }
        mine = {"w": target(full["w"], line, [S(0)])}
        judged(_given(rank, full), mine, device, strict=strict, cpu_offload=offload)
        assert list(mine) == ["w"], f"keys {list(mine)}, expected w"
        assert_landed(mine["w"], full["w"], line, [S(0)], "w")

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_cpu_offload_with_a_key_that_one_rank_lacks(
        self, judged: Any, rank: int, device: torch.device
    ) -> None:
        """With `cpu_offload` each rank gets CPU tensors for the keys that it has."""
        full: dict[str, Any] = {k: numbers(5, 3, device=device, salt=ord(k)) for k in "ab"}
        mine = {k: blank(full[k]) for k in ("ab", "b")[rank]}
        judged(_given(rank, full), mine, device, cpu_offload=True)
        assert list(mine) == list(("ab", "b")[rank]), f"keys {list(mine)}"
        for key, value in mine.items():
            assert_same(value, full[key].cpu(), key)
            assert value.device.type == "cpu", f"{key}: on {value.device}"

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @ON_META
    @pytest.mark.thorough(but=["meta"])
    def test_cpu_offload_leaves_cpu_tensors(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, meta: bool
    ) -> None:
        """With `cpu_offload` what lands is in CPU memory: DTensors, plain tensors, 0-dim ones."""
        line = mesh(2)
        full: dict[str, Any] = {k: numbers(5, 3, device=device) for k in ("rows", "whole", "plain")}
        full |= {"step": numbers(device=device, salt=2), "n": 3}
        places = {"rows": S(0), "whole": R}
        mine: dict[str, Any] = {k: target(full[k], line, [p], meta=meta) for k, p in places.items()}
        mine |= {"plain": blank(full["plain"]), "step": blank(full["step"]), "n": 0}
        judged(_given(rank, full), mine, device, cpu_offload=True)
        for key, place in places.items():
            assert_landed(mine[key], full[key], line, [place], key)
        assert_same(mine["plain"], full["plain"].cpu(), "plain")
        assert_same(mine["step"], full["step"].cpu(), "step")
        for key in ("rows", "whole", "plain", "step"):
            assert local(mine[key]).device.type == "cpu", f"{key}: on {local(mine[key]).device}"
        assert mine["n"] == 3

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("kind", ["sharded", "plain", "0-dim"])
    def test_a_meta_target_gives_the_dtype(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, kind: str
    ) -> None:
        """A meta target materialises with its own dtype, not the source's."""
        line = mesh(2)
        tensor = numbers(*(() if kind == "0-dim" else (5, 3)), device=device, salt=2)
        mine: dict[str, Any] = {"w": torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta")}
        if kind == "sharded":
            mine["w"] = target(tensor, line, [S(0)], dtype=torch.bfloat16, meta=True)
        judged(_given(rank, {"w": tensor}), mine, device)
        if kind == "sharded":
            assert_landed(mine["w"], tensor.to(torch.bfloat16), line, [S(0)], "w")
        else:
            assert_same(mine["w"], tensor.to(torch.bfloat16), "w")

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @ON_META
    @pytest.mark.parametrize("kind", ["sharded", "whole", "plain"])
    @pytest.mark.thorough(but=["plain-real"])
    def test_tied_targets_stay_tied(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, kind: str, meta: bool
    ) -> None:
        """What shares memory under several keys must share it still; its twin must stay apart."""
        line = mesh(2)
        tensor = numbers(6, 3, device=device)

        def make() -> Any:
            if kind == "plain":
                return torch.empty(6, 3, device="meta") if meta else blank(tensor)
            return target(tensor, line, [S(0) if kind == "sharded" else R], meta=meta)

        tied = make()
        mine = {"a": tied, "b": tied, "view": tied.detach(), "twin": make()}
        full = dict.fromkeys(("a", "b", "view"), tensor) | {"twin": tensor.clone()}
        judged(_given(rank, full), mine, device)
        for key, value in mine.items():
            if kind == "plain":
                assert_same(value, tensor, key)
            else:
                assert_landed(value, tensor, line, [S(0) if kind == "sharded" else R], key)
        a, b, view, twin = (local(value).data_ptr() for value in mine.values())
        assert a == b == view, "a, b and view have come apart"
        assert a != twin, "a and twin have become one"

    @pytest.mark.law("structure")
    @pytest.mark.should(IDENTITY)
    @pytest.mark.world(2)
    @pytest.mark.parametrize("placement", [S(0), R], ids=str)
    def test_a_dtensor_stays_the_object_that_it_was(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, placement: Any
    ) -> None:
        """A DTensor with memory must stay the same object, also beside a tie and a view of it."""
        line = mesh(2)
        tensor = numbers(6, 3, device=device)
        tied = target(tensor, line, [placement])
        given = {"a": tied, "b": tied, "view": tied.detach()}
        mine = dict(given)
        judged(_given(rank, dict.fromkeys(given, tensor)), mine, device)
        for key, value in mine.items():
            assert value is given[key], f"{key}: another DTensor, expected the one that was there"

    @pytest.mark.law("structure")
    @pytest.mark.should(STRIDES)
    @pytest.mark.world(2)
    def test_channels_last_survives(self, judged: Any, rank: int, device: torch.device) -> None:
        """A channels_last tensor lands right, and as channels_last, in such a target."""
        image = numbers(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
        mine = {"w": blank(image).to(memory_format=torch.channels_last)}
        judged(_given(rank, {"w": image}), mine, device)
        assert_same(mine["w"], image, "w")
        got, expected = mine["w"].stride(), image.stride()
        assert got == expected, f"strides {got}, expected {expected}"

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_an_empty_full_dict(self, judged: Any, device: torch.device) -> None:
        """From an empty full dict nothing lands, and `strict` leaves nothing."""
        mine = {"w": numbers(3, device=device)}
        kept = mine["w"]
        judged({}, mine, device)
        assert list(mine) == ["w"]
        assert mine["w"] is kept
        judged({}, mine, device, strict=True)
        assert mine == {}, f"keys {list(mine)}"
