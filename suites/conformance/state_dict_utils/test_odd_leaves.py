"""Leaves that models seldom hold: on meta, placed in ways of their own, over dimensions of one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement
from torch.testing._internal.two_tensor import TwoTensor

from conformance.kit.agree import assert_raises_everywhere, attempt
from conformance.kit.compare import assert_same, local
from conformance.kit.data import numbers
from conformance.kit.landing import assert_landed, blank, target
from conformance.kit.layouts import SS, R, S, dtensor, in_another_order, part
from conformance.kit.refusals import MISSING

KEY = "layer.odd"
FULL = (6, 4)


class Scattered(Placement):
    """A placement that no function of torch knows."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scattered)

    def __hash__(self) -> int:
        return hash(Scattered)


class Refusing(TwoTensor):
    """A wrapper whose class knows no all-gather."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if "all_gather" in str(func):
            raise NotImplementedError(f"no {func}")
        return super().__torch_dispatch__(func, types, args, kwargs)


class Failing(TwoTensor):
    """A wrapper of uneven shards that fails where they are padded."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if "pad" in str(func):
            raise ZeroDivisionError(f"no {func}")
        return super().__torch_dispatch__(func, types, args, kwargs)


class Wordy(TwoTensor):
    """A wrapper that fails where it is padded, with an error of two words."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if "pad" in str(func):
            raise ValueError("the reason", "and the way out")
        return super().__torch_dispatch__(func, types, args, kwargs)


def recording(full: torch.Tensor, mesh: Any, placements: list[Placement]) -> DTensor:
    """A DTensor around a local tensor that requires grad itself, which torch advises against."""
    leaf = dtensor(full, mesh, placements)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DTensor(local(leaf).requires_grad_(), leaf._spec, requires_grad=True)


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherOddLeaves:
    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_on_meta(self, judged: Any, mesh: Any) -> None:
        """A DTensor on meta must come out on meta, whole in shape, beside alike ones with data."""
        full = numbers(5, 3)
        for placement in (S(0), S(1), R):
            alike = dtensor(full, mesh(2), [placement])
            leaf = dtensor(torch.empty(5, 3, device="meta"), mesh(2), [placement])
            for order in (("w", leaf), ("alike", alike)), (("alike", alike), ("w", leaf)):
                got = judged(dict(order))
                assert got["w"].is_meta, f"{placement}: on {got['w'].device}"
                assert tuple(got["w"].shape) == (5, 3), f"{placement}: {tuple(got['w'].shape)}"
                assert_same(got["alike"], full, f"{placement}, beside one on meta")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_shards_in_another_order(self, judged: Any, mesh: Any) -> None:
        """A dimension that is cut by the last mesh dimension first must come out in its order."""
        full = numbers(8, 3)
        usual, leaf = dtensor(full, mesh(2, 2), [S(0), S(0)]), in_another_order(full, mesh(2, 2))
        if leaf is not None:
            got = judged({"usual": usual, "w": leaf, "again": usual})
            for key, whole in got.items():
                assert_same(whole, full, key)

    @pytest.mark.law("autograd")
    @pytest.mark.world(2)
    def test_around_what_records(self, judged: Any, mesh: Any) -> None:
        """A local tensor that requires grad must come out whole, and no graph with it."""
        full = numbers(5, 3)
        given = {str(p): recording(full, mesh(2), [p]) for p in (S(0), R)}
        for key, got in judged(given).items():
            assert got.grad_fn is None, f"{key}: {got.grad_fn}"
            assert_same(got, full, key)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=30)
    @pytest.mark.parametrize("at", [0, 1, None], ids=str)
    @pytest.mark.thorough(but=["1", "None"])
    def test_a_placement_of_its_own(
        self, judged: Any, mesh: Any, world: Any, at: int | None
    ) -> None:
        """A placement that nobody knows how to gather must be refused by name on each rank."""
        leaf = dtensor(numbers(*FULL), mesh(2), [S(0)])
        if at in (None, world.rank):
            leaf._spec.placements = (Scattered(),)
        value = {"fine": dtensor(numbers(4), mesh(2), [S(0)]), KEY: leaf}
        assert_raises_everywhere(world, partial(judged, value), KEY, kinds=MISSING)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=30)
    def test_a_class_that_refuses(self, judged: Any, mesh: Any, world: Any) -> None:
        """A wrapper that its class cannot gather must be refused by name on each rank."""
        mine = part(numbers(*FULL), mesh(2), [S(0)]).clone()
        leaf = dtensor(numbers(*FULL), mesh(2), [S(0)], local=Refusing(mine, mine.clone()))
        value = {"fine": dtensor(numbers(4), mesh(2), [S(0)]), KEY: leaf}
        assert_raises_everywhere(world, partial(judged, value), KEY, kinds=MISSING)
        assert_same(judged({"fine": value["fine"]})["fine"], numbers(4), "after the error")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=30)
    @pytest.mark.parametrize("at", [1, None], ids=str)
    def test_a_class_that_fails_in_its_own_way(
        self, judged: Any, mesh: Any, world: Any, at: int | None
    ) -> None:
        """An error of the rank whose shard is padded must be told on each, with the name."""
        mine = part(numbers(7, 4), mesh(2), [S(0)]).clone()
        kind = Failing if at in (None, world.rank) else TwoTensor
        leaf = dtensor(numbers(7, 4), mesh(2), [S(0)], local=kind(mine, mine.clone()))
        assert_raises_everywhere(world, partial(judged, {KEY: leaf}), KEY, kinds=MISSING)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=30)
    def test_all_that_a_class_says(self, judged: Any, mesh: Any, world: Any) -> None:
        """Of an error that says several things all must be told on each rank."""
        mine = part(numbers(7, 4), mesh(2), [S(0)]).clone()
        kind = Wordy if world.rank else TwoTensor
        leaf = dtensor(numbers(7, 4), mesh(2), [S(0)], local=kind(mine, mine.clone()))
        error = attempt(lambda: judged({KEY: leaf}))
        for words in (KEY, "the reason", "the way out"):
            assert words in str(error), f"{words!r} is not in {error!r}"

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_tied_wrappers(self, judged: Any, mesh: Any) -> None:
        """DTensors around the same wrapper must come out tied, and others apart."""
        mine = part(numbers(*FULL), mesh(2), [S(0)]).clone()
        held = [TwoTensor(mine, mine.clone()) for _ in range(2)]
        value = {
            str(n): dtensor(numbers(*FULL), mesh(2), [S(0)], local=held[n // 2]) for n in range(3)
        }
        got = judged(value)
        assert got["0"] is got["1"], "tied ones came apart"
        assert got["0"] is not got["2"], "others are tied"

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_without_elements(self, judged: Any, mesh: Any) -> None:
        """Tensors of which no rank has an element must not be taken for tied."""
        shapes = {"one": (1, 3), "first": (0, 3), "second": (0, 3)}
        got = judged({k: dtensor(numbers(*s), mesh(2), [S(0)]) for k, s in shapes.items()})
        assert {key: tuple(whole.shape) for key, whole in got.items()} == shapes
        assert got["first"] is not got["second"]

    @pytest.mark.law("symmetry")
    @pytest.mark.world(4, collective=8, limit=30)
    def test_reductions_without_an_order(self, judged: Any, mesh: Any, world: Any) -> None:
        """Different pending reductions over two dimensions must be refused: they do not commute."""
        leaf = dtensor(numbers(4), mesh(2, 2), [Partial("sum"), Partial("sum")])
        leaf._spec.placements = (Partial("sum"), Partial("max"))  # torch makes no such DTensor
        assert_raises_everywhere(world, partial(judged, {KEY: leaf}), KEY, kinds=MISSING)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=30)
    def test_a_reduction_of_no_name(self, judged: Any, mesh: Any, world: Any) -> None:
        """A pending reduction that nobody knows must be refused by name on each rank."""
        leaf = DTensor.from_local(numbers(4), mesh(2), [Partial("median")], run_check=False)
        assert_raises_everywhere(world, partial(judged, {KEY: leaf}), KEY, kinds=MISSING)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_a_sum_of_short_complex_numbers(self, judged: Any, mesh: Any) -> None:
        """A pending sum of complex32 must come out as the sum that the dtype can hold."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the dtype
            mine = torch.tensor([1 + 2j, 3j, 0.5], dtype=torch.complex32)
        leaf = DTensor.from_local(mine, mesh(2), [Partial("sum")], run_check=False)
        expected = torch.tensor([2 + 4j, 6j, 1], dtype=torch.complex64).to(torch.complex32)
        assert_same(judged({"w": leaf})["w"], expected)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_dimensions_of_one(self, judged: Any, mesh: Any) -> None:
        """Over mesh dimensions of one rank nothing is cut, and nothing is pending."""
        full = numbers(8, 3)
        cases: list[list[Placement]] = [
            [Partial("sum"), S(0)],
            [S(0), R],
            [SS(0, 2), S(0)],
            [SS(0, 2), S(1)],
            [SS(0, 4), R],
            [Partial("avg"), Partial("sum")],
        ]
        for placements in cases:
            mine = part(full, mesh(1, 2), [R if p.is_partial() else p for p in placements]).clone()
            leaf = dtensor(full, mesh(1, 2), placements, local=mine)
            whole = full * 2 if placements[1].is_partial() else full
            assert_same(judged({"w": leaf})["w"], whole, f"{placements}")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=30)
    @pytest.mark.parametrize("at", [0, 1, None], ids=str)
    @pytest.mark.thorough(but=["1", "None"])
    def test_several_that_are_wrong(
        self, judged: Any, mesh: Any, world: Any, at: int | None
    ) -> None:
        """Of several leaves that are wrong on a rank one must be named, the same on each rank."""
        value = {f"layer.{n}": dtensor(numbers(*FULL), mesh(2), [S(0)]) for n in range(3)}
        if at in (None, world.rank):
            for leaf in list(value.values())[1:]:
                leaf._local_tensor = numbers(1, 4)
        assert_raises_everywhere(world, partial(judged, value), "layer.1", kinds=MISSING)


