"""Ties and claims of leaves that hold tensors: wrappers in DTensors, shards in ShardedTensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._local_tensor import LocalTensorMode
from torch.distributed.remote_device import _remote_device
from torch.distributed.tensor import distribute_tensor

from conformance.kit.agree import assert_raises_everywhere
from conformance.kit.compare import assert_same, assert_type
from conformance.kit.data import numbers
from conformance.kit.groups import group
from conformance.kit.layouts import R, S, dtensor, part, rows, sharded_tensor
from conformance.kit.refusals import refused
from conformance.kit.subclasses import assert_holds_pair, inside, subclass_with


class Noted(torch.Tensor):
    """A tensor whose class is asked of every function, and has memory of the usual kind."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class One(torch.Tensor):
    """A wrapper of one tensor, which may have another shape."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[One], inner: torch.Tensor, size: Any = None) -> One:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, inner.size() if size is None else size, dtype=inner.dtype, device=inner.device
        )
        made.held = inner
        return made

    def __init__(self, *_: Any) -> None:
        """`__new__` has done it all."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"One({self.held})"

    def __tensor_flatten__(self) -> Any:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, _meta: Any, size: Any, _stride: Any) -> One:
        return One(inner["held"], size)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"One does not implement {func}")


class Once:
    """A value that cannot be pickled the first time, but can be later."""

    def __init__(self) -> None:
        self.asked = 0

    def __reduce__(self) -> Any:
        self.asked += 1
        if self.asked == 1:
            raise TypeError("not now")
        return Once, ()


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastKindsInside:
    @pytest.mark.law("compatibility")
    @pytest.mark.should("upstream sends what the class itself sends")
    @pytest.mark.world(2)
    def test_a_wrapper_of_one_tensor(
        self, judged: Any, mesh: Any, world: Any, device: torch.device
    ) -> None:
        """What wraps one tensor of its own shape must be sent as that, and nothing else."""
        full = numbers(5, 3, device=device)
        for salt in range(2):  # the second time into what is there
            local: dict[str, Any] = {"x": dtensor(full * 0, mesh(2), [S(0)])}
            judged({"x": One(full + salt)} if world.rank == 0 else {}, local, device)
            assert_same(local["x"]._local_tensor, part(full + salt, mesh(2), [S(0)]))
        odd = {"x": One(full, (3, 5))} if world.rank == 0 else {}
        local = {"x": full.new_zeros(3, 5)}
        assert_raises_everywhere(world, lambda: judged(odd, local, device), "'x'")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    def test_a_value_that_can_be_sent_later(
        self, judged: Any, world: Any, device: torch.device
    ) -> None:
        """A value that cannot be pickled now must raise on every rank, though it could be later."""
        full = {"x": Once()} if world.rank == 0 else {}
        local: dict[str, Any] = {"x": None}
        assert_raises_everywhere(
            world, lambda: judged(full, local, device), "pickled", kinds=(TypeError,)
        )


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeKindsInside:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_a_class_with_memory_of_the_usual_kind(
        self, judged: Any, mesh: Any, device: torch.device
    ) -> None:
        """A plain target is given a copy of the class, as load hooks look at it; a DTensor none."""
        line, full = mesh(2), numbers(4, 3)
        given = full.as_subclass(Noted)
        value = {
            "plain": given,
            "again": full.as_subclass(Noted),  # as state_dict() gives tied parameters
            "rows": given,
            "step": numbers().as_subclass(Noted),
        }
        into: dict[str, Any] = {key: torch.zeros_like(full) for key in ("plain", "again", "step")}
        into["rows"] = dtensor(torch.zeros(4, 3), line, [S(0)])
        judged(value, into, device)
        for key in ("plain", "again", "step"):
            assert_type(into[key], Noted, key)
            assert_same(into[key].as_subclass(torch.Tensor), value[key].as_subclass(torch.Tensor))
        assert into["plain"].data_ptr() == into["again"].data_ptr(), "untied"
        assert into["step"].device.type == "cpu"
        assert_same(into["rows"].to_local(), part(full, line, [S(0)]))

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_a_class_that_lends_no_memory(self, judged: Any, device: torch.device) -> None:
        """What lands of a class must have memory of its own."""
        given, into = numbers(4, 3).as_subclass(Noted), {"w": torch.zeros(4, 3)}
        judged({"w": given}, into, device)
        assert into["w"].data_ptr() != given.data_ptr()


@pytest.mark.judges("_state_dict_utils._broadcast_tensors")
class TestBroadcastTensorsOfNoTensor:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    def test_neither_is_a_tensor(
        self, judged: Any, world: Any, subject: Any, device: torch.device
    ) -> None:
        """A key under which the source has no tensor is refused, whatever its target is."""
        info = subject.function("_state_dict_utils._TensorInfo")
        odd: Any = 7 if world.rank == 0 else info(torch.Size([4]), torch.float32)
        for target in (1, None, "text"):
            mine: dict[str, Any] = {"odd": target}
            call = partial(judged, {"odd": odd}, mine, ["odd"], device)
            assert_raises_everywhere(world, call, "'odd'", name=f"{target}")
            assert mine == {"odd": target}, f"{mine}"


