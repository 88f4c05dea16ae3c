"""A transformed module whose parameters change places, get a second one, or arrive later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.layouts import S, part
from conformance.kit.tensor_parallel import bag, weight


class Seen(nn.Module):
    """Notes the placements that each of its parameters has in a forward; gives their local sum."""

    def __init__(self, *names: str, **weights: nn.Parameter) -> None:
        super().__init__()
        self.names = [*names, *weights]
        self.placements: dict[str, Any] = {}
        for name, param in weights.items():
            setattr(self, name, param)

    def forward(self) -> torch.Tensor:
        held = {name: getattr(self, name) for name in self.names}
        self.placements = {name: getattr(p, "placements", None) for name, p in held.items()}
        local = [p.to_local() if isinstance(p, DTensor) else p for p in held.values()]
        return torch.stack([p.sum() for p in local]).sum()


class Remembering(nn.Module):
    """Keeps what is assigned to it in a list as well, as an LSTM does, and computes with that."""

    def __init__(self, **weights: nn.Parameter) -> None:
        super().__init__()
        self.names = [*weights]
        self.flat: list[Any] = [None for _ in weights]
        for name, param in weights.items():
            setattr(self, name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("names", ()):
            self.flat[self.names.index(name)] = value
        super().__setattr__(name, value)

    def forward(self) -> torch.Tensor:
        local = [p.to_local() if isinstance(p, DTensor) else p for p in self.flat]
        return torch.stack([(p * p).sum() for p in local]).sum()


@pytest.mark.judges("tensor.parallel.ddp._update_module_param")
class TestUpdateModulesThatRemember:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_what_is_kept_elsewhere(self, judged: Any) -> None:
        """A class that keeps its parameters in a list as well, as an LSTM, must be told."""
        lstm: Any = nn.LSTM(2, 2)
        new = nn.Parameter(numbers(8, 2, dtype=torch.float32))
        judged([(lstm, "weight_ih_l0", new)])
        assert lstm._flat_weights[0] is new, "the list has the old parameter"
        assert lstm.weight_ih_l0 is new
        assert len([*lstm.parameters()]) == 4

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(1)
    def test_a_class_that_refuses(self, judged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the class refuses the new parameter, the module must keep the old one."""
        module: Any = Remembering(b=nn.Parameter(numbers(2)), a=nn.Parameter(numbers(2)))
        held = [(name, id(param)) for name, param in module.named_parameters()]

        def refuse(*_: Any) -> None:
            raise ValueError("not this one")

        monkeypatch.setattr(Remembering, "__setattr__", refuse)
        with pytest.raises(ValueError, match="not this one"):
            judged([(module, "b", nn.Parameter(numbers(2, salt=1)))])
        now = [(name, id(param)) for name, param in module.named_parameters()]
        assert now == held, f"the module has changed: it has {[name for name, _ in now]}"


