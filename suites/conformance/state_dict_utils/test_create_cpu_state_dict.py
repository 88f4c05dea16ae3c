"""CPU buffers with the structure of a state dict."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import nn

from conformance.kit.cases import each
from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_same, assert_unchanged, fingerprint, local
from conformance.kit.containers import CONTAINERS
from conformance.kit.data import EACH_DTYPE, SHAPES, VIEWS, numbers
from conformance.kit.generated import examples, state_dicts
from conformance.kit.layouts import ONE_D, R, S, dtensor, part, placement_id, rows, sharded_tensor
from conformance.kit.levels import STRIDES
from conformance.kit.memory import MIB, peak_growth
from conformance.kit.nested import (
    assert_apart,
    assert_same_structure,
    sample,
    spoil,
    storages,
    tensors,
)
from conformance.kit.refusals import refused

# Sharing memory goes through a storage class that torch announces the end of.
quiet = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")


def every_kind(mesh: Any, size: int) -> dict[str, Any]:
    """Tensors of each kind and of the shapes that are easily forgotten."""
    full = numbers(5, 2)
    return {
        "tensor": numbers(3),
        "parameter": nn.Parameter(numbers(2, 2)),
        "0-dim": numbers(),
        "empty": numbers(0, 3),
        "dtensor": dtensor(full, mesh(size), [S(0)]),
        "0-dim dtensor": dtensor(numbers(), mesh(size), ONE_D[0]),
        "sharded": sharded_tensor(full, rows(full.shape, [2, 1, 2], [size - 1, 0, size - 1])),
    }


def assert_structure(got: Any, expected: Any, what: str = "result") -> None:
    """The same structure and ties; contents and flags are unspecified."""
    assert_same_structure(got, expected, what, values=False, flags=False)


@pytest.mark.judges("_state_dict_utils._create_cpu_state_dict")
class TestCreateCpuStateDict:
    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_a_whole_state_dict(self, judged: Any, mesh: Any, world: Any) -> None:
        """Structure, kinds, dtypes, shapes and ties are those of the state dict, values aside."""
        value = sample(**every_kind(mesh, world.size))
        assert_structure(judged(value), value)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_every_container(self, judged: Any) -> None:
        """Containers keep type, keys and order."""

        def create(name: str) -> None:
            value = {"x": CONTAINERS[name](numbers(2, 3), numbers(3))}
            assert_structure(judged(value), value)

        each(CONTAINERS, create)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @EACH_DTYPE
    def test_every_dtype_and_shape(self, judged: Any, dtype: torch.dtype) -> None:
        """Every dtype and shape, whatever the strides of the original, gets a buffer like it."""
        value = {
            f"{shape} {view}": make(numbers(*shape, dtype=dtype))
            for shape in SHAPES
            for view, make in VIEWS.items()
        }
        got = judged(value)
        assert_structure(got, value)
        assert_apart(got, value)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_ties(self, judged: Any) -> None:
        """Tied tensors get one buffer, of every kind; others their own."""
        weight, view = nn.Parameter(numbers(3)), numbers(4, 2)
        value = {
            "a": weight, "b": [weight], "v": view, "w": view.view(4, 2),
            "p": numbers(3), "q": numbers(3),
        }  # fmt: skip
        got = judged(value)
        assert_structure(got, value)
        assert got["a"] is got["b"][0], "one Parameter became two buffers"

    @pytest.mark.law("structure")
    @pytest.mark.should(STRIDES)
    @pytest.mark.world(1)
    def test_memory_formats(self, judged: Any, mesh: Any) -> None:
        """Dense strides survive: transposed and channels-last tensors get buffers like them."""
        image = numbers(2, 3, 4, 5).to(memory_format=torch.channels_last)
        value = {
            "image": image,
            "transposed": numbers(4, 6).t(),
            "permuted": numbers(2, 3, 4).permute(2, 0, 1),
            "dtensor": dtensor(numbers(6, 4), mesh(1), [S(0)], local=numbers(4, 6).t()),
        }
        got = judged(value)
        for name, tensor in value.items():
            strides = local(got[name]).stride()
            assert strides == local(tensor).stride(), f"{name}: strides {strides}"

    @pytest.mark.law("cost")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("within", ["tensors", "dtensors"])
    def test_memory_of_views(self, judged: Any, mesh: Any, within: str) -> None:
        """A buffer takes the bytes of its elements, whatever lies between those of the tensor."""
        value = {
            "expanded": numbers(1, 3).expand(4, 3),
            "expanded within": numbers(2, 1, 3).expand(2, 4, 3),
            "every eighth": numbers(4, 32)[:, ::8],
            "columns": numbers(6, 9)[:, 2:5],
            "turned": numbers(32, 4)[::8].t(),
            "overlapping": numbers(10).as_strided((4, 3), (2, 1)),
        }
        if within == "dtensors":
            for name, tensor in value.items():
                value[name] = dtensor(tensor.contiguous(), mesh(1), [R], local=tensor)
        got = judged(value)
        for name, tensor in value.items():
            buffer = local(got[name])
            assert buffer.shape == tensor.shape, f"{name}: {buffer.shape}"
            taken, needed = buffer.untyped_storage().nbytes(), buffer.numel() * buffer.itemsize
            assert taken == needed, f"{name}: {taken} bytes for {needed}"
            buffer.copy_(local(tensor))
            assert_same(buffer, local(tensor), name)

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("placements", ONE_D, ids=placement_id)
    @pytest.mark.thorough(but=["R"])
    def test_dtensors(self, judged: Any, mesh: Any, placements: Any) -> None:
        """A DTensor's buffer has its mesh, placements and local shape; nothing is communicated."""
        line = mesh(2)
        for shape in [(4, 6), (5, 3), (1, 1), (0, 3), (3, 0)]:
            full = numbers(*shape)
            value = {"x": dtensor(full, line, placements)}
            with Collectives() as seen:
                got = judged(value)
            assert seen.count == 0, f"{shape}: {seen.names}"
            assert_structure(got, value, str(shape))
            assert_apart(got, value, str(shape))
            expected = part(full, line, placements).shape
            assert local(got["x"]).shape == expected, f"{shape}: {local(got['x']).shape}"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_generated_state_dicts(self, judged: Any, world: Any) -> None:
        """Generated state dicts get buffers of the same structure and ties, and stay untouched."""

        @examples(world.seed)
        @given(state_dicts())
        def create(value: Any) -> None:
            before, got = fingerprint(value), judged(value)
            assert_structure(got, value)
            assert_apart(got, value)
            assert_unchanged(value, before)

        create()

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    def test_buffers_are_new(self, judged: Any, mesh: Any, world: Any) -> None:
        """Buffers of every kind are new memory, and writing them leaves the state dict alone."""
        value = every_kind(mesh, world.size)
        before = fingerprint(value)
        got = judged(value)
        assert_apart(got, value)
        for name, tensor in value.items():
            assert got[name] is not tensor, f"{name}: the original itself"
        spoil(got)
        assert_unchanged(value, before)
        assert_apart(judged(value), got, "second call")

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_a_sharded_tensor_without_shards_here(self, judged: Any) -> None:
        """A ShardedTensor of which this rank holds nothing gets an object of its own as well."""
        full = numbers(4, 2)
        value = {"x": sharded_tensor(full, rows(full.shape, [4], [1]))}
        got = judged(value)
        same = got["x"] is value["x"]
        assert not same, "the original itself"
        assert_structure(got, value)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_meta_tensors_get_memory(self, judged: Any) -> None:
        """A tensor on meta gets a buffer on the CPU."""
        value = {"x": torch.empty(3, 2, device="meta"), "y": torch.empty((), device="meta")}
        got = judged(value)
        for name, tensor in got.items():
            assert tensor.device.type == "cpu", f"{name} lies on {tensor.device}"
            assert tensor.shape == value[name].shape, f"{name}: {tensor.shape}"

    @pytest.mark.law("cost")
    @pytest.mark.should("filling a buffer costs time; its contents are unspecified")
    @pytest.mark.world(1)
    @pytest.mark.needs("resident memory")
    @pytest.mark.parametrize("kind", ["tensor", "DTensor", "ShardedTensor"])
    @pytest.mark.thorough(but=["DTensor"])
    def test_nothing_is_copied(self, judged: Any, mesh: Any, kind: str) -> None:
        """Buffers are allocated, not filled: their memory is not even touched."""
        size = 256 * MIB
        full = torch.empty(size // 4 // 1024, 1024)
        tensor = {
            "tensor": lambda: full,
            "DTensor": lambda: dtensor(full, mesh(1), [S(0)], local=full),
            "ShardedTensor": lambda: sharded_tensor(full, rows(full.shape, [len(full)])),
        }[kind]()
        grown = peak_growth(lambda: judged({"x": tensor}))
        assert grown < size // 4, f"{grown // MIB} MiB written for {size // MIB} MiB of buffers"

    @pytest.mark.law("autograd")
    @pytest.mark.world(1)
    def test_no_graph(self, judged: Any, mesh: Any) -> None:
        """Buffers are part of no graph, also where the original is a result."""
        weight, full = nn.Parameter(numbers(3)), numbers(4, 2)
        value = {
            "weight": weight,
            "result": weight * 2,
            "dtensor": nn.Parameter(dtensor(full, mesh(1), [S(0)])),
            "sharded": sharded_tensor(full, rows(full.shape, [2, 2], [0, 0])),
        }
        got = judged(value)
        for name, tensor in {**tensors(got), **got}.items():
            assert tensor.grad_fn is None, f"{name} is part of a graph"
            assert not tensor.requires_grad, f"{name} requires grad: nobody may write into it"

    @quiet
    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_shared_memory(self, judged: Any, mesh: Any, world: Any) -> None:
        """With share_memory every buffer lies in shared memory, of every kind and shape."""
        value = every_kind(mesh, world.size)
        got = judged(value, share_memory=True)
        assert_structure(got, value)
        for path, tensor in tensors(got).items():
            for plain in storages(tensor):
                assert plain.numel() == 0 or plain.is_shared(), f"{path}: not in shared memory"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("share", [False, True], ids=["pin", "pin-and-share"])
    @pytest.mark.parametrize("shape", [(3,), ()], ids=["1-dim", "0-dim"])
    @quiet
    def test_pinned_or_refused(self, judged: Any, share: bool, shape: tuple[int, ...]) -> None:
        """With pin_memory every buffer is page-locked; where nothing can be, a clear error."""
        if not torch.accelerator.is_available():
            alone = {"x": numbers(*shape)}
            told = re.compile("(?i)pin|page.?lock|accelerator|cuda|gpu")
            refused(
                lambda: judged(alone, pin_memory=True, share_memory=share),
                told,
                kinds=(RuntimeError, ValueError),
                what="pin_memory without an accelerator",
            )
            return
        value = sample(tensor=numbers(*shape))
        got = judged(value, pin_memory=True, share_memory=share)
        assert_structure(got, value)
        for path, tensor in tensors(got).items():
            assert tensor.numel() == 0 or tensor.is_pinned(), f"{path} is not pinned"
            assert tensor.numel() == 0 or not share or tensor.is_shared(), f"{path} is not shared"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_nothing_to_pin(self, judged: Any) -> None:
        """A state dict without elements must be staged with pin_memory, too, on any machine."""
        value = {"step": 3, "groups": [{"lr": 0.1, "none": numbers(0, 3)}]}
        got = judged(value, pin_memory=True)
        assert_structure(got, value)
        assert (got["step"], got["groups"][0]["lr"]) == (3, 0.1)
