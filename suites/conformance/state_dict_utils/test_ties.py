"""Leaves that share memory: the same view of it, or views that overlap, of one kind or of several.

A caller who writes into one of them reads that in the other. A copy of the state dict keeps this,
and so takes no more memory than the original: one storage stays one. Disjoint parts of one storage
(FSDP's flat parameter) have nothing in common, and are copied without what lies between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from conformance.kit.compare import assert_same, local, shares_memory
from conformance.kit.containers import dashed
from conformance.kit.data import numbers
from conformance.kit.landing import target
from conformance.kit.layouts import R, S, dtensor
from conformance.kit.nested import assert_apart, assert_same_structure, leaves, storages
from conformance.kit.nested import tensors as tensors_of

Value = dict[str, Any]


def _flat(n: int = 12) -> torch.Tensor:
    return numbers(n)


def _parameter() -> nn.Parameter:
    return nn.Parameter(numbers(4, 3))


# Name -> a state dict of plain leaves whose memory overlaps.
VIEWS: dict[str, Callable[[], Value]] = {
    "a parameter and its detached twin": lambda: (
        lambda w: {"weight": w, "twin": w.detach(), "data": w.data}
    )(_parameter()),
    "a detached twin and its parameter": lambda: (lambda w: {"twin": w.detach(), "weight": w})(
        _parameter()
    ),
    "a matrix and its transpose": lambda: (lambda w: {"w": w, "t": w.t()})(numbers(4, 3)),
    "a matrix and its rows as one": lambda: (lambda w: {"w": w, "flat": w.view(-1)})(numbers(4, 3)),
    "a matrix and one of its columns": lambda: (lambda w: {"w": w, "column": w[:, 1]})(
        numbers(4, 3)
    ),
    "a column and its matrix": lambda: (lambda w: {"column": w[:, 1], "w": w})(numbers(4, 3)),
    "slices that overlap": lambda: (lambda m: {"a": m[:6], "b": m[4:9], "c": m[8:]})(_flat()),
    "slices around a third": lambda: (lambda m: {"a": m[:3], "b": m[9:], "all": m})(_flat()),
    "columns in turn": lambda: (lambda m: {"even": m[::2], "third": m[::3]})(_flat()),
    "a row and that row expanded": lambda: (lambda r: {"row": r, "rows": r.expand(3, 4)})(
        numbers(1, 4)
    ),
    "numbers and their bits": lambda: (lambda m: {"m": m, "bits": m.view(torch.int32)})(_flat()),
    "complex numbers and their parts": lambda: (
        lambda z: {"z": z, "parts": torch.view_as_real(z), "real": z.real}
    )(numbers(6, dtype=torch.complex64)),
    "in a list, a dict and a tuple": lambda: (
        lambda w: {"list": [w, 1], "dict": {"x": [w.detach()]}, "tuple": (w.data.t(), w.data[1])}
    )(_parameter()),
    "bfloat16": lambda: (lambda w: {"w": w, "t": w.t()})(numbers(4, 3, dtype=torch.bfloat16)),
    "unsigned": lambda: (lambda w: {"w": w, "t": w.t()})(numbers(4, 3, dtype=torch.uint16)),
    "fp8": lambda: (lambda w: {"w": w, "t": w.t()})(numbers(4, 3, dtype=torch.float8_e5m2)),
    "a scalar of a vector": lambda: (lambda m: {"m": m, "scalar": m[3]})(_flat()),
}


def _around(make: Callable[[torch.Tensor, Any], DTensor]) -> Callable[[Any], Value]:
    def made(line: Any) -> Value:
        memory = numbers(4, 3)
        return {"distributed": make(memory, line), "plain": memory, "t": memory.t()}

    return made


def _dt(memory: torch.Tensor, line: Any, placement: Any) -> DTensor:
    return DTensor.from_local(memory, line, [placement], run_check=False)


# The same with DTensors over a mesh of one dimension.
DISTRIBUTED: dict[str, Callable[[Any], Value]] = {
    "a shard and a plain tensor": _around(lambda m, line: _dt(m, line, S(0))),
    "a replica and a plain tensor": _around(lambda m, line: _dt(m, line, R)),
    "two shards that overlap": lambda line: (
        lambda m: {"a": _dt(m[:8], line, S(0)), "b": _dt(m[6:], line, S(0))}
    )(_flat()),
    "a shard and its transpose": lambda line: (
        lambda m: {"a": _dt(m, line, S(0)), "b": _dt(m.t(), line, S(1))}
    )(numbers(4, 3)),
    "a trained DTensor and its detached twin": lambda line: (
        lambda w: {"weight": w, "twin": w.detach(), "inside": local(w).detach()}
    )(nn.Parameter(_dt(numbers(4, 3), line, S(0)))),
    "a shard and a replica": lambda line: (
        lambda m: {"shard": _dt(m, line, S(0)), "replica": _dt(m, line, R)}
    )(numbers(4, 3)),
}
REPLICAS = ["a replica and a plain tensor"]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The address of each byte of each element, in logical order."""
    at = torch.zeros((), dtype=torch.int64)
    for size, step in zip(tensor.shape, tensor.stride(), strict=True):
        at = at.unsqueeze(-1) + torch.arange(size) * step
    width = tensor.element_size()
    first = local(tensor).data_ptr() + at.reshape(-1, 1) * width
    return (first + torch.arange(width)).reshape(-1)