@pytest.mark.judges("tensor.parallel.ddp._pre_dp_module_transform")
class TestPreDpModuleTransformRearranged:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_parameters_that_change_places(self, judged: Any, mesh: Any) -> None:
        """Two local parameters that are exchanged must stay parts of their own tensors."""
        line, full = mesh(2), numbers(4, 4)
        module: Any = Seen(a=weight(full, line, [S(0)]), b=weight(full + 1, line, [S(1)]))
        judged(module)
        module.a, module.b = module.b, module.a
        module()
        assert module.placements == {"a": (S(1),), "b": (S(0),)}, f"{module.placements}"

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_state_dicts_of_parameters_that_change_places(self, judged: Any, mesh: Any) -> None:
        """What is saved and loaded of exchanged parameters must be parts of their own tensors."""
        line, full = mesh(2), numbers(4, 4)
        module: Any = Seen(a=weight(full, line, [S(0)]), b=weight(full + 1, line, [S(1)]))
        judged(module)
        for a, b in ((S(1), S(0)), (S(0), S(1))):
            module.a, module.b = module.b, module.a
            saved = module.state_dict()
            assert (saved["a"].placements, saved["b"].placements) == ((a,), (b,)), f"{saved}"
            module()
            module.load_state_dict({"a": full * 2, "b": full * 3})
            assert_same(module.a.detach(), part(full * 2, line, [a]), f"a, loaded as {a}")
            assert_same(module.b.detach(), part(full * 3, line, [b]), f"b, loaded as {b}")

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("where", ["itself", "another module"])
    def test_a_tie_that_is_made_later(self, judged: Any, mesh: Any, where: str) -> None:
        """A second place that a local parameter is given must hold its DTensor in a forward."""
        line, full = mesh(2), numbers(4, 4)
        module: Any = bag(child=Seen(a=weight(full, line, [S(0)])), other=Seen("b"))
        module.forward = lambda: torch.stack([child() for child in module.children()]).sum()
        owner = module.other
        if where == "itself":
            owner = module.child
            del module.other
        judged(module)
        owner.b = module.child.a
        owner.names = list(dict.fromkeys((*owner.names, "b")))
        for again in False, True:
            module()
            assert owner.placements["b"] == (S(0),), f"again={again}: {owner.placements}"
            assert owner.b is module.child.a, f"again={again}: the tie is gone after the forward"

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("what", ["parameter", "module"])
    def test_a_dtensor_that_arrives_later(self, judged: Any, mesh: Any, what: str) -> None:
        """A DTensor that is put in after the transform must be trained from the first step on."""
        line, full = mesh(2), numbers(4, 4)
        module: Any = bag(old=Seen(a=weight(full, line, [S(0)])))
        module.forward = lambda: torch.stack([child() for child in module.children()]).sum()
        judged(module)
        new: Any = weight(full, line, [S(1)])
        if what == "parameter":
            module.old.a = new
        else:
            module.new = Seen(a=new)
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        for step in range(1, 4):
            module().backward()
            optimizer.step()
            optimizer.zero_grad()
            child = module.old if what == "parameter" else module.new
            assert_same(child.a.detach(), part(full - step, line, [S(1)]), f"after step {step}")
            assert_same(new.to_local().detach(), part(full - step, line, [S(1)]), f"new, {step}")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_a_class_that_remembers_its_parameters(self, judged: Any, mesh: Any) -> None:
        """A module that computes with what was assigned to it must be trained, in its order."""
        line, full = mesh(2), numbers(4, 4) + 1
        module: Any = Remembering(
            b=weight(full, line, [S(0)]), c=nn.Parameter(full.clone()), a=weight(full, line, [S(1)])
        )
        judged(module)
        for step in range(1, 3):
            optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
            module().backward()
            optimizer.step()
            optimizer.zero_grad()
            # p - 2 p
            assert_same(module.b.detach(), part(full * (-1) ** step, line, [S(0)]), f"b, {step}")
            assert_same(module.a.detach(), part(full * (-1) ** step, line, [S(1)]), f"a, {step}")
            assert [*dict(module.named_parameters())] == ["b", "c", "a"], f"order, {step}"
            assert module.flat[0] is module.b, f"the list, {step}"

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_a_dtensor_that_is_lent_to_each_forward(self, judged: Any, mesh: Any) -> None:
        """A DTensor that functional_call puts in each time must get its gradient, and no more."""
        line, full = mesh(2), numbers(4, 4)
        module = Seen(a=weight(full, line, [S(0)]))
        judged(module)
        lent: Any = weight(full + 1, line, [S(0)])
        for call in range(1, 5):
            torch.func.functional_call(module, {"a": lent}, ()).backward()
            assert_same(lent.grad.to_local(), torch.full((2, 4), call).to(full.dtype), "gradient")
            assert len(lent._backward_hooks or ()) <= 1, f"hooks pile up: {lent._backward_hooks}"
