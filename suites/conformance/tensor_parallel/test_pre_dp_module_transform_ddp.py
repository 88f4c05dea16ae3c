"""A transformed tensor-parallel module under DistributedDataParallel, on two by two ranks."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from conformance.kit.agree import assert_raises_everywhere
from conformance.kit.compare import assert_same, local
from conformance.kit.data import numbers
from conformance.kit.layouts import S, dtensor, part
from conformance.kit.tensor_parallel import (
    SHARDED,
    Net,
    Scaled,
    assert_trained,
    backward,
    batch,
    cut,
    loss,
    net,
    sgd,
    weight,
)


def wrap(module: nn.Module, grid: Any, **options: Any) -> DistributedDataParallel:
    """The module under DDP over the data-parallel dimension."""
    return DistributedDataParallel(module, process_group=grid["dp"].get_group(), **options)


def backward_of_all(oracle: Net, *salts: int) -> None:
    """What the replicas' batches of these salts give together: DDP takes the mean of two."""
    for salt in salts:
        (loss(oracle(batch(salt)), salt) / 2).backward()


def net_of(judged: Any, tp: Any) -> Net:
    """Another transformed net, with weights of its own."""
    module = net(tp, salt=2)
    judged(module)
    return module


@pytest.mark.judges("tensor.parallel.ddp._pre_dp_module_transform")
class TestPreDpModuleTransformUnderDdp:
    @pytest.mark.law("autograd")
    @pytest.mark.world(4)
    @pytest.mark.parametrize(
        ("hidden", "options"),
        [(8, {}), (3, {"gradient_as_bucket_view": True})],
        ids=["even", "uneven, gradients as views"],
    )
    @pytest.mark.thorough(but=["uneven, gradients as views"])
    def test_steps(self, judged: Any, mesh: Any, hidden: int, options: Any) -> None:
        """Three steps are those of the unsharded model on the batches of all replicas."""
        grid = mesh(2, 2)
        tp, replica = grid["tp"], grid.get_local_rank("dp")
        oracle = net(hidden=hidden)
        # DDP sends the first replica's weights to the others.
        module = net(tp, hidden, salt=replica)
        judged(module)
        wrapped, held = wrap(module, grid, **options), dict(module.named_parameters())
        ours, theirs = sgd(wrapped), sgd(oracle)
        for step in range(3):
            ours.zero_grad()
            theirs.zero_grad()
            backward(wrapped, 2 * step + replica)
            backward_of_all(oracle, 2 * step, 2 * step + 1)
            ours.step()
            theirs.step()
            assert_trained(held, tp, oracle, f"step {step}")

    @pytest.mark.law("autograd")
    @pytest.mark.world(4)
    def test_frozen_weights_do_not_train(self, judged: Any, mesh: Any) -> None:
        """Frozen weights, sharded and replicated, stay as they are and get no gradient."""
        grid, frozen = mesh(2, 2), ["up.weight", "down.bias"]
        tp, replica = grid["tp"], grid.get_local_rank("dp")
        module, oracle = net(tp, frozen=frozen), net(frozen=frozen)
        judged(module)
        wrapped, held = wrap(module, grid), dict(module.named_parameters())
        ours, theirs = sgd(wrapped), sgd(oracle)
        backward(wrapped, replica)
        backward_of_all(oracle, 0, 1)
        ours.step()
        theirs.step()
        assert_trained(held, tp, oracle, "after a step")

    @pytest.mark.law("autograd")
    @pytest.mark.world(4)
    def test_accumulation_without_sync(self, judged: Any, mesh: Any) -> None:
        """Under no_sync gradients gather on each replica; the next backward averages them all."""
        grid = mesh(2, 2)
        tp, replica = grid["tp"], grid.get_local_rank("dp")
        module, oracle = net(tp), net()
        judged(module)
        wrapped, held = wrap(module, grid), dict(module.named_parameters())
        ours, theirs = sgd(wrapped), sgd(oracle)
        for number in range(2):
            ours.zero_grad()
            theirs.zero_grad()
            with wrapped.no_sync():
                backward(wrapped, replica)
            backward(wrapped, 4 + replica)
            backward_of_all(oracle, 0, 1, 4, 5)
            assert_trained(held, tp, oracle, f"round {number}")

    @pytest.mark.law("autograd")
    @pytest.mark.world(4)
    def test_weights_that_a_forward_does_not_use(self, judged: Any, mesh: Any) -> None:
        """DDP finds weights that have no part in a forward, and reduces the others."""
        grid = mesh(2, 2)
        tp = grid["tp"]
        full = {n: numbers(4, salt=i) for i, n in enumerate("ab")}
        factors = {n: part(full[n] + 1, tp, [S(0)]) for n in "ab"}
        module = Scaled({}, **{n: weight(full[n], tp, [S(0)]) for n in "ab"})
        judged(module)
        held = dict(module.named_parameters())
        wrapped = wrap(module, grid, find_unused_parameters=True)
        for used in ("a", "b", "ab"):
            module.factors = {n: factors[n] for n in used}
            for param in held.values():
                param.grad = None
            wrapped().backward()
            for name in "ab":
                grad = held[name].grad
                if name in used:
                    assert_same(grad, part(full[name] + 1, tp, [S(0)]), f"{used}: {name}")
                else:
                    assert grad is None or not grad.any(), f"{used}: {name} has {grad}"

    @pytest.mark.law("structure")
    @pytest.mark.world(4)
    def test_a_failed_forward(self, judged: Any, mesh: Any) -> None:
        """After a forward that failed, DDP and the module go on with the same Parameters."""
        grid = mesh(2, 2)
        tp, replica = grid["tp"], grid.get_local_rank("dp")
        module, oracle = net(tp), net()
        judged(module)
        wrapped, held = wrap(module, grid), dict(module.named_parameters())
        with pytest.raises(ZeroDivisionError):
            wrapped(batch(), lambda _: 1 // 0)
        assert {n: id(p) for n, p in module.named_parameters()} == {
            n: id(p) for n, p in held.items()
        }
        backward(wrapped, replica)
        backward_of_all(oracle, 0, 1)
        assert_trained(held, tp, oracle, "after the failure")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_state_dicts(self, judged: Any, mesh: Any) -> None:
        """Through DDP the full state dict is global, the sharded one DTensors; both are loaded."""
        grid, full = mesh(2, 2), StateDictOptions(full_state_dict=True)
        tp, oracle, other = grid["tp"], net(), net(salt=1)
        module = net(tp)
        judged(module)
        wrapped, held = wrap(module, grid), dict(module.named_parameters())
        backward(wrapped)
        backward(oracle)
        for options in (None, full):
            state, expected = get_model_state_dict(wrapped, options=options), oracle.state_dict()
            assert list(state) == list(expected), f"{options}: {list(state)}"
            for name, value in expected.items():
                got: Any = state[name]
                whole = name in SHARDED and options is None
                assert isinstance(got, DTensor) is whole, f"{name}: a {type(got).__name__}"
                assert_same(local(got), cut(value, tp, name) if whole else value, name)
        wrapped.zero_grad()
        set_model_state_dict(wrapped, dict(other.state_dict()), options=full)
        assert_trained(held, tp, other, "a full one loaded")
        set_model_state_dict(wrapped, get_model_state_dict(wrap(net_of(judged, tp), grid)))
        assert_trained(held, tp, net(salt=2), "a sharded one loaded")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_a_sharded_buffer(self, judged: Any, mesh: Any) -> None:
        """A module with a DTensor as buffer can be wrapped, and its replicas agree on it."""
        grid = mesh(2, 2)
        tp, replica = grid["tp"], grid.get_local_rank("dp")
        full = numbers(5, 2)
        module = Scaled({"a": part(full, tp, [S(0)])}, a=weight(full, tp, [S(0)]))
        module.register_buffer("mask", dtensor(full + replica, tp, [S(0)]))
        judged(module)
        held = dict(module.named_parameters())
        wrapped = wrap(module, grid)
        wrapped().backward()
        assert_same(held["a"].grad, part(full, tp, [S(0)]), "gradient")
        assert_same(local(module.get_buffer("mask")), part(full, tp, [S(0)]), "buffer")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    def test_replicate_by_a_group(self, judged: Any, mesh: Any) -> None:
        """replicate() must take the transformed module with a group, as its docstring says."""
        grid = mesh(2, 2)
        tp, replica = grid["tp"], grid.get_local_rank("dp")
        module, oracle = net(tp), net()
        judged(module)
        held = dict(module.named_parameters())
        wrapped = replicate(module, process_group=grid["dp"].get_group())
        ours, theirs = sgd(wrapped), sgd(oracle)
        for step in range(2):
            ours.zero_grad()
            theirs.zero_grad()
            backward(wrapped, 2 * step + replica)
            backward_of_all(oracle, 2 * step, 2 * step + 1)
            ours.step()
            theirs.step()
            assert_trained(held, tp, oracle, f"step {step}")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("how", [DistributedDataParallel, replicate], ids=["ddp", "replicate"])
    def test_a_group_that_would_mix_shards(
        self, judged: Any, mesh: Any, world: Any, how: Any
    ) -> None:
        """Data parallelism over ranks of other shards must be refused by name, on every rank."""
        module = net(mesh(2, 2)["tp"])
        judged(module)
        wrapped = how(module)
        for _ in range(2):  # the second forward is refused like the first
            assert_raises_everywhere(world, lambda: wrapped(batch()), "parameter 'weight' of Layer")