def _shared(value: Any) -> dict[tuple[str, str], list[list[int]]]:
    """Per pair of leaves that overlap, which bytes of the one are which of the other."""
    held = {
        ".".join(map(str, path)): _bytes_of(storages(t)[0]) for path, t in tensors_of(value).items()
    }
    pairs = {}
    for (one, ours), (other, theirs) in itertools.combinations(held.items(), 2):
        same = (ours[:, None] == theirs[None, :]).nonzero().tolist()
        if same:
            pairs[one, other] = same
    return pairs


def _held(value: Any) -> int:
    """Bytes of all storages under the tensors."""
    found = {
        plain.untyped_storage().data_ptr(): plain.untyped_storage().nbytes()
        for tensor in tensors_of(value).values()
        for plain in storages(tensor)
    }
    return sum(found.values())


def _assert_kept(got: Any, value: Any) -> None:
    """`got` is a copy of `value` in memory of its own, in which the same leaves overlap."""
    assert_apart(got, value)
    expected, have = _shared(value), _shared(got)
    lost = [pair for pair in expected if have.get(pair) != expected[pair]]
    assert not lost, f"writing to one of {lost} is no longer seen in the other"
    new = [pair for pair in have if pair not in expected]
    assert not new, f"{new} share memory now, and did not before"
    room, limit = _held(got), _held(value)
    assert room <= limit, f"the copy holds {room} bytes, the original {limit}"


# torch itself does not copy into an expanded tensor.
_COPIED = {name: make for name, make in VIEWS.items() if "expanded" not in name}
COPIED_CASES = [pytest.param(make, id=dashed(name)) for name, make in _COPIED.items()]
PLAIN_CASES = [pytest.param(make, id=dashed(name)) for name, make in VIEWS.items()]
DISTRIBUTED_CASES = [pytest.param(make, id=dashed(name)) for name, make in DISTRIBUTED.items()]
REPLICA_CASES = [pytest.param(DISTRIBUTED[name], id=dashed(name)) for name in REPLICAS]


def _pieces() -> Value:
    """Three disjoint pieces of one large storage, of which most is in none of them."""
    memory = torch.zeros(1 << 20)
    return {"a": memory[:8].view(2, 4), "b": memory[8:12], "c": memory[-4:]}


def _assert_pieces_alone(got: Any) -> None:
    room = _held(got)
    assert room <= 4096, f"the copy of 64 bytes out of a storage of 4 MiB holds {room} bytes"


def _identity(tensor: Any, *_: Any) -> Any:
    return tensor


@pytest.mark.judges("_state_dict_utils._offload_state_dict_to_cpu")
class TestOffloadKeepsTies:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", PLAIN_CASES)
    def test_views_that_overlap(self, judged: Any, make: Any) -> None:
        """What is written to one leaf of the snapshot must be read in the leaf that overlaps it."""
        value = make()
        got = judged(value)
        assert_same_structure(got, value)
        _assert_kept(got, value)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", DISTRIBUTED_CASES)
    def test_across_kinds(self, judged: Any, mesh: Any, make: Any) -> None:
        """The same must hold between the memory of DTensors, and of a DTensor and a tensor."""
        value = make(mesh(1))
        got = judged(value)
        assert_same_structure(got, value)
        _assert_kept(got, value)

    @pytest.mark.law("cost")
    @pytest.mark.world(1)
    def test_disjoint_pieces_of_one_storage(self, judged: Any) -> None:
        """The snapshot of pieces of a large storage must not hold what is in none of them."""
        value = _pieces()
        got = judged(value)
        assert_same_structure(got, value)
        _assert_pieces_alone(got)


