"""A transformed tensor-parallel module trains step for step like the unsharded one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.layouts import THREE_D, TWO_D, S, part, placement_id
from conformance.kit.tensor_parallel import (
    Layer,
    Net,
    Scaled,
    assert_trained,
    backward,
    bag,
    batch,
    loss,
    net,
    sgd,
    small,
    spread,
    weight,
    whole,
)


class Tied(nn.Module):
    """One weight in a module used twice, in another module, and under another name."""

    def __init__(self, tied: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.first = Layer(tied, bias)
        self.again = self.first
        self.alias = tied
        self.last = bag(w=tied)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = whole(self.again(whole(self.first(x))))
        back = whole(spread(hidden, self.last.w) @ self.last.w)
        return back + whole(spread(x, self.alias) @ self.alias.t())


@pytest.mark.judges("tensor.parallel.ddp._pre_dp_module_transform")
class TestPreDpModuleTransformTraining:
    @pytest.mark.law("autograd")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("hidden", [8, 3, 1], ids=["even", "uneven", "empty shards"])
    @pytest.mark.thorough(but=["empty shards"])
    def test_steps(self, judged: Any, mesh: Any, world: Any, hidden: int) -> None:
        """Three steps of SGD with momentum give the unsharded model's weights, to the bit."""
        line, oracle = mesh(world.size), net(hidden=hidden)
        module = net(line, hidden)
        judged(module)
        held = dict(module.named_parameters())
        ours, theirs = sgd(module), sgd(oracle)
        for step in range(3):
            for model, optimizer in ((module, ours), (oracle, theirs)):
                optimizer.zero_grad()
                backward(model, step)
                optimizer.step()
            assert_trained(held, line, oracle, f"step {step}")

    @pytest.mark.law("autograd")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w2"])
    def test_frozen_weights_do_not_train(self, judged: Any, mesh: Any, world: Any) -> None:
        """Frozen weights stay as they are while the others train; they get no gradient."""
        line, frozen = mesh(world.size), ["up.weight", "down.bias"]
        module, oracle = net(line, frozen=frozen), net(frozen=frozen)
        judged(module)
        held = dict(module.named_parameters())
        ours, theirs = sgd(module), sgd(oracle)
        for step in range(2):
            for model, optimizer in ((module, ours), (oracle, theirs)):
                backward(model, step)
                optimizer.step()
            assert_trained(held, line, oracle, f"step {step}")

    @pytest.mark.law("autograd")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w2"])
    def test_frozen_and_thawed_later(self, judged: Any, mesh: Any, world: Any) -> None:
        """Weights that are frozen, or thawed, after the transform follow from the next forward."""
        line = mesh(world.size)
        module, oracle = net(line), net()
        judged(module)
        held = dict(module.named_parameters())
        ours, theirs = sgd(module), sgd(oracle)
        for what, name, trains in (
            ("as made", "up.weight", True),
            ("frozen", "up.weight", False),
            ("thawed", "up.weight", True),
            ("another frozen", "down.weight", False),
        ):
            ours.zero_grad()
            theirs.zero_grad()
            held[name].requires_grad_(trains)
            oracle.get_parameter(name).requires_grad_(trains)
            backward(module)
            backward(oracle)
            assert_trained(held, line, oracle, what)

    @pytest.mark.law("autograd")
    @pytest.mark.world(4)
    def test_placements_over_two_and_three_dimensions(self, judged: Any, mesh: Any) -> None:
        """For each placement over 2-D and 3-D meshes, uneven shards too, gradients are exact."""
        for grid, combinations in ((mesh(2, 2), TWO_D), (mesh(1, 2, 2), THREE_D)):
            full = {f"w{i}": numbers(5, 3, salt=i) for i in range(len(combinations))}
            where = dict(zip(full, combinations, strict=True))
            module = Scaled(
                {n: part(t + 1, grid, where[n]) for n, t in full.items()},
                **{n: weight(t, grid, where[n]) for n, t in full.items()},
            )
            judged(module)
            held = dict(module.named_parameters())
            for number in (1, 2):
                module().backward()
                for name, values in full.items():
                    expected = part((values + 1) * number, grid, where[name])
                    what = f"{placement_id(where[name])}, backward {number}"
                    assert_same(held[name].grad, expected, what)

    @pytest.mark.law("autograd")
    @pytest.mark.world(4)
    def test_steps_over_a_whole_mesh(self, judged: Any, mesh: Any) -> None:
        """A model whose weights lie on a mesh of two dimensions trains step for step."""
        grid, oracle = mesh(2, 2), net(hidden=5)
        module = net(grid, 5)
        judged(module)
        held = dict(module.named_parameters())
        ours, theirs = sgd(module), sgd(oracle)
        for step in range(2):
            for model, optimizer in ((module, ours), (oracle, theirs)):
                backward(model, step)
                optimizer.step()
            assert_trained(held, grid, oracle, f"step {step}")

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    def test_a_mesh_of_some_ranks(self, judged: Any, mesh: Any, rank: int) -> None:
        """On a mesh without rank 0 its members train alone; the other ranks take no part."""
        line = mesh(2, ranks=[1, 3])
        if rank in (1, 3):
            module, oracle = net(line), net()
            judged(module)
            held = dict(module.named_parameters())
            backward(module)
            backward(oracle)
            assert_trained(held, line, oracle, "on ranks 1 and 3")

    @pytest.mark.law("autograd")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    @pytest.mark.thorough(but=["w1-no_grad"])
    def test_a_first_forward_outside_autograd(
        self, judged: Any, mesh: Any, world: Any, mode: Any
    ) -> None:
        """Evaluated first, where no graph is recorded, the module then trains all the same."""
        line = mesh(world.size)
        module, oracle = net(line), net()
        judged(module)
        held = dict(module.named_parameters())
        with mode():
            output = module(batch())
            assert not output.requires_grad, "a graph"
            assert_same(output.clone(), oracle(batch()), "output")
        for number in range(2):
            backward(module, number)
            backward(oracle, number)
            assert_trained(held, line, oracle, f"after backward {number}")

    @pytest.mark.law("autograd")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w2"])
    def test_the_order_of_forwards_and_backwards(self, judged: Any, mesh: Any, world: Any) -> None:
        """Several forwards may come before one backward, or before several, in any order."""
        line = mesh(world.size)
        for what, order in {
            "summed": None,
            "first to last": (0, 1, 2),
            "last to first": (2, 1, 0),
            "one of them twice": (1, 1),
        }.items():
            module, oracle = net(line), net()
            judged(module)
            held = dict(module.named_parameters())
            for model in (module, oracle):
                losses = [loss(model(batch(salt)), salt) for salt in range(3)]
                if order is None:
                    (losses[0] + losses[1] + losses[2]).backward()
                for index in order or ():
                    losses[index].backward(retain_graph=True)
            assert_trained(held, line, oracle, what)

    @pytest.mark.law("autograd")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w1"])
    def test_gradients_accumulate(self, judged: Any, mesh: Any, world: Any) -> None:
        """Gradients of several backwards add up; the module's zero_grad() starts them anew."""
        line = mesh(world.size)
        module, oracle = net(line), net()
        judged(module)
        held = dict(module.named_parameters())
        for number, to_none in enumerate((True, False, True)):
            for model in (module, oracle):
                model.zero_grad(set_to_none=to_none)
                for salt in range(3):
                    backward(model, salt)
            assert_trained(held, line, oracle, f"round {number}")

    @pytest.mark.law("autograd")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("part_of_it", ["the module", "its children", "both"])
    @pytest.mark.thorough(but=["w1-its children"])
    def test_activation_checkpointing(
        self, judged: Any, mesh: Any, world: Any, part_of_it: str
    ) -> None:
        """Forwards that are computed again in the backward see DTensors, and train as others."""
        line = mesh(world.size)

        class Checkpointed(Net):
            def forward(self, x: torch.Tensor, look: Any = None) -> torch.Tensor:
                if part_of_it == "the module":
                    return super().forward(x)
                hidden: Any = checkpoint(self.up, x, use_reentrant=False)
                back: Any = checkpoint(self.down, hidden.relu(), use_reentrant=False)
                return whole(back) * self.gain

        def made(model: Net) -> Checkpointed:
            return Checkpointed(model.up, model.down, model.gain)

        module, oracle = made(net(line)), made(net())
        judged(module)
        held = dict(module.named_parameters())
        for number in range(2):
            for model in (module, oracle):
                output: Any = model(batch())
                if part_of_it != "its children":
                    output = checkpoint(model, batch(), use_reentrant=False)
                loss(output).backward()
            assert_trained(held, line, oracle, f"after backward {number}")

    @pytest.mark.law("autograd")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w2"])
    def test_tied_and_shared(self, judged: Any, mesh: Any, world: Any) -> None:
        """A weight of a module used twice, tied to two others, gets the sum of all gradients."""
        line = mesh(world.size)

        def made(sharded: bool) -> Tied:
            full, bias = small(4, 4, salt=1), small(4, salt=2)
            if sharded:
                return Tied(weight(full, line, [S(0)]), weight(bias, line, [S(0)]))
            return Tied(nn.Parameter(full), nn.Parameter(bias))

        module, oracle = made(True), made(False)
        judged(module)
        held = dict(module.named_parameters())
        assert sorted(held) == sorted(n for n, _ in oracle.named_parameters()), "come apart"
        ours, theirs = sgd(module), sgd(oracle)
        for step in range(2):
            for model, optimizer in ((module, ours), (oracle, theirs)):
                optimizer.zero_grad()
                loss(model(batch(step))).backward()
                optimizer.step()
            for name, param in oracle.named_parameters():
                assert param.grad is not None
                what = f"step {step}: {name}"
                assert_same(held[name].grad, part(param.grad, line, [S(0)]), what)
                assert_same(held[name].detach(), part(param.detach(), line, [S(0)]), what)

    @pytest.mark.law("autograd")
    @pytest.mark.world(1)
    def test_hooks_on_the_parameters_fire(self, judged: Any, mesh: Any) -> None:
        """Hooks on the local Parameters run once a backward: DDP reduces in such hooks."""
        module = net(mesh(1))
        judged(module)
        held, fired = dict(module.named_parameters()), list[str]()
        for name, param in held.items():
            param.register_post_accumulate_grad_hook(lambda _, n=name: fired.append(n))
        for number in range(3):
            fired.clear()
            backward(module)
            assert sorted(fired) == sorted(held), f"backward {number}: {sorted(fired)}"
