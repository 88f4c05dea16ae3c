"""How many collectives each kind of leaf takes: as many for forty tensors as for eight.

A collective for each tensor of one kind is 64 times slower than one for all, for small tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial

from conformance.kit.collectives import Collectives
from conformance.kit.containers import dashed
from conformance.kit.data import DTYPES, SOME_DTYPES, numbers
from conformance.kit.growth import Model
from conformance.kit.landing import target
from conformance.kit.layouts import SS, R, S, dtensor, part, rows, sharded_tensor

FEW, MANY = 8, 40

Leaf = Callable[[int, Any], Any]


def _pending(op: str) -> Leaf:
    return lambda i, mesh: DTensor.from_local(
        numbers(8, 2, salt=i), mesh(4), [Partial(op)], run_check=False
    )


def _transposed(i: int, mesh: Any) -> DTensor:
    full = numbers(8, 4, salt=i)
    here = part(full, mesh(4), [S(0)])
    return dtensor(full, mesh(4), [S(0)], local=here.t().contiguous().t())


# Name -> the i-th leaf of that kind, over four ranks. `mesh` is the fixture.
KINDS: dict[str, Leaf] = {
    **{f"pending {op}": _pending(op) for op in ("sum", "avg", "max", "min")},
    "pending sum and average": lambda i, mesh: _pending("sum" if i % 2 else "avg")(i, mesh),
    "pending and sharded": lambda i, mesh: DTensor.from_local(
        numbers(4, 2, salt=i), mesh(2, 2), [Partial(), S(0)], run_check=False
    ),
    "pending twice": lambda i, mesh: DTensor.from_local(
        numbers(4, 2, salt=i), mesh(2, 2), [Partial(), Partial()], run_check=False
    ),
    "pending bfloat16": lambda i, mesh: DTensor.from_local(
        numbers(4, dtype=torch.bfloat16, salt=i), mesh(4), [Partial()], run_check=False
    ),
    "columns": lambda i, mesh: dtensor(numbers(3, 8, salt=i), mesh(4), [S(1)]),
    "uneven": lambda i, mesh: dtensor(numbers(7, 2, salt=i), mesh(4), [S(0)]),
    "empty shards": lambda i, mesh: dtensor(numbers(2, 3, salt=i), mesh(4), [S(0)]),
    "no elements": lambda _, mesh: dtensor(numbers(0, 3), mesh(4), [S(0)]),
    "transposed shards": _transposed,
    "FSDP over TP": lambda i, mesh: dtensor(numbers(8, 2, salt=i), mesh(2, 2), [SS(0, 2), S(0)]),
    "grid": lambda i, mesh: dtensor(numbers(5, 3, salt=i), mesh(2, 2), [S(0), S(1)]),
    "HSDP": lambda i, mesh: dtensor(numbers(5, 3, salt=i), mesh(2, 2), [R, S(0)]),
    "replicas": lambda i, mesh: dtensor(numbers(5, 3, salt=i), mesh(4), [R]),
    "dtypes": lambda i, mesh: dtensor(
        numbers(8, dtype=SOME_DTYPES[i % len(SOME_DTYPES)], salt=i), mesh(4), [S(0)]
    ),
    "each of another shape": lambda i, mesh: dtensor(numbers(i + 1, 3, salt=i), mesh(4), [S(0)]),
    "several meshes": lambda i, mesh: [
        lambda: dtensor(numbers(8, 2, salt=i), mesh(4), [S(0)]),
        lambda: dtensor(numbers(8, 2, salt=i), mesh(2, 2), [S(0), S(1)]),
        lambda: dtensor(numbers(8, 2, salt=i), mesh(2, 2)["tp"], [S(0)]),
        lambda: dtensor(numbers(8, 2, salt=i), mesh(2, 2)["dp"], [R]),
    ][i % 4](),
    "parameters": lambda i, mesh: nn.Parameter(dtensor(numbers(8, 2, salt=i), mesh(4), [S(0)])),
    "kinds in turn": lambda i, mesh: [
        lambda: dtensor(numbers(8, 2, salt=i), mesh(4), [S(0)]),
        lambda: _pending("sum")(i, mesh),
        lambda: numbers(8, 2, salt=i),
        lambda: i,
        lambda: dtensor(numbers(8, 2, salt=i), mesh(4), [R]),
        lambda: dtensor(numbers(5, 2, salt=i), mesh(4), [S(0)]),
    ][i % 6](),
    "ShardedTensor in uneven shards": lambda i, _: sharded_tensor(
        numbers(8, 2, salt=i), rows((8, 2), [1, 4, 0, 3])
    ),
    "ShardedTensor on one rank": lambda i, _: sharded_tensor(
        numbers(8, 2, salt=i), rows((8, 2), [8], [i % 4])
    ),
    "ShardedTensor in columns": lambda i, _: sharded_tensor(
        numbers(2, 8, salt=i), rows((2, 8), [2] * 4, dim=1)
    ),
    "ShardedTensor beside DTensor": lambda i, mesh: (
        sharded_tensor(numbers(8, 2, salt=i), rows((8, 2), [2] * 4))
        if i % 2
        else dtensor(numbers(8, 2, salt=i), mesh(4), [S(0)])
    ),
}
KIND_CASES = [pytest.param(make, id=dashed(name)) for name, make in KINDS.items()]


def _assert_as_many(run: Callable[[int], Any], at_least: int = 0) -> None:
    """`run(n)` issues as many collectives for a few tensors as for many."""
    counts = []
    for number in (FEW, MANY):
        with Collectives() as seen:
            run(number)
        counts.append(seen.count)
    said = f"{counts[0]} collectives for {FEW} tensors, {counts[1]} for {MANY}"
    assert counts[0] == counts[1], f"{said}; expected as many"
    assert counts[0] >= at_least, f"{said}; expected some: they were not seen"


def _leaves(make: Any, number: int, mesh: Any) -> Model:
    return {f"k{i}": make(i, mesh) for i in range(number)}


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherCost:
    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("make", KIND_CASES)
    @pytest.mark.thorough(but=["dtypes"])
    def test_every_kind_of_leaf(self, judged: Any, mesh: Any, make: Any) -> None:
        """Forty leaves of any kind must take as many collectives as eight."""
        _assert_as_many(lambda number: judged(_leaves(make, number, mesh)))

    @pytest.mark.law("cost")
    @pytest.mark.should("how many collectives there are is no promise")
    @pytest.mark.world(4)
    def test_few_for_all(self, judged: Any, mesh: Any) -> None:
        """Small leaves of any dtypes must take no more than one to agree and one to move them.

        Uneven ones take one more, and a state dict of which nothing is spread takes none.
        """
        for name, at_most in {"rows": 2, "dtypes": 2, "shapes": 3, "none": 0}.items():
            value = {}
            for n in range(len(DTYPES)):
                dtype = DTYPES[n] if name == "dtypes" else torch.float32
                size = (n + 1, 3) if name == "shapes" else (8, 2)
                full = numbers(*size, dtype=dtype, salt=n)
                value[f"k{n}"] = full if name == "none" else dtensor(full, mesh(4), [S(0)])
            with Collectives() as seen:
                judged(value)
            assert seen.count <= at_most, f"{name}: {dict(seen.names)}, expected {at_most}"

    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    @pytest.mark.parametrize(
        "options",
        [
            "ranks_only",
            *(
                pytest.param(o, marks=pytest.mark.thorough)
                for o in ("two ranks", "cpu_offload", "pg")
            ),
        ],
    )
    @pytest.mark.parametrize(
        "kind",
        [
            *("uneven", "ShardedTensor in uneven shards", "kinds in turn"),
            *(pytest.param(k, marks=pytest.mark.thorough) for k in ("pending sum", "grid")),
        ],
    )
    @pytest.mark.thorough(but=["kinds in turn-ranks_only"])
    def test_every_option(self, judged: Any, mesh: Any, kind: str, options: str) -> None:
        """The same must hold with every option."""
        every: dict[str, dict[str, Any]] = {
            "ranks_only": {"ranks_only": (2,)},
            "two ranks": {"ranks_only": (0, 3)},
            "cpu_offload": {"cpu_offload": True},
            "pg": {"pg": dist.group.WORLD},
        }
        given = every[options]
        _assert_as_many(lambda number: judged(_leaves(KINDS[kind], number, mesh), **given))

    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    def test_in_containers(self, judged: Any, mesh: Any) -> None:
        """Leaves in containers of their own must take as many collectives as beside each other."""

        def run(number: int) -> None:
            make = KINDS["uneven"]
            judged({f"k{i}": [{"w": (make(i, mesh),)}] for i in range(number)})

        _assert_as_many(run, at_least=1)

    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    def test_tied(self, judged: Any, mesh: Any) -> None:
        """Leaves of which each is tied to another must take as many collectives, too."""

        def run(number: int) -> None:
            one = _leaves(KINDS["uneven"], number, mesh)
            judged({"one": one, "two": {name: leaf.detach() for name, leaf in one.items()}})

        _assert_as_many(run, at_least=1)


TARGETS: dict[str, Leaf] = {
    "rows": lambda i, mesh: target(numbers(8, 2, salt=i), mesh(4), [S(0)]),
    "columns": lambda i, mesh: target(numbers(3, 8, salt=i), mesh(4), [S(1)]),
    "uneven": lambda i, mesh: target(numbers(7, 2, salt=i), mesh(4), [S(0)]),
    "empty shards": lambda i, mesh: target(numbers(2, 3, salt=i), mesh(4), [S(0)]),
    "no elements": lambda _, mesh: target(numbers(0, 3), mesh(4), [S(0)]),
    "FSDP over TP": lambda i, mesh: target(numbers(8, 2, salt=i), mesh(2, 2), [SS(0, 2), S(0)]),
    "grid": lambda i, mesh: target(numbers(5, 3, salt=i), mesh(2, 2), [S(0), S(1)]),
    "replicas": lambda i, mesh: target(numbers(5, 3, salt=i), mesh(4), [R]),
    "plain": lambda i, _: numbers(5, 3, salt=i),
    "plain of another shape each": lambda i, _: numbers(i + 1, 3, salt=i),
    "0-dim": lambda i, _: numbers(salt=i),
    "meta": lambda i, mesh: target(numbers(8, 2, salt=i), mesh(4), [S(0)], meta=True),
    "plain meta": lambda i, _: numbers(8, 2, salt=i).to("meta"),
    "dtypes": lambda i, mesh: target(
        numbers(8, dtype=SOME_DTYPES[i % len(SOME_DTYPES)], salt=i), mesh(4), [S(0)]
    ),
    "each of another shape": lambda i, mesh: target(numbers(i + 1, 3, salt=i), mesh(4), [S(0)]),
    "several meshes": lambda i, mesh: [
        lambda: target(numbers(8, 2, salt=i), mesh(4), [S(0)]),
        lambda: target(numbers(8, 2, salt=i), mesh(2, 2), [S(0), S(1)]),
        lambda: target(numbers(8, 2, salt=i), mesh(2, 2)["tp"], [S(0)]),
        lambda: numbers(8, 2, salt=i),
    ][i % 4](),
    "values": lambda i, _: [i, "text", {i}],
    "others on each rank": lambda i, mesh: (
        target(numbers(8, 2, salt=i), mesh(4), [S(0)])
        if i % 2 == dist.get_rank() % 2
        else numbers(8, 2, salt=i)
    ),
}
TARGET_CASES = [pytest.param(make, id=dashed(name)) for name, make in TARGETS.items()]


def _full(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return numbers(*value.shape, dtype=value.dtype)


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastCost:
    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("make", TARGET_CASES)
    @pytest.mark.thorough(but=["values"])
    def test_every_kind_of_target(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, make: Any
    ) -> None:
        """Forty targets of any kind must take as many collectives as eight."""

        def run(number: int) -> None:
            mine = _leaves(make, number, mesh)
            judged({} if rank else {k: _full(v) for k, v in mine.items()}, mine, device)

        _assert_as_many(run, at_least=1)

    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("options", [{"strict": True}, {"cpu_offload": True}], ids=str)
    @pytest.mark.parametrize("kind", ["rows", "uneven", "plain", "meta", "others on each rank"])
    @pytest.mark.thorough(but=["uneven-{'strict': True}"])
    def test_every_option(
        self,
        judged: Any,
        mesh: Any,
        rank: int,
        device: torch.device,
        kind: str,
        options: dict[str, Any],
    ) -> None:
        """The same must hold with every option."""

        def run(number: int) -> None:
            mine = _leaves(TARGETS[kind], number, mesh)
            source = {} if rank else {k: _full(v) for k, v in mine.items()}
            judged(source, mine, device, **options)

        _assert_as_many(run, at_least=1)


@pytest.mark.judges("_state_dict_utils._broadcast_tensors")
class TestBroadcastTensorsCost:
    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    @pytest.mark.parametrize(
        "kind", ["rows", "uneven", "plain", "meta", "dtypes", "several meshes"]
    )
    @pytest.mark.thorough(but=["several meshes"])
    def test_every_kind_of_target(
        self, judged: Any, subject: Any, mesh: Any, rank: int, device: torch.device, kind: str
    ) -> None:
        """Forty targets of any kind must take as many collectives as eight."""
        info = subject.function("_state_dict_utils._TensorInfo")

        def run(number: int) -> None:
            mine = _leaves(TARGETS[kind], number, mesh)
            source = {k: _full(v) for k, v in mine.items()}
            if rank:
                source = {k: info(v.shape, v.dtype) for k, v in source.items()}
            judged(source, mine, list(mine), device)

        _assert_as_many(run, at_least=1)


def _assert_none(kinds: dict[str, Leaf], call: Callable[[Leaf], Any]) -> None:
    """`call(kind)` issues no collective for any kind."""
    issued = {}
    for name, make in kinds.items():
        with Collectives() as seen:
            call(make)
        if seen.count:
            issued[name] = dict(seen.names)
    assert not issued, f"expected no collective, these were issued: {issued}"


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeCost:
    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    def test_no_collective(self, judged: Any, mesh: Any, device: torch.device) -> None:
        """What every rank holds must reach targets of any kind without a collective."""

        def call(make: Leaf) -> None:
            mine = _leaves(make, FEW, mesh)
            judged({k: _full(v) for k, v in mine.items()}, mine, device)

        _assert_none(TARGETS, call)


@pytest.mark.judges("_state_dict_utils._offload_state_dict_to_cpu")
class TestOffloadCost:
    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    def test_no_collective(self, judged: Any, mesh: Any) -> None:
        """A snapshot of leaves of any kind must take no collective."""
        _assert_none(KINDS, lambda make: judged(_leaves(make, FEW, mesh)))


@pytest.mark.judges("_state_dict_utils._create_cpu_state_dict")
class TestCreateCost:
    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    def test_no_collective(self, judged: Any, mesh: Any) -> None:
        """Buffers for leaves of any kind must take no collective."""
        _assert_none(KINDS, lambda make: judged(_leaves(make, FEW, mesh)))


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestCopyCost:
    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    def test_no_collective(self, judged: Any, mesh: Any) -> None:
        """A copy into leaves of any kind must take no collective."""
        _assert_none(KINDS, lambda make: judged(_leaves(make, FEW, mesh), _leaves(make, FEW, mesh)))


@pytest.mark.judges("_state_dict_utils._check_state_dict_similarity")
class TestSimilarityCost:
    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    def test_no_collective(self, judged: Any, mesh: Any) -> None:
        """A comparison of leaves of any kind must take no collective."""
        _assert_none(KINDS, lambda make: judged(_leaves(make, FEW, mesh), _leaves(make, FEW, mesh)))
