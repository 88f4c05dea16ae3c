"""Many small tensors that are laid out alike: an implementation may move them together.

What moves together must come apart again: each tensor with its own values, in memory of its own,
whatever lies beside it, on ranks that hold the keys in another order, and in more than one piece.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from conformance.kit.compare import assert_same, local
from conformance.kit.data import SOME_DTYPES, VIEWS, dtype_id, numbers
from conformance.kit.landing import assert_landed, blank, target
from conformance.kit.layouts import ONE_D, TWO_D, R, S, dtensor, part, placement_id

EACH_DEPTH = pytest.mark.parametrize("all_placements", [ONE_D, TWO_D], ids=["1-D", "2-D"])
EACH_RUN = pytest.mark.thorough(
    but=["float32-1-D", "bool-1-D", "float8_e4m3fn-2-D", "complex64-2-D"]
)
EACH_DTYPE = pytest.mark.parametrize("dtype", [*SOME_DTYPES, torch.float8_e4m3fn], ids=dtype_id)

SHAPES = [(8, 12), (5, 3), (16,)]
"""Cut evenly, unevenly or not at all, by placement."""

ALIKE = 10
"""Tensors of each layout: an implementation may treat a few as if they were none."""

FILLING = 400
"""Tensors of 48 KiB that fill more than a bucket of any sensible size."""


def turned(keys: list[str], rank: int) -> list[str]:
    """The same keys in an order that differs from rank to rank."""
    at = rank * 7 % len(keys)
    return keys[at:] + keys[:at]


def interleaved(all_placements: Any, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, Any]]:
    """Key -> (full tensor, placements): neighbours of different layouts, all values different."""
    found: dict[str, tuple[torch.Tensor, Any]] = {}
    for number in range(ALIKE):
        for placements in all_placements:
            for shape in SHAPES:
                if any(getattr(p, "dim", 0) >= len(shape) for p in placements):
                    continue
                full = numbers(*shape, dtype=dtype, salt=len(found))
                found[f"{number} {placement_id(placements)} {shape}"] = full, placements
    return found


def assert_apart(tensors: dict[str, torch.Tensor]) -> None:
    """No tensor shares memory with another, or keeps more alive than it is."""
    addresses: dict[int, str] = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage()
        assert storage.nbytes() == tensor.nbytes, f"{key}: {storage.nbytes()} bytes are kept alive"
        other = addresses.setdefault(storage.data_ptr(), key)
        assert other == key, f"{key} shares its memory with {other}"


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherManyAlike:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @EACH_DEPTH
    @EACH_DTYPE
    @EACH_RUN
    @pytest.mark.thorough(but=["complex64-2-D", "float8_e4m3fn-2-D"])
    def test_layouts_side_by_side(
        self, judged: Any, mesh: Any, all_placements: Any, dtype: torch.dtype
    ) -> None:
        """Tensors of many layouts, each with others like it, come back under their own keys."""
        over = mesh(*(4,) if all_placements is ONE_D else (2, 2))
        cases = interleaved(all_placements, dtype)
        got = judged({key: dtensor(full, over, p) for key, (full, p) in cases.items()})
        assert list(got) == list(cases)
        for key, (full, _) in cases.items():
            assert_same(got[key], full, key)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(4)
    def test_keys_in_another_order_on_each_rank(self, judged: Any, mesh: Any, rank: int) -> None:
        """Of tensors that only their keys tell apart each rank gets the right one."""
        line = mesh(4)
        fulls = {f"w{n}": numbers(8, 6, salt=n) for n in range(20)}
        order = turned(list(fulls), rank)
        got = judged({key: dtensor(fulls[key], line, [S(0)]) for key in order})
        assert list(got) == order, f"keys {list(got)}, expected {order}"
        for key, full in fulls.items():
            assert_same(got[key], full, key)

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("placements", [[R], [S(0)], [S(1)]], ids=placement_id)
    @pytest.mark.thorough(but=["R", "S0"])
    def test_results_are_apart(self, judged: Any, mesh: Any, placements: Any) -> None:
        """Each result has memory of its own, and no more than it needs."""
        fulls = {f"w{n}": numbers(8, 6, salt=n) for n in range(20)}
        got = judged({key: dtensor(full, mesh(2), placements) for key, full in fulls.items()})
        assert_apart(got)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_more_than_a_bucket(self, judged: Any, mesh: Any) -> None:
        """Tensors that do not fit into one message come back whole, those at its end as well."""
        line = mesh(4)
        fulls = {f"w{n}": numbers(128, 96, salt=n) for n in range(FILLING)}
        uneven = {f"u{n}": numbers(7, 3, salt=n) for n in range(ALIKE)}
        got = judged({k: dtensor(full, line, [S(0)]) for k, full in (fulls | uneven).items()})
        for key, full in (fulls | uneven).items():
            assert_same(got[key], full, key)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("view", [name for name in VIEWS if name != "expanded"])
    @pytest.mark.thorough(but=["transposed", "offset"])
    def test_one_is_laid_out_otherwise(self, judged: Any, mesh: Any, rank: int, view: str) -> None:
        """On one rank one tensor of many is a view of other memory: no value is misplaced."""
        line = mesh(2)
        fulls = {f"w{n}": numbers(8, 6, salt=n) for n in range(9)}
        given = {}
        for key, full in fulls.items():
            mine = part(full, line, [S(0)]).clone()
            if key == "w4" and rank == 1:
                mine = VIEWS[view](mine)
            given[key] = dtensor(full, line, [S(0)], local=mine)
        got = judged(given)
        for key, full in fulls.items():
            assert_same(got[key], full, key)


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastManyAlike:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @EACH_DEPTH
    @EACH_DTYPE
    @EACH_RUN
    @pytest.mark.thorough(but=["complex64-2-D", "float8_e4m3fn-2-D"])
    def test_layouts_side_by_side(
        self,
        judged: Any,
        mesh: Any,
        rank: int,
        device: torch.device,
        all_placements: Any,
        dtype: torch.dtype,
    ) -> None:
        """Tensors that are needed in many ways, each with others like it, land under their keys."""
        over = mesh(*(4,) if all_placements is ONE_D else (2, 2))
        cases = interleaved(all_placements, dtype)
        full = {key: tensor.to(device) for key, (tensor, _) in cases.items()}
        mine: dict[str, Any] = {
            key: target(full[key], over, cases[key][1]) for key in turned(list(cases), rank)
        }
        judged(full if rank == 0 else {}, mine, device)
        for key, (tensor, placements) in cases.items():
            assert_landed(mine[key], tensor.to(device), over, placements, key)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("view", VIEWS)
    @pytest.mark.thorough(but=["contiguous", "transposed", "sliced", "expanded"])
    def test_sources_and_targets_of_any_strides(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, view: str
    ) -> None:
        """Full tensors and targets that are views of other memory must be read and filled right."""
        line = mesh(2)
        full = {f"w{n}": numbers(8, 6, salt=n).to(device) for n in range(9)}
        full["w3"] = VIEWS[view](full["w3"])
        mine: dict[str, Any] = {key: target(tensor, line, [S(0)]) for key, tensor in full.items()}
        if view != "expanded":
            odd = VIEWS[view](part(torch.zeros_like(full["w5"]), line, [S(0)]))
            mine["w5"] = dtensor(full["w5"], line, [S(0)], local=odd)
        judged(full if rank == 0 else {}, mine, device)
        for key, tensor in full.items():
            assert_landed(mine[key], tensor, line, [S(0)], key)

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "plain"])
    def test_new_targets_are_apart(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, sharded: bool
    ) -> None:
        """What is made for targets on meta has memory of its own, and no more than it needs."""
        full = {f"w{n}": numbers(8, 6, salt=n).to(device) for n in range(20)}
        bare = {key: tensor.to("meta") for key, tensor in full.items()}
        mine: dict[str, Any] = dict(bare)
        if sharded:
            mine = {key: target(tensor, mesh(2), [S(0)]) for key, tensor in bare.items()}
        judged(full if rank == 0 else {}, mine, device)
        for key, tensor in full.items():
            if sharded:
                assert_landed(mine[key], tensor, mesh(2), [S(0)], key)
            else:
                assert_same(mine[key], tensor, key)
        assert_apart({k: t._local_tensor if sharded else t for k, t in mine.items()})

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_more_than_a_bucket(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """Tensors that do not fit into one message land whole, sharded and plain ones beside."""
        line = mesh(4)
        full = {f"w{n}": numbers(128, 96, salt=n).to(device) for n in range(FILLING)}
        full |= {f"u{n}": numbers(7, 3, salt=n).to(device) for n in range(ALIKE)}
        full |= {f"p{n}": numbers(7, 3, salt=n).to(device) for n in range(ALIKE)}
        mine: dict[str, Any] = {
            key: blank(tensor) if key[0] == "p" else target(tensor, line, [S(0)])
            for key, tensor in full.items()
        }
        judged(full if rank == 0 else {}, mine, device)
        for key, tensor in full.items():
            if key[0] == "p":
                assert_same(mine[key], tensor, key)
            else:
                assert_landed(mine[key], tensor, line, [S(0)], key)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_a_source_on_the_cpu(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """Whole tensors that the source holds on the CPU land on the device of the targets."""
        line = mesh(4)
        sizes = {"w": (128, 96), "u": (7, 3), "v": (16,)}
        full = {
            f"{kind}{n}": numbers(*size, salt=n, device="cpu")
            for kind, size in sizes.items()
            for n in range(FILLING if kind == "w" else ALIKE)
        }
        mine = {key: target(tensor.to(device), line, [S(0)]) for key, tensor in full.items()}
        judged(full if rank == 0 else {}, mine, device)
        for key, tensor in full.items():
            assert_landed(mine[key], tensor, line, [S(0)], key)
            assert mine[key].device.type == device.type, f"{key}: on {mine[key].device}"


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeManyAlike:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @EACH_DEPTH
    @EACH_DTYPE
    @EACH_RUN
    @pytest.mark.thorough(but=["bool-1-D"])
    def test_layouts_side_by_side(
        self,
        judged: Any,
        mesh: Any,
        device: torch.device,
        all_placements: Any,
        dtype: torch.dtype,
    ) -> None:
        """Tensors that are cut in many ways, each with others like it, land under their keys."""
        over = mesh(*(4,) if all_placements is ONE_D else (2, 2))
        cases = interleaved(all_placements, dtype)
        full = {key: tensor.to(device) for key, (tensor, _) in cases.items()}
        mine: dict[str, Any] = {k: target(full[k], over, p) for k, (_, p) in cases.items()}
        judged(full, mine, device)
        for key, (tensor, placements) in cases.items():
            assert_landed(mine[key], tensor.to(device), over, placements, key)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("view", VIEWS)
    @pytest.mark.thorough(but=["transposed", "expanded"])
    def test_full_tensors_of_any_strides(
        self, judged: Any, mesh: Any, device: torch.device, view: str
    ) -> None:
        """Full tensors that are views of other memory must land as their values say."""
        line = mesh(2)
        full = {f"w{n}": numbers(8, 6, salt=n).to(device) for n in range(9)}
        full["w3"] = VIEWS[view](full["w3"])
        mine: dict[str, Any] = {key: target(tensor, line, [S(0)]) for key, tensor in full.items()}
        judged(full, mine, device)
        for key, tensor in full.items():
            assert_landed(mine[key], tensor, line, [S(0)], key)

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("placements", [[R], [S(0)], [S(1)]], ids=placement_id)
    @pytest.mark.thorough(but=["S1"])
    def test_results_are_apart(
        self, judged: Any, mesh: Any, device: torch.device, placements: Any
    ) -> None:
        """Each of a hundred has its own values, and memory of its own, no more than it needs."""
        full = {f"w{n}": numbers(8, 6, salt=n).to(device) for n in range(100)}
        mine: dict[str, Any] = {
            key: target(tensor, mesh(2), placements) for key, tensor in full.items()
        }
        judged(full, mine, device)
        for key, tensor in full.items():
            assert_landed(mine[key], tensor, mesh(2), placements, key)
        assert_apart({key: tensor._local_tensor for key, tensor in mine.items()})


def many_kinds(mesh: Any, salt: int = 0) -> dict[str, Any]:
    """Small tensors of several dtypes, shapes, strides and kinds, each with others like it."""
    found: dict[str, Any] = {}
    for number in range(ALIKE):
        for dtype in SOME_DTYPES:
            for shape in [*SHAPES, ()]:
                full = numbers(*shape, dtype=dtype, salt=salt + len(found))
                found[f"{number} {dtype_id(dtype)} {shape}"] = full
                placements = [S(0)] if shape else [R]
                found[f"{number} {dtype_id(dtype)} {shape} DTensor"] = dtensor(
                    full, mesh, placements
                )
        for view in ("transposed", "offset", "sliced"):
            found[f"{number} {view}"] = VIEWS[view](numbers(8, 12, salt=salt + len(found)))
        found[f"{number} Parameter"] = torch.nn.Parameter(numbers(5, 3, salt=salt + len(found)))
    return found


@pytest.mark.judges("_state_dict_utils._offload_state_dict_to_cpu")
class TestOffloadManyAlike:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_kinds_side_by_side(self, judged: Any, mesh: Any) -> None:
        """Of many small tensors each snapshot has its own values and kind, on the CPU."""
        given = many_kinds(mesh(2))
        got = judged(given)
        assert list(got) == list(given)
        for key, value in given.items():
            assert type(got[key]) is type(value), f"{key}: a {type(got[key]).__name__}"
            assert local(got[key]).device.type == "cpu", f"{key}: on {local(got[key]).device}"
            assert_same(local(got[key]).detach(), local(value).detach(), key)


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestCopyManyAlike:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("non_blocking", [False, True], ids=["blocking", "non-blocking"])
    @pytest.mark.thorough(but=["non-blocking"])
    def test_kinds_side_by_side(self, judged: Any, mesh: Any, non_blocking: bool) -> None:
        """Each of many small tensors lands in its own target, which keeps its memory."""
        given, other = many_kinds(mesh(2)), many_kinds(mesh(2), salt=1)
        targets = {
            key: dtensor(
                numbers(*value.shape, dtype=value.dtype, salt=3), mesh(2), value.placements
            )
            if isinstance(value, DTensor)
            else torch.zeros_like(value, device="cpu")
            for key, value in other.items()
        }
        addresses = {key: local(value).data_ptr() for key, value in targets.items()}
        got = judged(given, targets, non_blocking=non_blocking)
        if non_blocking and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        for key, value in given.items():
            assert got[key] is targets[key], f"{key}: not the target"
            assert local(targets[key]).data_ptr() == addresses[key], f"{key}: in other memory"
            assert_same(local(targets[key]).detach(), local(value).detach(), key)
