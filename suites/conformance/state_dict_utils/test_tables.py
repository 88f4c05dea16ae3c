"""DTensors around torch's `LocalShardsWrapper`: sharded tables, as recommendation models hold them.

A rank holds one shard, several, or none. What a gather makes of them is a plain tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from conformance.kit.agree import assert_raises_everywhere
from conformance.kit.cases import every_second
from conformance.kit.compare import assert_same
from conformance.kit.data import SOME_DTYPES, dtype_id, numbers
from conformance.kit.layouts import R, S, dtensor

Box = tuple[tuple[int, ...], tuple[int, ...]]


def table(
    full: torch.Tensor,
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    boxes: Sequence[Box],
) -> DTensor:
    """A DTensor of `full` whose local tensor is the shards (offset, size) of this rank."""
    shards = [
        full[tuple(slice(o, o + n) for o, n in zip(at, size, strict=True))].clone()
        for at, size in boxes
    ]
    meta = TensorMeta(full.shape, full.stride(), full.dtype)
    spec = DTensorSpec(mesh, tuple(placements), tensor_meta=meta)
    wrapper = LocalShardsWrapper(shards, [at for at, _ in boxes])
    return DTensor(wrapper, spec, requires_grad=False)


def rows(full: torch.Tensor, *counts: int) -> list[Box]:
    """Boxes of consecutive rows."""
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [((end - n, 0), (n, full.size(1))) for end, n in zip(ends, counts, strict=True)]


def columns(full: torch.Tensor, *counts: int) -> list[Box]:
    """Boxes of consecutive columns."""
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [((0, end - n), (full.size(0), n)) for end, n in zip(ends, counts, strict=True)]


LAYOUTS: dict[str, tuple[tuple[int, int], Placement, Any]] = {
    "rows": ((8, 3), S(0), lambda full: [[box] for box in rows(full, 4, 4)]),
    "uneven rows": ((5, 3), S(0), lambda full: [[box] for box in rows(full, 3, 2)]),
    "no row on a rank": ((1, 3), S(0), lambda full: [rows(full, 1), []]),
    "columns": ((4, 6), S(1), lambda full: [[box] for box in columns(full, 3, 3)]),
    "uneven columns": ((4, 5), S(1), lambda full: [[box] for box in columns(full, 3, 2)]),
    "several of columns": (
        (4, 8),
        S(1),
        lambda full: [columns(full, 1, 3, 4)[:2], columns(full, 4, 2, 2)[1:]],
    ),
    "several of rows": (
        (8, 3),
        S(0),
        lambda full: [rows(full, 1, 3, 4)[:2], rows(full, 4, 2, 2)[1:]],
    ),
    "one of them empty": (
        (8, 3),
        S(0),
        lambda full: [rows(full, 1, 0, 3, 4)[:3], rows(full, 4, 0, 4)[1:]],
    ),
}


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGather:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("options", [{}, {"cpu_offload": True}], ids=str)
    def test_a_table_of_one_rank(self, judged: Any, mesh: Any, options: Any) -> None:
        """A table whose shards all lie on one rank must come back whole, in its own memory."""
        full = numbers(8, 3)
        held = table(full, mesh(1), [S(0)], rows(full, 1, 3, 4))
        got = judged({"table": held}, **options)["table"]
        assert_same(got, full)
        shards: Any = held._local_tensor
        shards.local_shards()[0].zero_()
        assert_same(got, full, "after the table was written")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @every_second(list(LAYOUTS))
    def test_a_table_is_gathered(self, judged: Any, mesh: Any, rank: int, layout: str) -> None:
        """A table must come back whole and plain, beside a plain DTensor."""
        size, placement, cut = LAYOUTS[layout]
        full = numbers(*size)
        value = {
            "usual": dtensor(numbers(4, 3), mesh(2), [S(0)]),
            "table": table(full, mesh(2), [placement], cut(full)[rank]),
        }
        got = judged(value)
        assert_same(got["table"], full, f"{layout}: table")
        assert_same(got["usual"], numbers(4, 3), "usual")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("dtype", SOME_DTYPES, ids=dtype_id)
    @pytest.mark.thorough(but=["float32", "uint16", "bool"])
    def test_the_shards_have_the_dtype(
        self, judged: Any, mesh: Any, rank: int, dtype: torch.dtype
    ) -> None:
        """A table must have the dtype of its shards, whatever its wrapper says."""
        full = numbers(8, 3, dtype=dtype)
        value = {"table": table(full, mesh(2), [S(0)], [rows(full, 4, 4)[rank]])}
        assert_same(judged(value)["table"], full, "table")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_a_table_that_one_rank_has(self, judged: Any, mesh: Any, rank: int) -> None:
        """A table that lies whole on one rank, under a name of its own, must stay there."""
        full = numbers(4, 3, salt=rank)
        value = {f"table.{rank}": table(full, mesh(2), [R], rows(full, 4))}
        got = judged(value)[f"table.{rank}"]
        shards = got.local_shards() if isinstance(got, LocalShardsWrapper) else [got]
        assert_same(shards[0], full, "table")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    def test_shards_that_are_not_the_placement(self, judged: Any, mesh: Any, rank: int, world: Any):  # type: ignore[no-untyped-def]
        """Shards on one rank that are not what its placement says must raise on all, by name."""
        full = numbers(8, 3)
        boxes = rows(full, 4, 4)[rank:] if rank else rows(full, 3, 5)[:1]
        value = {"layer.odd": table(full, mesh(2), [S(0)], boxes)}
        assert_raises_everywhere(world, lambda: judged(value), "layer.odd", "(3, 3)", "(4, 3)")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    def test_shards_of_another_number_of_dimensions(  # type: ignore[no-untyped-def]
        self, judged: Any, mesh: Any, rank: int, world: Any
    ):
        """Shards on one rank that have not the table's dimensions must raise on all, by name."""
        full = numbers(8, 3)
        leaf = table(full, mesh(2), [S(0)], rows(full, 4, 4)[rank : rank + 1])
        if rank:
            wrapper = LocalShardsWrapper([numbers(6), numbers(6)], [(0,), (6,)])
            leaf = DTensor(wrapper, leaf._spec, requires_grad=False)
        assert_raises_everywhere(world, lambda: judged({"layer.odd": leaf}), "layer.odd", "(6,)")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_a_table_without_its_place(self, judged: Any, mesh: Any, rank: int) -> None:
        """A table's only shard must be taken for the rank's part, whatever place it is given."""
        full = numbers(8, 3)
        leaf = table(full, mesh(2), [S(0)], [rows(full, 4, 4)[rank]])
        for offset in (0, 0), (0,), ():
            shards: Any = leaf._local_tensor.local_shards()  # type: ignore[attr-defined]
            wrapper = LocalShardsWrapper(shards, [offset])
            given = DTensor(wrapper, leaf._spec, requires_grad=False)
            assert_same(judged({"table": given})["table"], full, f"at {offset}")