@pytest.mark.judges("_state_dict_utils._create_cpu_state_dict")
class TestCreateKeepsTies:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", PLAIN_CASES)
    def test_views_that_overlap(self, judged: Any, make: Any) -> None:
        """Buffers for leaves that overlap must overlap the same way."""
        value = make()
        got = judged(value)
        assert_same_structure(got, value, values=False, flags=False)
        _assert_kept(got, value)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", DISTRIBUTED_CASES)
    def test_across_kinds(self, judged: Any, mesh: Any, make: Any) -> None:
        """The same must hold between the memory of DTensors, and of a DTensor and a tensor."""
        value = make(mesh(1))
        got = judged(value)
        assert_same_structure(got, value, values=False, flags=False)
        _assert_kept(got, value)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", PLAIN_CASES)
    def test_in_shared_memory(self, judged: Any, make: Any) -> None:
        """Buffers in shared memory must overlap as the leaves do, and all be shared."""
        value = make()
        got = judged(value, share_memory=True)
        _assert_kept(got, value)
        apart = [path for path, t in tensors_of(got).items() if not t.is_shared()]
        assert not apart, f"not in shared memory: {apart}"

    @pytest.mark.law("cost")
    @pytest.mark.world(1)
    def test_disjoint_pieces_of_one_storage(self, judged: Any) -> None:
        """Buffers for pieces of a large storage must not hold what is in none of them."""
        _assert_pieces_alone(judged(_pieces()))


@pytest.mark.judges("_state_dict_utils._iterate_state_dict")
class TestIterateKeepsTies:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", PLAIN_CASES)
    def test_views_that_overlap(self, judged: Any, make: Any) -> None:
        """With `cpu_offload` results that overlap must come to the CPU so that they still do."""
        value = make()
        got = judged(value, _identity, _identity, _identity, cpu_offload=True)
        assert_same_structure(got, value)
        _assert_kept(got, value)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", DISTRIBUTED_CASES)
    def test_across_kinds(self, judged: Any, mesh: Any, make: Any) -> None:
        """The same must hold between the memory of DTensors, and of a DTensor and a tensor."""
        value = make(mesh(1))
        got = judged(value, _identity, _identity, _identity, cpu_offload=True)
        assert_same_structure(got, value)
        _assert_kept(got, value)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", COPIED_CASES)
    def test_into_a_companion_that_overlaps(self, judged: Any, make: Any) -> None:
        """A companion whose leaves overlap must hold all values, and be the result."""
        value, companion = make(), make()
        _clear(companion)
        got = judged(value, _identity, _identity, _identity, companion_obj=companion)
        assert_same_structure(got, value, flags=False)
        _assert_is(got, companion)

    @pytest.mark.law("cost")
    @pytest.mark.world(1)
    def test_disjoint_pieces_of_one_storage(self, judged: Any) -> None:
        """Copies of pieces of a large storage must not hold what is in none of them."""
        _assert_pieces_alone(judged(_pieces(), _identity, _identity, _identity, cpu_offload=True))


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestCopyKeepsTies:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", COPIED_CASES)
    def test_into_leaves_that_overlap(self, judged: Any, make: Any) -> None:
        """A target whose leaves overlap must hold all values, and be the result."""
        value, into = make(), make()
        _clear(into)
        got = judged(value, into)
        assert_same_structure(got, value, flags=False)
        _assert_is(got, into)

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", COPIED_CASES)
    def test_into_itself(self, judged: Any, make: Any) -> None:
        """A state dict that is copied into itself must stay as it is."""
        value, expected = make(), make()
        judged(value, value)
        assert_same_structure(value, expected)


def _clear(value: Any) -> None:
    for tensor in tensors_of(value).values():
        for plain in storages(tensor):
            memory = torch.empty(0, dtype=torch.uint8, device=plain.device)
            memory.set_(plain.untyped_storage()).zero_()


