"""A transformed tensor-parallel module that is assigned to, cast and loaded as few do it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn.parallel import DistributedDataParallel

from conformance.kit.agree import assert_raises_everywhere
from conformance.kit.compare import assert_same, local
from conformance.kit.data import numbers
from conformance.kit.layouts import SS, R, S, dtensor, part
from conformance.kit.tensor_parallel import Scaled, assert_holds, bag, batch, net, weight


class Counting(nn.Module):
    """Counts its forwards in a sharded buffer, which each of them replaces."""

    def __init__(self, w: nn.Parameter, steps: torch.Tensor) -> None:
        super().__init__()
        self.w = w
        self.steps: torch.Tensor
        self.register_buffer("steps", steps)

    def forward(self) -> torch.Tensor:
        self.steps = self.steps + 1
        return self.w.to_local().sum() if isinstance(self.w, DTensor) else self.w.sum()


class Shifted(nn.Module):
    """Adds a sharded buffer to a weight, and leaves it as it is."""

    def __init__(self, w: nn.Parameter, shift: torch.Tensor) -> None:
        super().__init__()
        self.w = w
        self.shift: torch.Tensor
        self.register_buffer("shift", shift)

    def forward(self) -> torch.Tensor:
        return local(self.w + self.shift)


@pytest.mark.judges("tensor.parallel.ddp._pre_dp_module_transform")
class TestPreDpModuleTransformOddUses:
    @pytest.mark.law("values")
    @pytest.mark.world(1, 2)
    def test_what_is_assigned_between_forwards(self, judged: Any, mesh: Any, world: Any) -> None:
        """What takes the place of a buffer between forwards must stay there, and be used."""
        line = mesh(world.size)
        module = Shifted(weight(numbers(4, 2), line, [S(0)]), dtensor(numbers(4, 2), line, [S(0)]))
        judged(module)
        shift, held = part(numbers(4, 2), line, [S(0)]), local(module.w).detach().clone()
        for number in range(3):
            if number:
                shift = shift + 10 * number
                module.shift = shift.clone()
            for time in range(2):
                what = f"assigned {number} times, forward {time}"
                assert_same(module().detach(), held + shift, what)
                assert_same(local(module.shift), shift, what)
                assert_same(local(module.state_dict()["shift"]), shift, f"{what}: saved")

    @pytest.mark.law("values")
    @pytest.mark.world(1, 2)
    def test_a_buffer_that_a_forward_assigns(self, judged: Any, mesh: Any, world: Any) -> None:
        """A sharded buffer that each forward replaces must hold what the last one put there."""
        line = mesh(world.size)
        module = Counting(weight(numbers(4, 2), line, [S(0)]), dtensor(numbers(4), line, [S(0)]))
        judged(module)
        for number in range(1, 4):
            with torch.set_grad_enabled(number != 2):
                module()
            expected = part(numbers(4) + number, line, [S(0)])
            assert_same(local(module.steps), expected, f"after forward {number}")
            assert_same(local(module.state_dict()["steps"]), expected, f"saved after {number}")

    @pytest.mark.law("values")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w2"])
    def test_weights_that_change_between_evaluations(
        self, judged: Any, mesh: Any, world: Any
    ) -> None:
        """Evaluations without grad must compute with what the weights hold and are by then."""
        line, oracle = mesh(world.size), net()
        module: Any = net(line)
        judged(module)

        def data(model: Any) -> None:
            for param in model.parameters():
                param.data = param.data * 2

        def in_place(model: Any) -> None:
            for param in model.parameters():
                param.data.add_(1)

        changes: dict[str, Callable[[Any], Any]] = {
            "another batch": nn.Module.train,
            ".data is assigned": data,
            ".data is written": in_place,
            "another dtype": lambda model: model.to(torch.float32),
            "and back": lambda model: model.to(torch.float64),
        }
        for name, change in changes.items():
            for model in (module, oracle):
                change(model)
            with torch.no_grad():
                inputs = batch(dtype=next(module.parameters()).dtype)
                assert_same(module(inputs), oracle(inputs), f"{name}, without grad")
            assert_holds(module, line, oracle, name)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_a_load_from_any_placement(self, judged: Any, mesh: Any) -> None:
        """A DTensor of any placements over the same 2-D mesh must land as its global tensor."""
        grid, full = mesh(2, 2), numbers(4, 4, salt=1)
        pending = Partial()
        each = [list(pair) for pair in product([R, S(0), S(1)], repeat=2)]
        each += [[pending, R], [R, pending], [pending, S(0)]]
        for held in ([S(0), R], [R, S(0)], [S(0), S(1)]):
            module = bag(w=weight(full * 0, grid, held))
            judged(module)
            for placements in each:
                module.load_state_dict({"w": dtensor(full, grid, placements)})
                expected = part(full, grid, held) * (2 if pending in placements else 1)
                assert_same(module.w.detach(), expected, f"{placements} into {held}")

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_an_optimizer_without_state(self, judged: Any, mesh: Any) -> None:
        """An optimizer that has made no step must have no state after the transform either."""
        module = net(mesh(1))
        optimizer = torch.optim.Adam(module.parameters())
        judged(module)
        assert optimizer.state_dict()["state"] == {}, f"state {dict(optimizer.state)}"

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2)
    def test_a_group_that_would_mix_stripes(self, judged: Any, mesh: Any, world: Any) -> None:
        """Data parallelism over ranks that hold other stripes must be refused on every rank."""
        line = mesh(2)
        for placement in SS(0, 2), SS(1, 2), S(1):
            module = Scaled({"w": torch.ones(())}, w=weight(numbers(4, 4), line, [placement]))
            judged(module)
            wrapped = DistributedDataParallel(module)
            assert_raises_everywhere(world, wrapped, "parameter 'w' of Scaled", name=f"{placement}")
