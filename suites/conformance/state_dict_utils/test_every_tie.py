"""Leaves of every two kinds over one memory, and what a copy of them shares."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_same, local, shares_memory
from conformance.kit.data import numbers
from conformance.kit.functions import Function, each
from conformance.kit.layouts import R, S, dtensor, part, rows, sharded_tensor
from conformance.kit.nested import tensors
from conformance.kit.overlap import assert_kept

Over = Callable[[torch.Tensor, Any], Any]


class Noted(torch.Tensor):
    """A class of its own that adds nothing."""


def _shards(memory: torch.Tensor, line: Any) -> Any:
    """A ShardedTensor whose shard on this rank is that memory."""
    size = (len(memory) * line.size(), *memory.shape[1:])
    made = sharded_tensor(torch.zeros(size), rows(size, [len(memory)] * line.size()))
    for shard in made.local_shards():
        shard.tensor = memory
    return made


# Name -> a leaf over memory that is there.
LOCAL: dict[str, Over] = {
    "itself": lambda memory, _: memory,
    "a parameter": lambda memory, _: nn.Parameter(memory),
    "a frozen parameter": lambda memory, _: nn.Parameter(memory, requires_grad=False),
    "a view": lambda memory, _: memory.view(-1),
    "its transpose": lambda memory, _: memory.t(),
    "a row": lambda memory, _: memory[1],
    "the first rows": lambda memory, _: memory[:2],
    "its bits": lambda memory, _: memory.view(torch.int32),
    "detached": lambda memory, _: nn.Parameter(memory).detach(),
    "of a class": lambda memory, _: memory.as_subclass(Noted),
    "a row of a class": lambda memory, _: memory[1].as_subclass(Noted),
    "a replica": lambda memory, line: DTensor.from_local(memory, line, [R], run_check=False),
}
SHARDED: dict[str, Over] = {
    "rows": lambda memory, line: DTensor.from_local(memory, line, [S(0)], run_check=False),
    "rows that train": lambda memory, line: nn.Parameter(
        DTensor.from_local(memory, line, [S(0)], run_check=False)
    ),
    "shards": _shards,
}
_COPIES = {
    "_offload_state_dict_to_cpu": lambda judged, value: judged(value),
    "_create_cpu_state_dict": lambda judged, value: judged(value),
    "_iterate_state_dict": lambda judged, value: judged(
        value, *[lambda tensor, *_: tensor] * 3, cpu_offload=True
    ),
    "_gather_state_dict": lambda judged, value: judged(value),
}


def _assert_same_kinds(got: Any, value: Any) -> None:
    expected = tensors(value)
    for path, tensor in tensors(got).items():
        flags = [
            (isinstance(t, nn.Parameter), t.requires_grad, isinstance(t, Noted))
            for t in (tensor, expected[path])
        ]
        assert flags[0] == flags[1], f"{path}: Parameter, requires_grad, class: {flags}"


@pytest.mark.law("structure")
@pytest.mark.world(2, collective=8, limit=30)
@each(lambda function: function.name in _COPIES)
def test_two_kinds(function: Function, subject: Any, mesh: Any) -> None:
    """What is written to one leaf must be read in the other, in a copy as in the original."""
    judged = subject.function(f"_state_dict_utils.{function.name}")
    # What travels comes out in memory that did not exist: of that only what stays is asked.
    kinds = LOCAL if function.talks else LOCAL | SHARDED
    for one, make in kinds.items():
        for other, make_other in kinds.items():
            memory = numbers(60, 3)[40:43]  # square, and not where its storage begins
            value = {
                "first": make(memory, mesh(2)),
                "alone": numbers(2, salt=1),
                "inner": [{"second": make_other(memory, mesh(2))}],
                "third": memory[2:],
            }
            got = _COPIES[function.name](judged, value)
            try:
                assert_kept(got, value)
                if function.name != "_create_cpu_state_dict":
                    _assert_same_kinds(got, value)
            except AssertionError as error:
                raise AssertionError(f"{one} and {other}: {error}") from None


@pytest.mark.law("structure")
@pytest.mark.world(2, collective=8, limit=30)
@each(lambda function: function.name in ("_broadcast_state_dict", "_distribute_state_dict"))
def test_other_values_for_tied_targets(
    function: Function, world: Any, mesh: Any, subject: Any, device: torch.device
) -> None:
    """Where a full state dict has two values for one tensor the last must be in both places."""
    judged = subject.function(f"_state_dict_utils.{function.name}")
    values = {"b": numbers(4, 3), "a": numbers(4, 3, salt=1), "c": numbers(4, 3, salt=2)}
    for placement in (S(0), R):
        leaf = dtensor(torch.zeros(4, 3), mesh(2), [placement])
        # The order of the full state dict counts, whatever that of a rank's own is.
        for keys in ("bac", "cab", "abc" if world.rank else "cba"):
            into: dict[str, Any] = dict.fromkeys(keys, leaf)
            leaf.to_local().zero_()
            source = dict(values) if world.rank == 0 or not function.talks else {}
            judged(source, into, device)
            for key, got in into.items():
                expected = part(values["c"], mesh(2), [placement])
                assert_same(local(got), expected, f"{placement} {key} of {keys}")


def _read_otherwise(memory: torch.Tensor) -> dict[str, torch.Tensor]:
    """Leaves over one memory, by strides and dtype alike, whose bits are read in another way."""
    if memory.is_complex():
        parts = {"imaginary": memory.imag, "negated": memory.conj().imag}
        return {"itself": memory, "conjugated": memory.conj(), **parts}
    return {"itself": memory, "negated": torch._neg_view(memory)}


@pytest.mark.law("values")
@pytest.mark.world(2, collective=8, limit=30)
@each(
    lambda function: (
        function.name in {*_COPIES, "_broadcast_state_dict", "_distribute_state_dict"}
        and function.name != "_create_cpu_state_dict"
    )
)
def test_one_memory_with_two_values(
    function: Function, world: Any, mesh: Any, subject: Any, device: torch.device
) -> None:
    """A conjugated or negated view of a leaf has values of its own, and is no tie."""
    judged = subject.function(f"_state_dict_utils.{function.name}")
    for memory in (numbers(4, 3) + 1, numbers(4, 3, dtype=torch.complex64) * (1 + 2j)):
        value: dict[str, Any] = _read_otherwise(memory)
        expected = {key: leaf.clone() for key, leaf in value.items()}
        if function.name in _COPIES:
            got = _COPIES[function.name](judged, {"at": [value], "alone": numbers(2)})["at"][0]
        else:
            got = {key: torch.zeros_like(leaf) for key, leaf in expected.items()}
            source = value if world.rank == 0 or not function.talks else {}
            judged(source, got, device)
        for key, leaf in got.items():
            assert_same(leaf.resolve_conj().resolve_neg(), expected[key], f"{key} {memory.dtype}")


# Name -> what a function may make of a tensor: a new one each time it is called.
_NEW_TENSORS: dict[str, Callable[[Any], Any]] = {
    "a copy": lambda tensor: tensor.clone(),
    "the double": lambda tensor: tensor + tensor,
    "another dtype": lambda tensor: tensor.to(torch.float64),
}


@pytest.mark.judges("_state_dict_utils._iterate_state_dict")
class TestIterateTies:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_each_companion_is_asked(self, judged: Any) -> None:
        """What a function makes for one companion must not go to the companion of a tied leaf."""
        tied = numbers(3)
        into = {"a": torch.zeros(3), "b": torch.full((3,), 8.0)}
        judged(
            {"a": tied, "b": tied}, *[lambda t, _pg, _d, other: t + other] * 3, companion_obj=into
        )
        assert_same(into["a"], tied, "a")
        assert_same(into["b"], tied + 8, "b")

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("into", ["new", "cpu", "companion"])
    def test_results_that_are_gone_at_once(self, judged: Any, mesh: Any, into: str) -> None:
        """What a function makes of tied leaves must be theirs alone, also where it is short-lived.

        The memory of one result that was copied is that of the next one.
        """
        line = mesh(1)
        kinds: dict[str, Callable[[torch.Tensor], Any]] = {
            "plain": lambda full: full,
            "parameter": nn.Parameter,
            "rows": lambda full: dtensor(full, line, [S(0)]),
        }
        for (what, make), (kind, of) in product(_NEW_TENSORS.items(), kinds.items()):
            fulls = [numbers(6, 4, salt=n) for n in range(5)]
            leaves = list(map(of, fulls))
            value = [leaves, leaves[::-1]]
            options: dict[str, Any] = {"cpu_offload": into == "cpu"}
            with torch.no_grad():
                expected = list(map(make, fulls))
                if into == "companion":
                    of = kinds["rows" if kind == "rows" else "plain"]
                    options["companion_obj"] = [
                        [of(torch.zeros_like(full)) for full in expected] for _ in range(2)
                    ]
                got = judged(value, *[lambda tensor, *_, make=make: make(tensor)] * 3, **options)
            for n, full in enumerate(expected):
                assert_same(local(got[0][n]), full, f"{what} of {kind} {n}")
                assert_same(local(got[1][-1 - n]), full, f"{what} of {kind} {n}, once more")


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherPartlyTied:
    @pytest.mark.law("values")
    @pytest.mark.world(2, 3)
    def test_tied_on_some_ranks(self, judged: Any, mesh: Any, rank: int, world: Any) -> None:
        """Two DTensors that one rank alone has tied must each have the values that others hold."""
        line = mesh(world.size)
        for tying in range(world.size):
            a = numbers(world.size * 2, 3)
            b = numbers(world.size * 2, 3, salt=1)
            b[tying * 2 : tying * 2 + 2] = a[tying * 2 : tying * 2 + 2]
            held = [dtensor(full, line, [S(0)]) for full in (a, b)]
            if rank == tying:
                held[1] = dtensor(b, line, [S(0)], local=local(held[0]))
            got = judged({"a": held[0], "b": held[1]})
            assert_same(got["a"], a, f"a, tied on rank {tying}")
            assert_same(got["b"], b, f"b, tied on rank {tying}")


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherTies:
    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_what_no_rank_holds_is_tied_to_nothing(self, judged: Any, mesh: Any) -> None:
        """Tensors without elements, of which no rank can tell ties, must be several objects."""
        line = mesh(2)
        tied = dtensor(numbers(4, 3), line, [S(0)])
        empty = {f"empty {n}": dtensor(numbers(0, 3), line, [S(0)]) for n in range(3)}
        got = judged({"a": tied, **empty, "b": tied})
        assert shares_memory(got["a"], got["b"])
        found = [got[key] for key in empty]
        assert [tuple(t.shape) for t in found] == [(0, 3)] * 3
        assert len({id(t) for t in found}) == 3, "one tensor under several names"

    @pytest.mark.law("structure")
    @pytest.mark.world(3, collective=8, limit=30)
    def test_where_some_ranks_hold_nothing(self, judged: Any, mesh: Any) -> None:
        """Tied DTensors must be one tensor on every rank, also on those whose part is empty."""
        line = mesh(3)
        for length in (1, 2, 4):
            full, other = numbers(length, 3), numbers(length, 3, salt=1)
            mine = part(full, line, [S(0)]).clone()
            tied = [dtensor(full, line, [S(0)], local=mine) for _ in range(2)]
            value = {"a": tied[0], "b": [tied[1]], "c": dtensor(other, line, [S(0)])}
            got = judged(value)
            assert got["a"].data_ptr() == got["b"][0].data_ptr(), f"{length} rows: untied"
            assert got["a"].data_ptr() != got["c"].data_ptr(), f"{length} rows: tied to another"
            assert_same(got["a"], full)
            assert_same(got["c"], other)


@pytest.mark.law("values")
@pytest.mark.world(3, collective=8, limit=30)
@each(lambda function: function.name in ("_broadcast_state_dict", "_broadcast_tensors"))
def test_a_tied_source_for_ranks_with_other_keys(
    function: Function, world: Any, mesh: Any, subject: Any, device: torch.device
) -> None:
    """A tensor under several keys of the source must land under each, whichever a rank has.

    So it is with pipeline stages: the first has the embedding, the last the tied output layer.
    """
    judged = subject.function(f"_state_dict_utils.{function.name}")
    info = subject.function("_state_dict_utils._TensorInfo")
    tied, other = numbers(6, 4), numbers(6, 4, salt=1)
    full = {"a": tied, "b": tied, "c": tied.view(6, 4), "d": other}
    for placement in (S(0), R, None):
        for wanted in (("", "b", "c"), ("ad", "b", ""), ("b", "ad", "cd"), ("d", "cb", "a")):
            empty = torch.zeros(6, 4)
            into: dict[str, Any] = {
                key: dtensor(empty, mesh(3), [placement]) if placement else empty.clone()
                for key in wanted[world.rank]
            }
            source: dict[str, Any] = dict(full)
            if function.name == "_broadcast_state_dict":
                judged(source if world.rank == 0 else {}, into, device)
            else:
                if world.rank:
                    source = {key: info(one.shape, one.dtype) for key, one in full.items()}
                judged(source, into, list(full), device)
            for key, got in into.items():
                expected = part(full[key], mesh(3), [placement]) if placement else full[key]
                assert_same(local(got), expected, f"{placement}: {key} where ranks want {wanted}")


@pytest.mark.law("cost")
@pytest.mark.world(2, collective=8, limit=30)
@each(lambda function: function.name in ("_broadcast_state_dict", "_broadcast_tensors"))
def test_a_tied_source_travels_once(
    function: Function, world: Any, mesh: Any, subject: Any, device: torch.device
) -> None:
    """A tensor that the source has under two keys must not be sent twice."""
    judged = subject.function(f"_state_dict_utils.{function.name}")
    info = subject.function("_state_dict_utils._TensorInfo")
    for placement in (S(0), R, None):
        sent = []
        for keys in (["a"], ["a", "b"]):
            full = numbers(256, 256)
            into: dict[str, Any] = {
                key: torch.zeros(256, 256)
                if placement is None
                else dtensor(torch.zeros(256, 256), mesh(2), [placement])
                for key in keys
            }
            source: dict[str, Any] = dict.fromkeys(keys, full)
            with Collectives() as seen:
                if function.name == "_broadcast_state_dict":
                    judged(source if world.rank == 0 else {}, into, device)
                else:
                    if world.rank:
                        source = dict.fromkeys(keys, info(full.shape, full.dtype))
                    judged(source, into, keys, device)
            sent.append(seen.bytes)
            for key, got in into.items():
                expected = part(full, mesh(2), [placement]) if placement else full
                assert_same(local(got), expected, f"{placement} {key}")
        said = f"{placement}: {sent[0]} bytes for one key, {sent[1]} for two"
        assert sent[0] > 0, said
        assert sent[1] < sent[0] * 1.5, said