def _assert_is(got: Any, companion: Any) -> None:
    pairs = zip(leaves(got), leaves(companion), strict=True)
    others = [
        path for (path, one), (_, two) in pairs if isinstance(one, torch.Tensor) and one is not two
    ]
    assert not others, f"expected the companion's own tensors at {others}"


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherKeepsTies:
    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("cpu_offload", [False, True], ids=["device", "cpu"])
    @pytest.mark.parametrize("make", PLAIN_CASES)
    def test_views_that_overlap(
        self, judged: Any, mesh: Any, world: Any, make: Any, cpu_offload: bool
    ) -> None:
        """Plain leaves that overlap must still do so in the result, beside a gathered one."""
        full = numbers(4, 2)
        value = {**make(), "gathered": dtensor(full, mesh(world.size), [S(0)])}
        got = judged(value, cpu_offload=cpu_offload)
        assert_same(got.pop("gathered"), full, "gathered")
        del value["gathered"]
        assert_same_structure(got, value)
        _assert_kept(got, value)

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("cpu_offload", [False, True], ids=["device", "cpu"])
    @pytest.mark.parametrize("make", REPLICA_CASES)
    def test_across_kinds(self, judged: Any, mesh: Any, make: Any, cpu_offload: bool) -> None:
        """A replica that does not travel must still share memory with a plain leaf."""
        value = make(mesh(2))
        got = judged(value, cpu_offload=cpu_offload)
        whole = {key: local(leaf) for key, leaf in value.items()}
        assert_same_structure(got, whole)
        _assert_kept(got, whole)

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("ties", ["parameter", "other DTensor", "list and dict"])
    def test_a_gathered_tensor_under_two_names(self, judged: Any, mesh: Any, ties: str) -> None:
        """Sharded leaves over one memory must be one whole tensor, whatever objects they are."""
        weight = nn.Parameter(dtensor(numbers(4, 3), mesh(2), [S(0)]))
        twin: Any = weight.detach()
        if ties == "other DTensor":
            twin = DTensor.from_local(local(weight).detach(), mesh(2), [S(0)], run_check=False)
        value: Any = {"weight": weight, "twin": twin}
        if ties == "list and dict":
            value = {"list": [weight], "dict": {"x": twin}}
        got = tensors_of(judged(value))
        one, other = got.values()
        assert_same(one, numbers(4, 3))
        assert_same(other, numbers(4, 3))
        assert shares_memory(one, other), f"{list(got)} came apart"

    @pytest.mark.law("cost")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("cpu_offload", [False, True], ids=["device", "cpu"])
    def test_disjoint_pieces_of_one_storage(self, judged: Any, cpu_offload: bool) -> None:
        """Copies of pieces of a large storage must not hold what is in none of them."""
        _assert_pieces_alone(judged(_pieces(), cpu_offload=cpu_offload))


# Name -> targets under two keys over one memory, in which the values of the last key must be.
TIED: dict[str, Callable[[Any], Value]] = {
    "a parameter and its detached twin": lambda _: (lambda w: {"a": w, "b": w.detach()})(
        nn.Parameter(torch.zeros(4, 3))
    ),
    "a detached twin and its parameter": lambda _: (lambda w: {"a": w.detach(), "b": w})(
        nn.Parameter(torch.zeros(4, 3))
    ),
    "a frozen parameter and its data": lambda _: (lambda w: {"a": w, "b": w.data})(
        nn.Parameter(torch.zeros(4, 3), requires_grad=False)
    ),
    "two parameters of one memory": lambda _: (
        lambda m: {"a": nn.Parameter(m), "b": nn.Parameter(m, requires_grad=False)}
    )(torch.zeros(4, 3)),
    "on meta": lambda _: (lambda w: {"a": w, "b": w.detach()})(
        nn.Parameter(torch.zeros(4, 3, device="meta"))
    ),
    "a trained DTensor and its detached twin": lambda line: (lambda w: {"a": w, "b": w.detach()})(
        nn.Parameter(target(numbers(4, 3), line, [S(0)]))
    ),
    "a DTensor on meta": lambda line: (lambda w: {"a": w, "b": w.detach()})(
        nn.Parameter(target(numbers(4, 3), line, [S(0)], meta=True))
    ),
}
TIED_CASES = [pytest.param(make, id=dashed(name)) for name, make in TIED.items()]


def _assert_still_tied(mine: Value, expected: torch.Tensor) -> None:
    for key in "ab":
        here = local(mine[key])
        rows = expected.chunk(torch.distributed.get_world_size())
        wanted = expected
        if isinstance(mine[key], DTensor):
            wanted = rows[torch.distributed.get_rank()]
        assert_same(here, wanted, key)
    assert shares_memory(mine["a"], mine["b"]), "a and b shared memory, and came apart"


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastKeepsTies:
    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("cpu_offload", [False, True], ids=["device", "cpu"])
    @pytest.mark.parametrize("make", TIED_CASES)
    def test_targets_over_one_memory(
        self,
        judged: Any,
        mesh: Any,
        rank: int,
        device: torch.device,
        make: Any,
        cpu_offload: bool,
    ) -> None:
        """Targets tied by memory must stay tied, whatever their Parameter-ness."""
        mine, full = make(mesh(2)), numbers(4, 3)
        source = {"a": full, "b": full.clone()} if rank == 0 else {}
        judged(source, mine, device, cpu_offload=cpu_offload)
        _assert_still_tied(mine, full)


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeKeepsTies:
    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("make", TIED_CASES)
    def test_targets_over_one_memory(
        self, judged: Any, mesh: Any, device: torch.device, make: Any
    ) -> None:
        """Targets tied by memory must stay tied, whatever their Parameter-ness."""
        mine, full = make(mesh(2)), numbers(4, 3)
        judged({"a": full, "b": full.clone()}, mine, device)
        _assert_still_tied(mine, full)