def assert_table(got: Any, full: torch.Tensor, boxes: Sequence[Box], what: str) -> None:
    """`got` is a table whose shards on this rank are these boxes of `full`."""
    assert isinstance(got, DTensor), f"{what}: a {type(got).__name__}, expected a DTensor"
    shards = got._local_tensor.local_shards()  # type: ignore[attr-defined]
    assert len(shards) == len(boxes), f"{what}: {len(shards)} shards, expected {len(boxes)}"
    for number, (shard, (at, size)) in enumerate(zip(shards, boxes, strict=True)):
        expected = full[tuple(slice(o, o + n) for o, n in zip(at, size, strict=True))]
        assert_same(shard, expected, f"{what}, shard {number}")


@pytest.mark.judges("_state_dict_utils._offload_state_dict_to_cpu")
class TestOffload:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @every_second(list(LAYOUTS), start=1)
    def test_a_table_is_kept(self, judged: Any, mesh: Any, rank: int, layout: str) -> None:
        """A table must be in the snapshot with the shards of this rank."""
        size, placement, cut = LAYOUTS[layout]
        full = numbers(*size)
        boxes = cut(full)[rank]
        if not boxes:
            boxes = []
        got = judged({"table": table(full, mesh(2), [placement], boxes)})["table"]
        assert_table(got, full, boxes, layout)


@pytest.mark.judges("_state_dict_utils._create_cpu_state_dict")
class TestStaging:
    @pytest.mark.law("structure")
    @pytest.mark.should("upstream's buffers of a table take no copy")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @every_second(list(LAYOUTS))
    def test_a_table_is_staged(
        self, judged: Any, subject: Any, mesh: Any, rank: int, layout: str
    ) -> None:
        """Buffers for a table must take a copy of its shards."""
        size, placement, cut = LAYOUTS[layout]
        full = numbers(*size)
        boxes = cut(full)[rank]
        value = {"table": table(full, mesh(2), [placement], boxes)}
        copy = subject.function("_state_dict_utils._copy_state_dict")
        staged = copy(value, judged(value))["table"]
        assert_table(staged, full, boxes, layout)
        for shard in staged._local_tensor.local_shards():
            shard.zero_()
        assert_table(value["table"], full, boxes, f"{layout}, after its buffers were written")


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcast:
    @pytest.mark.law("values")
    @pytest.mark.should("upstream writes no table: a target of this class may be refused by name")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @every_second(list(LAYOUTS), start=1)
    def test_a_table_takes_its_part(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, layout: str
    ) -> None:
        """Each shard of a table must take its part of the full tensor."""
        size, placement, cut = LAYOUTS[layout]
        full, boxes = numbers(*size), cut(numbers(*size))[rank]
        local = {"table": table(numbers(*size, salt=1), mesh(2), [placement], boxes)}
        judged({"table": full} if rank == 0 else {}, local, device)
        assert_table(local["table"], full, boxes, layout)
