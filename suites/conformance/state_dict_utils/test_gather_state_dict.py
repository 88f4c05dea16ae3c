"""_gather_state_dict, what comes out: values and structure."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Partial, Placement, Shard

from conformance.kit.compare import assert_same, local
from conformance.kit.data import EACH_DTYPE, SHAPES, VIEWS, numbers
from conformance.kit.layouts import (
    SOME_OF_TWO_D,
    THREE_D,
    TWO_D,
    R,
    S,
    dtensor,
    part,
    placement_id,
    rows,
    sharded_tensor,
)
from conformance.kit.levels import STRIDES
from conformance.kit.nested import Pair, assert_same_structure, sample, with_metadata


def _fits(shape: tuple[int, ...], placements: list[Placement]) -> bool:
    """Whether the tensor has every dimension that the placements shard."""
    return all(not isinstance(p, Shard) or p.dim < len(shape) for p in placements)


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherStateDictValues:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @EACH_DTYPE
    def test_every_dtype_is_gathered_to_the_bit(
        self, judged: Any, mesh: Any, dtype: torch.dtype
    ) -> None:
        """A DTensor of every dtype is gathered bit for bit."""
        full = numbers(7, 3, dtype=dtype)
        assert_same(judged({"w": dtensor(full, mesh(2), [S(0)])})["w"], full)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_dtypes_in_one_state_dict_do_not_mix(self, judged: Any, mesh: Any) -> None:
        """Tensors of different dtypes, gathered in one call, each keep theirs."""
        dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
        fulls = {f"{d}{n}": numbers(n, dtype=d, salt=n) for n in (1, 4, 7) for d in dtypes}
        got = judged({k: dtensor(full, mesh(2), [S(0)]) for k, full in fulls.items()})
        for key, full in fulls.items():
            assert_same(got[key], full, key)

    @pytest.mark.law("values")
    @pytest.mark.world(1, 2, 3, 4)
    @pytest.mark.parametrize("placement", [R, S(0), S(1), S(2)], ids=lambda p: placement_id([p]))
    @pytest.mark.thorough(but=["w1-R", "w2-S0", "w2-S2", "w3-S1", "w3-R", "w4-S0"])
    def test_every_shape_is_gathered(
        self, judged: Any, mesh: Any, world: Any, placement: Placement
    ) -> None:
        """Even, uneven and empty shards, 0-dim and zero-size tensors come out whole."""
        fulls = {str(s): numbers(*s, salt=i) for i, s in enumerate(SHAPES) if _fits(s, [placement])}
        got = judged({k: dtensor(full, mesh(world.size), [placement]) for k, full in fulls.items()})
        for key, full in fulls.items():
            assert_same(got[key], full, f"shape {key}")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("placements", TWO_D, ids=placement_id)
    @SOME_OF_TWO_D
    @pytest.mark.thorough(but=["S0-S1"])
    def test_every_placement_on_a_2d_mesh_is_gathered(
        self, judged: Any, mesh: Any, placements: list[Placement]
    ) -> None:
        """Every combination on a 2-D mesh, FSDP over TP included, is gathered for every length."""
        shapes = [(8, 8), (9, 5), (7, 7), (5, 6), (3, 3), (2, 2), (1, 1), (0, 3)]
        fulls = {str(s): numbers(*s, salt=i) for i, s in enumerate(shapes)}
        got = judged({k: dtensor(full, mesh(2, 2), placements) for k, full in fulls.items()})
        for key, full in fulls.items():
            assert_same(got[key], full, f"shape {key}")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("placements", THREE_D, ids=placement_id)
    @pytest.mark.thorough(but=["S0-S1"])
    def test_every_placement_on_a_3d_mesh_is_gathered(
        self, judged: Any, mesh: Any, placements: list[Placement]
    ) -> None:
        """A DTensor on a 3-D mesh is gathered over all of its dimensions."""
        for shape in ((1, 2, 2), (2, 1, 2), (2, 2, 1)):
            full = numbers(8, 6)
            got = judged({"w": dtensor(full, mesh(*shape), placements)})
            assert_same(got["w"], full, f"mesh {shape}")

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("op", ["sum", "avg", "max", "min", "product"])
    @pytest.mark.thorough(but=["sum", "avg", "max"])
    def test_partial_values_are_reduced(self, judged: Any, mesh: Any, rank: int, op: str) -> None:
        """A Partial DTensor comes out as its reduced value, the same on every rank."""
        pair = [numbers(4, 3, salt=s) for s in (0, 1)]
        expected = {
            "sum": pair[0] + pair[1],
            "avg": (pair[0] + pair[1]) / 2,
            "max": torch.maximum(*pair),
            "min": torch.minimum(*pair),
            "product": pair[0] * pair[1],
        }[op]
        got = judged({"w": dtensor(pair[0], mesh(2), [Partial(op)], local=pair[rank].clone())})
        assert_same(got["w"], expected)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_partial_and_sharded_at_once(self, judged: Any, mesh: Any) -> None:
        """A DTensor that is Partial over one mesh dimension and sharded over the other is both."""
        grid = mesh(2, 2)
        pair = [numbers(5, 3, salt=s) for s in (0, 1)]
        mine = part(pair[grid.get_coordinate()[0]], grid, [R, S(0)]).clone()
        got = judged({"w": dtensor(pair[0], grid, [Partial("sum"), S(0)], local=mine)})
        assert_same(got["w"], pair[0] + pair[1])

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("view", VIEWS)
    @pytest.mark.thorough(but=["transposed", "offset", "expanded"])
    def test_local_tensors_of_every_layout_are_read(
        self, judged: Any, mesh: Any, view: str
    ) -> None:
        """A DTensor's local tensor is read in logical order, whatever its strides and offset."""
        line = mesh(2)
        whole = numbers(6, 4)
        parts = [VIEWS[view](part(whole, line, [S(0)], [i]).clone()) for i in (0, 1)]
        full = torch.cat(parts)
        got = judged({"w": dtensor(full, line, [S(0)], local=parts[line.get_coordinate()[0]])})
        assert_same(got["w"], full)

    @pytest.mark.law("values")
    @pytest.mark.needs("functional gathers")
    @pytest.mark.world(2)
    def test_a_pending_collective_is_waited_for(self, judged: Any, mesh: Any) -> None:
        """A DTensor whose local tensor is still on its way comes out finished and plain."""
        full = numbers(6, 4)
        pending = dtensor(full, mesh(2), [S(0)]).redistribute(placements=[R], async_op=True)
        assert isinstance(local(pending), AsyncCollectiveTensor), "nothing is pending"
        got = judged({"w": pending})["w"]
        assert not isinstance(got, AsyncCollectiveTensor), "the result is not waited for"
        assert_same(got, full)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_a_tensor_larger_than_a_bucket(self, judged: Any, mesh: Any) -> None:
        """A tensor of 100 MB comes out whole beside small ones, in any number of pieces."""
        line = mesh(2)
        fulls = {
            "before": numbers(7),
            "big": torch.arange(25_000_003, dtype=torch.int32),
            "after": numbers(5, dtype=torch.bfloat16),
        }
        got = judged({key: dtensor(full, line, [S(0)]) for key, full in fulls.items()})
        for key, full in fulls.items():
            assert_same(got[key], full, key)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_every_kind_of_tensor_in_one_state_dict(self, judged: Any, mesh: Any) -> None:
        """ShardedTensors, DTensors and plain tensors in one state dict each come out whole."""
        fulls = [numbers(6, 3, salt=i) for i in range(4)]
        got = judged(
            {
                "sharded": sharded_tensor(fulls[0], rows((6, 3), [3, 3])),
                "rows": dtensor(fulls[1], mesh(2), [S(0)]),
                "columns": dtensor(fulls[2], mesh(2), [S(1)]),
                "plain": fulls[3].clone(),
            }
        )
        for key, full in zip(("sharded", "rows", "columns", "plain"), fulls, strict=True):
            assert_same(got[key], full, key)

    @pytest.mark.law("values")
    @pytest.mark.world(3)
    def test_sharded_tensors_of_other_layouts_are_gathered(self, judged: Any) -> None:
        """A state dict's ShardedTensors may be sharded in any way that metadata can state."""
        layouts = {
            "uneven": rows((6, 3), [1, 3, 2]),
            "turned": rows((6, 3), [2, 2, 2], [2, 0, 1]),
            "first rank without": rows((6, 3), [3, 3], [1, 2]),
            "several a rank": rows((6, 3), [1] * 6, [0, 1, 2, 0, 1, 2]),
            "columns": rows((6, 3), [1, 1, 1], dim=1),
        }
        fulls = {key: numbers(6, 3, salt=i) for i, key in enumerate(layouts)}
        got = judged({key: sharded_tensor(fulls[key], boxes) for key, boxes in layouts.items()})
        for key, full in fulls.items():
            assert_same(got[key], full, key)

    @pytest.mark.law("values")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("cpu_offload", [True, False], ids=["offload", "stay"])
    @pytest.mark.thorough(but=["w1-stay", "w2-offload", "w2-stay"])
    def test_results_are_on_the_leafs_device_or_the_cpu(
        self, judged: Any, mesh: Any, world: Any, device: torch.device, cpu_offload: bool
    ) -> None:
        """A gathered tensor is on its leaf's device, with `cpu_offload` in CPU memory."""
        full = numbers(6, 3, device=device)
        leaves = {
            "rows": dtensor(full, mesh(world.size), [S(0)]),
            "whole": dtensor(full, mesh(world.size), [R]),
            "plain": full.clone(),
        }
        for key, got in judged(leaves, cpu_offload=cpu_offload).items():
            assert_same(got, full, key)
            expected = "cpu" if cpu_offload else device.type
            assert got.device.type == expected, f"{key}: on {got.device}, expected {expected}"


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherStateDictStructure:
    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_containers_keep_type_keys_and_order(self, judged: Any, mesh: Any) -> None:
        """Containers keep type, key types, key order and `_metadata`; empty ones stay."""
        fulls = [numbers(5, 3, salt=i) for i in range(4)]
        sharded = [dtensor(full, mesh(2), [S(0)]) for full in fulls]

        def build(t: list[Any]) -> dict[str, Any]:
            return {
                "z": with_metadata(("b", t[0]), ("a", {}), version=3),
                "a": {7: t[1], "7": [t[2], (), {}], True: None},
                "pair": Pair(t[3], (1, [2.5])),
                "end": (),
            }

        got = judged(build(sharded))
        assert_same_structure(got, build(fulls))

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_a_state_dict_of_plain_leaves_keeps_its_structure(self, judged: Any) -> None:
        """Parameters, frozen and integer ones, ties, buffers and values stay what they are."""
        expected = sample()
        assert_same_structure(judged(sample(), type_check=False), expected)

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_leaves_that_are_no_tensors_pass(self, judged: Any, mesh: Any) -> None:
        """Numbers, text, bytes, streams and None arrive as they are, beside gathered tensors."""
        full = numbers(4)
        plain = {"n": 3, "x": 2.5, "yes": True, "s": "text", "b": b"raw", "none": None}
        got = judged({**plain, "stream": io.BytesIO(b"abc"), "w": dtensor(full, mesh(2), [S(0)])})
        assert {k: got[k] for k in plain} == plain
        assert got["stream"].getvalue() == b"abc"
        assert list(got) == [*plain, "stream", "w"]

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_without_type_check_an_unknown_leaf_is_copied(self, judged: Any, mesh: Any) -> None:
        """With `type_check` off a leaf of another type arrives as a deep copy."""
        leaf = slice(1, [2])
        got = judged({"odd": leaf, "w": dtensor(numbers(4), mesh(2), [S(0)])}, type_check=False)
        assert got["odd"] == leaf
        assert got["odd"] is not leaf, "the leaf itself, expected a copy"

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("kind", ["rows", "replicated", "plain", "sharded tensor"])
    @pytest.mark.thorough(but=["w1-plain", "w2-rows", "w2-replicated", "w2-sharded tensor"])
    def test_tied_tensors_stay_tied(self, judged: Any, mesh: Any, world: Any, kind: str) -> None:
        """Leaves that share memory share it in the result; equal ones that do not stay apart."""
        full = numbers(6, 3)

        def make() -> Any:
            if kind == "plain":
                return full.clone()
            if kind == "sharded tensor":
                return sharded_tensor(full, rows((6, 3), [6 // world.size] * world.size))
            return dtensor(full, mesh(world.size), [S(0) if kind == "rows" else R])

        tied = make()
        got = judged({"a": tied, "in": [{"b": tied}], "twin": make()})
        a, b, twin = got["a"], got["in"][0]["b"], got["twin"]
        for key, tensor in (("a", a), ("in.0.b", b), ("twin", twin)):
            assert_same(tensor, full, key)
        assert a.data_ptr() == b.data_ptr(), "a and in.0.b have come apart"
        assert a.data_ptr() != twin.data_ptr(), "a and twin have become one"

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_tied_parameters_over_one_local_tensor_stay_tied(self, judged: Any, mesh: Any) -> None:
        """Two DTensor Parameters over one local tensor are tied in the result, too."""
        full = numbers(6, 3)
        first = dtensor(full, mesh(2), [S(0)])
        second = dtensor(full, mesh(2), [S(0)], local=first._local_tensor)
        got = judged({"a": nn.Parameter(first), "b": nn.Parameter(second)})
        assert_same(got["a"], full, "a")
        assert_same(got["b"], full, "b")
        assert got["a"].data_ptr() == got["b"].data_ptr(), "a and b have come apart"

    @pytest.mark.law("structure")
    @pytest.mark.should(STRIDES)
    @pytest.mark.world(2)
    def test_gathered_leaves_keep_their_memory_format(self, judged: Any, mesh: Any) -> None:
        """A gathered tensor has the strides that its DTensor says, transposed or channels_last."""
        images = numbers(4, 3, 2, 5).to(memory_format=torch.channels_last)
        for full in (images, numbers(6, 4).t()):
            here = part(full, mesh(2), [S(0)])
            leaf = DTensor.from_local(
                here, mesh(2), [S(0)], run_check=False, shape=full.shape, stride=full.stride()
            )
            got = judged({"w": leaf})["w"]
            assert_same(got, full)
            assert got.stride() == full.stride(), f"strides {got.stride()}, not {full.stride()}"

    @pytest.mark.law("structure")
    @pytest.mark.should(STRIDES)
    @pytest.mark.world(2)
    @pytest.mark.parametrize("cpu_offload", [True, False], ids=["offload", "stay"])
    def test_plain_leaves_keep_their_memory_format(
        self, judged: Any, mesh: Any, cpu_offload: bool
    ) -> None:
        """A plain leaf keeps its memory format beside gathered ones."""
        image = numbers(2, 3, 4, 5).to(memory_format=torch.channels_last)
        leaves = {"image": image, "w": dtensor(numbers(4), mesh(2), [S(0)])}
        got = judged(leaves, cpu_offload=cpu_offload)["image"]
        assert got.stride() == image.stride(), f"strides {got.stride()}, expected {image.stride()}"
        assert_same(got, image)

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_no_dtensor_is_left(self, judged: Any, mesh: Any) -> None:
        """Every DTensor comes out as a plain tensor, also a replicated one and a Parameter."""
        line = mesh(2)
        got = judged(
            {
                "whole": dtensor(numbers(4), line, [R]),
                "param": nn.Parameter(dtensor(numbers(4), line, [S(0)])),
                "scalar": dtensor(numbers(), line, [R]),
            }
        )
        left = [key for key, value in got.items() if isinstance(value, DTensor)]
        assert not left, f"still DTensors: {left}"
