"""What FSDP1 calls for the DTensors of tensor parallelism, called as FSDP1 calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.fsdp import _fsdp_extensions as fsdp
from torch.distributed.fsdp._common_utils import _FSDPDeviceHandle, _is_fsdp_flattened
from torch.distributed.tensor import DTensor, Partial

from conformance.kit.compare import assert_same, assert_type, fingerprint, shares_memory
from conformance.kit.data import DTYPES, numbers
from conformance.kit.fsdp1 import (
    HELD,
    WHOLE_AND_ROWS,
    assert_chunked,
    chunk,
    fsdp_mesh,
    fsdp_rank,
    given,
    held_id,
    sharded,
    tp_local,
    tp_mesh,
)
from conformance.kit.layouts import ONE_D, R, S, dtensor, part, placement_id, rows, sharded_tensor
from conformance.kit.refusals import MISSING, refused
from conformance.kit.streams import STREAM, Handle, Waits

CPU: Any = _FSDPDeviceHandle.from_device(torch.device("cpu"))
"""What FSDP1 hands over when it trains on the CPU."""

CURRENT = object()


class Device(Handle):
    """A device module that also says which stream is the current one."""

    def __init__(self) -> None:
        super().__init__()
        self.streams: list[Any] = []
        self.in_use = CURRENT

    def current_stream(self) -> Any:
        return self.in_use

    def stream(self, stream: Any) -> Any:
        self.streams.append(stream)
        return super().stream(stream)


@pytest.mark.judges("tensor.parallel.fsdp.DTensorExtensions")
class TestOverTheSameMemory:
    @pytest.mark.law("autograd")
    @pytest.mark.world(1)
    def test_forwards_with_and_without_grad(self, judged: Any, mesh: Any) -> None:
        """Each forward gets a DTensor that trains as its own mode says, over the same memory."""
        full = numbers(4, 6).double()
        extensions, flat = judged(CPU), nn.Parameter(full.flatten())
        _, extension = fsdp._ext_pre_flatten_transform(
            dtensor(full, mesh(1), [S(0)]).requires_grad_(), extensions
        )
        modes = [torch.no_grad, torch.enable_grad, torch.no_grad]
        for number, mode in enumerate([*modes, *reversed(modes)]):
            flat.grad = None
            with mode():
                got: Any = fsdp._ext_post_unflatten_transform(
                    flat.view(4, 6), extension, extensions
                )
            trains = mode is torch.enable_grad
            assert got.requires_grad is trains, f"forward {number}: {got.requires_grad}"
            if trains:
                (got * 3).sum().backward()
                assert flat.grad is not None, f"forward {number}: no gradient"
                assert_same(flat.grad, torch.full_like(full, 3).flatten(), f"forward {number}")


@pytest.mark.judges("tensor.parallel.fsdp.DTensorExtensions")
class TestPreFlattenTransform:
    @pytest.mark.law("values")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("placements", ONE_D, ids=placement_id)
    @pytest.mark.thorough(but=["w1-S0", "w2-R", "w2-S1"])
    def test_the_local_tensor_and_its_description(
        self, judged: Any, mesh: Any, world: Any, placements: Any
    ) -> None:
        """A DTensor gives its local tensor, sharing storage, and what describes the whole."""
        line = mesh(world.size)
        for size in [(4, 6), (5, 3), (1, 1), (0, 3)]:
            full = numbers(*size)
            tensor = dtensor(full, line, placements)
            got, extension = fsdp._ext_pre_flatten_transform(tensor, judged(CPU))
            assert extension is not None, f"{size}: nothing describes it"
            assert_same(got.detach(), part(full, line, placements), str(size))
            assert not got.numel() or shares_memory(got, tensor), f"{size}: a copy"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_a_plain_tensor_is_itself(self, judged: Any) -> None:
        """What is no DTensor comes back as the same object, without a description."""
        for tensor in numbers(3), nn.Parameter(numbers(3)), numbers(2, dtype=torch.int64):
            got, extension = fsdp._ext_pre_flatten_transform(tensor, judged(CPU))
            assert got is tensor
            assert extension is None

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_the_parameter_stays_as_it_was(self, judged: Any, mesh: Any) -> None:
        """The parameter is not changed, and a second call gives the same."""
        weight = nn.Parameter(dtensor(numbers(5, 3), mesh(1), [S(0)]))
        before, extensions = fingerprint(weight), judged(CPU)
        first, _ = fsdp._ext_pre_flatten_transform(weight, extensions)
        second, _ = fsdp._ext_pre_flatten_transform(weight, extensions)
        assert fingerprint(weight) == before, "changed by the call"
        assert_same(first.detach(), numbers(5, 3))
        assert_same(second.detach(), numbers(5, 3))

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
    @pytest.mark.thorough(but=["w1-frozen", "w2-trained"])
    def test_requires_grad_is_the_parameters(
        self, judged: Any, mesh: Any, world: Any, trains: bool
    ) -> None:
        """A frozen weight stays frozen on its way through FSDP, and a trained one trains."""
        tensor = dtensor(numbers(5, 3), mesh(world.size), [S(0)])
        weight = nn.Parameter(tensor, requires_grad=trains)
        extensions = judged(CPU)
        got, extension = fsdp._ext_pre_flatten_transform(weight, extensions)
        assert got.requires_grad is trains, f"flattened: requires_grad {got.requires_grad}"
        assert weight.requires_grad is trains, "the parameter was changed"
        back = fsdp._ext_post_unflatten_transform(got, extension, extensions)
        assert back.requires_grad is trains, f"unflattened: requires_grad {back.requires_grad}"


@pytest.mark.judges("tensor.parallel.fsdp.DTensorExtensions")
class TestPostUnflattenTransform:
    @pytest.mark.law("values")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("placements", ONE_D, ids=placement_id)
    @pytest.mark.thorough(but=["w1-S0"])
    def test_the_dtensor_comes_back(
        self, judged: Any, mesh: Any, world: Any, placements: Any
    ) -> None:
        """Over FSDP's view of the local tensor stands the DTensor that was flattened."""
        line, extensions = mesh(world.size), judged(CPU)
        for size in [(4, 6), (5, 3), (1, 1), (0, 3)]:
            full = numbers(*size)
            tensor = dtensor(full, line, placements)
            _, extension = fsdp._ext_pre_flatten_transform(tensor, extensions)
            mine = part(full, line, placements).clone()
            flat = torch.cat([numbers(3), mine.reshape(-1)])
            view = flat[3:].view(mine.shape)
            got = fsdp._ext_post_unflatten_transform(view, extension, extensions)
            assert isinstance(got, DTensor), f"{size}: a {type(got).__name__}"
            assert got.placements == tuple(placements), f"{size}: {got.placements}"
            assert got.device_mesh == line, f"{size}: {got.device_mesh}"
            assert got.shape == full.shape, f"{size}: shape {tuple(got.shape)}"
            assert_same(got._local_tensor.detach(), mine, str(size))
            assert not mine.numel() or shares_memory(got, flat), f"{size}: a copy"

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_every_dtype(self, judged: Any, mesh: Any) -> None:
        """Every dtype goes there and back, integer and bool weights, too."""
        extensions = judged(CPU)
        for dtype in DTYPES:
            tensor = dtensor(numbers(4, dtype=dtype), mesh(1), [S(0)])
            got, extension = fsdp._ext_pre_flatten_transform(tensor, extensions)
            back: Any = fsdp._ext_post_unflatten_transform(got, extension, extensions)
            assert_same(back._local_tensor.detach(), numbers(4, dtype=dtype), str(dtype))

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_it_is_marked_as_flattened(self, judged: Any, mesh: Any) -> None:
        """The DTensor bears FSDP's mark, so that an outer FSDP does not flatten it once more."""
        extensions = judged(CPU)
        tensor = dtensor(numbers(4), mesh(1), [S(0)])
        local, extension = fsdp._ext_pre_flatten_transform(tensor, extensions)
        assert not _is_fsdp_flattened(local), "marked before"
        got = fsdp._ext_post_unflatten_transform(local, extension, extensions)
        assert _is_fsdp_flattened(got), "no mark"
        assert not _is_fsdp_flattened(tensor), "the DTensor that was flattened bears the mark"

    @pytest.mark.law("autograd")
    @pytest.mark.needs("functional gathers")
    @pytest.mark.world(2)
    def test_the_gradient_reaches_the_flat_parameter(self, judged: Any, mesh: Any) -> None:
        """The gradient lands in the weight's section of the flat parameter, complete, exact."""
        line, full, extensions = mesh(2), numbers(4, 3), judged(CPU)
        tensor = dtensor(full, line, [S(0)])
        _, extension = fsdp._ext_pre_flatten_transform(tensor, extensions)
        flat = nn.Parameter(numbers(10))
        view = flat[3:9].view(2, 3)
        got: Any = fsdp._ext_post_unflatten_transform(view, extension, extensions)
        whole = got.redistribute(placements=[R])
        whole.to_local(grad_placements=[Partial()]).sum().backward()
        expected = torch.zeros(10)
        expected[3:9] = 2
        assert flat.grad is not None
        assert_type(flat.grad, torch.Tensor, "the gradient")
        assert_same(flat.grad, expected)

    @pytest.mark.law("autograd")
    @pytest.mark.needs("functional gathers")
    @pytest.mark.world(2)
    def test_the_compute_stream(self, judged: Any, mesh: Any) -> None:
        """With a compute stream, views are made on it, and pending gradients waited for on it."""
        line, device = mesh(2), Device()
        extensions = judged(device)
        assert extensions.compute_stream is None, "a compute stream before FSDP gave one"
        extensions.compute_stream = STREAM
        _, extension = extensions.pre_flatten_transform(dtensor(numbers(4, 3), line, [S(0)]))
        local = numbers(2, 3).requires_grad_()
        got = extensions.post_unflatten_transform(local, extension)
        assert device.streams, "no stream was made current"
        assert set(device.streams) == {STREAM}, f"made on {device.streams}"
        assert device.current is None, "the stream is still current"
        whole = got.redistribute(placements=[R], async_op=True)
        with Waits(device) as waits:
            whole.to_local(grad_placements=[Partial()]).sum().backward()
        assert waits.streams[-1:] == [STREAM], f"waited for outside the stream: {waits.streams}"
        assert_same(local.grad, torch.full((2, 3), 2.0))

    @pytest.mark.law("autograd")
    @pytest.mark.world(1)
    def test_a_wrong_mesh(self, judged: Any, mesh: Any) -> None:
        """A mesh that is not the DTensor's must be refused, and so must none."""
        tensor = dtensor(numbers(4, 3), mesh(1, 1), [S(0), R])
        for wrong in (None, mesh(1)):
            refused(
                partial(judged(CPU).all_gather_dtensor, tensor, wrong), kinds=MISSING, what="a mesh"
            )

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_no_compute_stream(self, judged: Any, mesh: Any) -> None:
        """Without one nothing but the current stream is used; instances share none."""
        device = Device()
        first, second = judged(device), judged(device)
        first.compute_stream = STREAM
        assert second.compute_stream is None, "the stream of one instance is that of another"
        local, extension = second.pre_flatten_transform(dtensor(numbers(4), mesh(1), [S(0)]))
        second.post_unflatten_transform(local, extension)
        assert set(device.streams) <= {CURRENT}, f"made on {device.streams}"
        assert device.current is None
        device.streams, device.in_use = [], object()
        second.post_unflatten_transform(local, extension)
        assert set(device.streams) <= {device.in_use}, "made on the stream of an earlier forward"
        assert second.compute_stream is None, "a compute stream that nobody has given"

    @pytest.mark.law("autograd")
    @pytest.mark.world(1)
    def test_the_compiler_leaves_it_alone(self, judged: Any, mesh: Any) -> None:
        """In compiled code the transform runs as it is: a break, and no part of a graph."""
        extensions = judged(CPU)
        _, extension = extensions.pre_flatten_transform(dtensor(numbers(4), mesh(1), [S(0)]))
        graphs = CompileCounter()

        def code(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            double = tensor * 2
            transformed = extensions.post_unflatten_transform(double, extension)
            return tensor + 1, transformed

        compiled = torch.compile(code, backend=graphs)
        after, transformed = compiled(numbers(4))
        assert_same(after, numbers(4) + 1)
        assert type(transformed) is DTensor
        assert graphs.frame_count == 2, f"{graphs.frame_count} graphs, expected one on each side"
        assert graphs.op_count == 2, f"{graphs.op_count} operations were traced, expected two"


@pytest.mark.judges("tensor.parallel.fsdp.DTensorExtensions")
class TestStateDictTransforms:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @WHOLE_AND_ROWS
    def test_chunk_tensor(self, judged: Any, mesh: Any, held: Any) -> None:
        """FSDP's chunk comes as a ShardedTensor, and can be loaded from."""
        root = mesh(1, 4)
        full, extensions, pg = numbers(8, 4), judged(CPU), root["dp"].get_group()
        with torch.no_grad():
            got = fsdp._ext_chunk_tensor(
                tensor=given(full, root, held),
                rank=pg.rank(),
                world_size=pg.size(),
                num_devices_per_node=0,
                pg=pg,
                fsdp_extension=extensions,
            )
        tensor, shards = fsdp._ext_pre_load_state_dict_transform(got, extensions)
        assert isinstance(tensor, ShardedTensor)
        assert len(shards) == 1
        assert_same(shards[0].tensor, chunk(full, root, held))
        given_device = extensions.chunk_tensor(full, pg.rank(), 1, 0, pg, torch.device("cpu"))
        assert_same(given_device.local_shards()[0].tensor, full, "with a device")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("shape", [(2, 2), (1, 2, 2)], ids=["FSDP", "HSDP"])
    def test_chunk_dtensor(self, judged: Any, mesh: Any, shape: Any) -> None:
        """FSDP's chunk comes as a DTensor over the root mesh."""
        root, full, extensions = mesh(*shape), numbers(8, 4), judged(CPU)
        for held in (R, S(1), None):
            tensor, line = given(full, root, held), fsdp_mesh(root)
            got = fsdp._ext_chunk_dtensor(tensor, fsdp_rank(root), line, extensions)
            assert_chunked(got, full, root, held, held_id(held))

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("shape", [(2, 2), (1, 2, 2)], ids=["FSDP", "HSDP"])
    def test_all_gather_dtensor(self, judged: Any, mesh: Any, shape: Any) -> None:
        """The TP-local tensor comes from the chunks."""
        root, full, extensions = mesh(*shape), numbers(8, 4), judged(CPU)
        for held in HELD:
            tensor = dtensor(full, root, sharded(root, held))
            got = fsdp._ext_all_gather_dtensor(tensor, root, extensions)
            assert_same(got, tp_local(full, root, held), held_id(held))

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_pre_load_state_dict_transform(self, judged: Any) -> None:
        """A flat ShardedTensor comes with its shards."""
        full = numbers(5, 2)
        tensor = sharded_tensor(full, rows(full.shape, [3, 2]))
        got, shards = fsdp._ext_pre_load_state_dict_transform(tensor, judged(CPU))
        assert got is tensor
        assert [s.tensor for s in shards] == [s.tensor for s in tensor.local_shards()]

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_saved_and_loaded(self, judged: Any, mesh: Any) -> None:
        """A flattened weight survives its sharded state dict: chunked, gathered, unflattened."""
        root, full, extensions = mesh(2, 2), numbers(8, 4), judged(CPU)
        for held in (R, S(0), S(1)):
            weight = given(full, root, held)
            _, extension = fsdp._ext_pre_flatten_transform(weight, extensions)
            saved: Any = fsdp._ext_chunk_dtensor(weight, fsdp_rank(root), root["dp"], extensions)
            local = fsdp._ext_all_gather_dtensor(saved, root, extensions)
            got = fsdp._ext_post_unflatten_transform(local, extension, extensions)
            assert isinstance(got, DTensor)
            assert got.device_mesh == tp_mesh(root), held_id(held)
            assert got.placements == (held,), f"{held_id(held)}: {got.placements}"
            assert_same(got._local_tensor, tp_local(full, root, held), held_id(held))


@pytest.mark.judges("tensor.parallel.fsdp.DTensorExtensions")
class TestImport:
    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_nothing_is_registered(self, judged: Any) -> None:
        """Neither the module nor an instance makes itself FSDP's extension for all."""
        assert fsdp._extensions is None, "the module registered an extension"
        judged(CPU)
        assert fsdp._extensions is None, "the instance registered itself"

    @pytest.mark.law("isolation")
    @pytest.mark.should("another order of imports helps, and the failure is loud")
    @pytest.mark.world(1, limit=60)
    @pytest.mark.thorough
    def test_the_module_can_be_imported_first(self, judged: Any, subject: Any) -> None:
        """A fresh interpreter can import the module before all else of torch.distributed."""
        name = f"{subject.root}.tensor.parallel.fsdp"
        done = subprocess.run(
            [sys.executable, "-c", f"from {name} import DTensorExtensions"],
            env=dict(os.environ),
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        last = done.stderr.strip().rpartition("\n")[2]
        assert done.returncode == 0, f"import {name}: {last}"