@pytest.mark.judges("_state_dict_utils._create_cpu_state_dict")
class TestStagingKindsInside:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_a_class_that_cannot_make_an_empty_one(self, judged: Any) -> None:
        """A class that only clones must be given a buffer of its own nevertheless."""
        kind, full = subclass_with(["aten.clone.default", "aten.detach.default"], False), numbers(4)
        value = {"x": kind.of(full)}
        got = judged(value)["x"]
        assert_type(got, kind)
        got.first.zero_()
        assert_holds_pair(value["x"], kind, numbers(4), "after the buffer was written")

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_a_class_that_is_shared(self, judged: Any) -> None:
        """With share_memory a buffer of any class must lie in memory that can be shared."""
        got = judged({"x": numbers(4, 3).as_subclass(Noted)}, share_memory=True)["x"]
        assert got.is_shared(), "in memory of this process"
        assert got.shape == (4, 3)


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherKindsInside:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_a_class_with_memory_of_the_usual_kind(self, judged: Any, mesh: Any) -> None:
        """A DTensor around a class that keeps no memory apart must be gathered like a plain one."""
        full, line = numbers(5, 3), mesh(2)
        for placement in S(0), S(1), R:
            local = part(full, line, [placement]).clone().as_subclass(Noted)
            got = judged({"x": inside(local, full, line, [placement])})["x"]
            assert_same(got.as_subclass(torch.Tensor), full, f"{placement}")

    @pytest.mark.law("group")
    @pytest.mark.world(3)
    def test_shards_of_which_no_taker_has_any(self, judged: Any, world: Any) -> None:
        """Shards that lie on other ranks go to the first of these; with others they are refused."""
        some, full = group(0, 1), numbers(6, 3)
        if world.rank == 2:
            value: dict[str, Any] = {}
        else:
            value = {"x": sharded_tensor(full, rows(full.shape, [4, 2]), some)}
        got = judged(value, ranks_only=(2,))
        assert list(got) == (["x"] if world.rank == 0 else []), f"keys {list(got)}"
        if got:
            assert_same(got["x"], full)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(1)
    def test_a_message_speaks_of_what_there_is(self, judged: Any) -> None:
        """An error that is no leaf's must not name None for one."""
        for call in (
            lambda: judged({"x": object()}),
            lambda: judged({"x": numbers(3)}, ranks_only=(7,)),
        ):
            assert "None:" not in str(refused(call)), "None is named"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    def test_ranks_that_are_played_and_left_out(self, judged: Any, mesh: Any) -> None:
        """One process that plays all ranks, but is not asked for, must get nothing."""
        line, full = mesh(4), numbers(8, 3)
        with LocalTensorMode(4):
            leaf = distribute_tensor(full, line, [S(0)], src_data_rank=None)
            got = judged({"x": leaf}, ranks_only=(dist.get_rank() + 1,))
        assert got == {}, f"{got}"

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.needs("functional gathers")
    @pytest.mark.parametrize("flatten", [True, False], ids=["traceable", "closed"])
    def test_tied_wrappers(self, judged: Any, mesh: Any, flatten: bool) -> None:
        """Tied DTensors around a wrapper must come back tied, and others apart."""
        kind, full, line = subclass_with(None, flatten), numbers(6, 4), mesh(2)
        for placement in S(0), R:
            local = kind.of(part(full, line, [placement]).clone())
            one = inside(local, full, line, [placement])
            same = inside(local, full, line, [placement])
            other = inside(kind.of(local.first.clone()), full, line, [placement])
            got = judged({"a": one, "b": [one], "c": same, "d": other})
            assert got["a"] is got["b"][0], f"{placement}: one leaf became two"
            assert got["a"] is got["c"], f"{placement}: tied leaves came apart"
            assert got["a"] is not got["d"], f"{placement}: leaves that were apart became one"
            for name in "acd":
                assert_holds_pair(got[name], kind, full, f"{placement}: {name}")


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestCopyKindsInside:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_shards_that_are_told_to_lie_elsewhere(self, judged: Any, rank: int) -> None:
        """Shards must be copied wherever their metadata say that they lie."""
        full = numbers(6, 3)
        source, target = (
            sharded_tensor(value, rows(value.shape, [4, 2])) for value in (full, full * 0)
        )
        for shard in target.local_shards():
            shard.metadata.placement = _remote_device(f"rank:{1 - rank}/cpu")
        got = judged({"x": source}, {"x": target})["x"]
        assert got is target
        for shard in target.local_shards():
            (at, _), (count, _) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            assert_same(shard.tensor, full[at : at + count], f"rank {rank}")