def _assert_each_order_lands(
    square: DeviceMesh, full: torch.Tensor, load: Callable[[Any, Any], Any]
) -> None:
    """Targets of the same placements that are cut in another order lie side by side."""
    leaf, expected = in_another_order(blank(full), square), in_another_order(full, square)
    if leaf is None or expected is None:
        return
    into = {"usual": target(full, square, [S(0), S(0)]), "w": leaf}
    into["again"] = target(full, square, [S(0), S(0)])
    load(dict.fromkeys(into, full), into)
    assert_same(local(into["w"]), local(expected), "w")
    for key in ("usual", "again"):
        assert_landed(into[key], full, square, [S(0), S(0)], key)


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeOddLeaves:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_shards_in_another_order(self, judged: Any, mesh: Any, device: torch.device) -> None:
        """A target that is cut by the last mesh dimension first must take its own rows."""
        full = numbers(8, 3, device=device)
        _assert_each_order_lands(mesh(2, 2), full, lambda given, into: judged(given, into, device))


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastOddLeaves:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_shards_in_another_order(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """A target that is cut by the last mesh dimension first must take its own rows."""
        full = numbers(8, 3, device=device)
        _assert_each_order_lands(
            mesh(2, 2), full, lambda given, into: judged(given if rank == 0 else {}, into, device)
        )

    @pytest.mark.law("autograd")
    @pytest.mark.world(2)
    def test_into_what_records(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """A local tensor that requires grad must take its part, in its memory, and no graph."""
        full = numbers(5, 3, device=device)
        mine = {str(p): recording(blank(full), mesh(2), [p]) for p in (S(0), R)}
        held = {key: local(value).detach() for key, value in mine.items()}
        judged(dict.fromkeys(mine, full) if rank == 0 else {}, mine, device)
        for placement in (S(0), R):
            key = str(placement)
            assert_same(held[key], part(full, mesh(2), [placement]), key)
            assert local(mine[key]).grad_fn is None, key

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_dimensions_of_one(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """Over mesh dimensions of one rank nothing is cut."""
        full = numbers(8, 6, device=device)
        cases = [[SS(0, 2), S(0)], [SS(0, 2), S(1)], [SS(0, 4), R], [S(1), SS(0, 2)]]
        mine = {str(n): target(full, mesh(1, 2), case) for n, case in enumerate(cases)}
        judged(dict.fromkeys(mine, full) if rank == 0 else {}, mine, device)
        for n, case in enumerate(cases):
            assert_landed(mine[str(n)], full, mesh(1, 2), case, f"{case}")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(3)
    def test_plain_targets_of_another_shape(
        self, judged: Any, rank: int, device: torch.device
    ) -> None:
        """A shape that modules adapt must not be refused where ranks hold different keys."""
        full = {"w": numbers(*FULL, device=device), "b": numbers(3, device=device)}
        mine: dict[str, Any] = {"b": blank(full["b"])} if rank else {}
        if rank < 2:
            mine["w"] = blank(full["w"].t().contiguous())
        judged(full if rank == 0 else {}, mine, device)
        for key in mine:
            assert_same(mine[key], full[key], f"{key} on rank {rank}")

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize(
        ("dtype", "other"),
        [
            (torch.float8_e4m3fn, torch.float32),
            (torch.float8_e4m3fn, torch.float8_e5m2),
            (torch.uint16, torch.int64),
        ],
        ids=str,
    )
    def test_a_dtype_that_is_sent_as_bytes_lands_in_another(
        self,
        judged: Any,
        mesh: Any,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
        other: torch.dtype,
    ) -> None:
        """Values must be converted, where their bytes travel in parts, too."""
        full = {
            "few": numbers(6, 4, dtype=dtype, device=device),
            "many": numbers(1023, 640, dtype=dtype, device=device),
        }
        mine = {key: target(value, mesh(2), [S(0)], dtype=other) for key, value in full.items()}
        judged(full if rank == 0 else {}, mine, device)
        for key, value in full.items():
            assert_same(local(mine[key]), part(value.to(other), mesh(2), [S(0)]), key)
