"""The state dict of a transformed tensor-parallel module, and what it loads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor

from conformance.kit.agree import attempt
from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_same, assert_type, fingerprint, local, shares_memory
from conformance.kit.data import numbers
from conformance.kit.layouts import R, S, dtensor, part, read_whole
from conformance.kit.refusals import assert_refusal
from conformance.kit.tensor_parallel import (
    SHARDED,
    Net,
    assert_holds,
    backward,
    bag,
    batch,
    cut,
    net,
    placements,
    small,
    weight,
)


class Stubborn(nn.Module):
    """Has an extra state, which it may refuse to give."""

    refuses = False

    def get_extra_state(self) -> int:
        if self.refuses:
            raise RuntimeError("no state today")
        return 3

    def set_extra_state(self, state: int) -> None:
        assert state == 3


def assert_sharded(state: Any, mesh: Any, oracle: Net, what: str, prefix: str = "") -> None:
    """The keys of the oracle's state dict, in order; DTensors where it is sharded."""
    expected = oracle.state_dict()
    keys = [prefix + key for key in expected]
    assert list(state) == keys, f"{what}: keys {list(state)}, expected {keys}"
    for name, full in expected.items():
        value, where = state[prefix + name], f"{what}: {name}"
        assert not value.requires_grad, f"{where}: requires grad"
        if name in SHARDED:
            assert isinstance(value, DTensor), f"{where}: a {type(value).__name__}"
            assert value.placements == tuple(placements(mesh, name)), f"{where}: {value.placements}"
            assert value.device_mesh == mesh, f"{where}: on {value.device_mesh}"
            assert value.shape == full.shape, f"{where}: shape {tuple(value.shape)}"
        else:
            assert not isinstance(value, DTensor), f"{where}: a DTensor"
        assert_same(local(value), cut(full, mesh, name), where)


def whole_state(mesh: Any, salt: int) -> dict[str, Any]:
    """The full state dict of a net of that salt."""
    return dict(net(salt=salt).state_dict())


def sharded_state(mesh: Any, salt: int) -> dict[str, Any]:
    """Its state dict as DTensors, where it is sharded."""
    return {
        name: dtensor(full, mesh, placements(mesh, name)) if name in SHARDED else full
        for name, full in whole_state(mesh, salt).items()
    }


def replicated_state(mesh: Any, salt: int) -> dict[str, Any]:
    """Its state dict as DTensors that every rank holds whole."""
    return {
        name: dtensor(full, mesh, [R]) if name in SHARDED else full
        for name, full in whole_state(mesh, salt).items()
    }


def mixed_state(mesh: Any, salt: int) -> dict[str, Any]:
    """Full tensors and DTensors in one state dict, one of them a Parameter."""
    full, sharded = whole_state(mesh, salt), sharded_state(mesh, salt)
    state = {n: full[n] if n.startswith("up") else sharded[n] for n in full}
    state["up.weight"] = nn.Parameter(state["up.weight"])
    return state


KINDS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "full": whole_state,
    "sharded": sharded_state,
    "replicated": replicated_state,
    "mixed": mixed_state,
}


@pytest.mark.judges("tensor.parallel.ddp._pre_dp_module_transform")
class TestPreDpModuleTransformStateDict:
    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2, 4)
    @pytest.mark.thorough(but=["w1"])
    def test_the_state_dict_is_sharded(self, judged: Any, mesh: Any, world: Any) -> None:
        """Before and after forwards the state dict holds the DTensors, keys and order as ever."""
        line, oracle = mesh(world.size), net(hidden=3, frozen=["up.bias"])
        module = net(line, 3, frozen=["up.bias"])
        before: Any = module.state_dict()
        judged(module)
        with Collectives() as seen:
            first = module.state_dict()
        assert seen.count == 0, f"{seen.names}"
        assert_sharded(first, line, oracle, "transformed")
        for model in (module, oracle):
            backward(model)
        state: Any = module.state_dict()
        assert_sharded(state, line, oracle, "after a forward")
        assert type(state) is type(before)
        assert state._metadata == before._metadata, f"{state._metadata}"

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w2"])
    def test_inside_another_module(self, judged: Any, mesh: Any, world: Any) -> None:
        """With a prefix, into a given dict, and as part of another module it is sharded, too."""
        line = mesh(world.size)
        module = net(line)
        judged(module)
        for number in range(2):
            what = f"round {number}"
            assert_sharded(module.state_dict(prefix="a."), line, net(), what, prefix="a.")
            assert_sharded(nn.Sequential(module).state_dict(), line, net(), what, prefix="0.")
            given: dict[str, Any] = OrderedDict()
            assert module.state_dict(destination=given, prefix="b.") is given
            assert_sharded(given, line, net(), what, prefix="b.")
            with torch.no_grad():
                module(batch())
                module.get_buffer("calls").zero_()

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_tied_parameters(self, judged: Any, mesh: Any, world: Any) -> None:
        """Tied parameters stand under each of their names, over one memory; so loaded as well."""
        line, full = mesh(world.size), numbers(5, 2)
        tied = weight(full, line, [S(0)])
        module = bag(a=tied, n=nn.Parameter(numbers(2)), b=tied, child=bag(c=tied))
        judged(module)
        state = module.state_dict()
        assert list(state) == ["a", "n", "b", "child.c"]
        for name in ("a", "b", "child.c"):
            assert isinstance(state[name], DTensor), f"{name}: a {type(state[name]).__name__}"
            assert_same(local(state[name]), part(full, line, [S(0)]), name)
            assert shares_memory(state[name], state["a"]), f"{name}: comes apart"
        new = {n: numbers(2) + 1 if n == "n" else full + 1 for n in state}
        mine = module.a
        module.load_state_dict(new)
        assert module.a is module.b is module.child.c is mine
        assert_same(mine.detach(), part(full + 1, line, [S(0)]))

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_any_dtype(self, judged: Any, mesh: Any) -> None:
        """Frozen, integer and bool parameters are in the state dict, and loaded, like any other."""
        for dtype in (torch.int64, torch.bool, torch.bfloat16, torch.float32):
            full, other = numbers(4, dtype=dtype), numbers(4, dtype=dtype, salt=1)
            module = bag(w=weight(full, mesh(1), [S(0)], trains=False))
            judged(module)
            state = module.state_dict()
            assert isinstance(state["w"], DTensor), f"{dtype}: a {type(state['w']).__name__}"
            assert_same(local(state["w"]), full, f"{dtype}")
            module.load_state_dict({"w": other})
            assert_same(module.w.detach(), other, f"{dtype}, loaded")
            assert not module.w.requires_grad, f"{dtype}: trains"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_each_ranks_own_part(self, judged: Any, mesh: Any, rank: int) -> None:
        """What a rank saved of itself must load again, however even the parts; no other shape."""
        for shape in ((4, 2), (5, 2), (1, 2), (3, 2)):
            line, full = mesh(2), numbers(*shape, salt=1)
            module = bag(w=weight(numbers(*shape), line, [S(0)]))
            judged(module)
            mine = part(full, line, [S(0)])
            module.load_state_dict({"w": mine.clone()})
            assert_same(module.w.detach(), mine, f"{shape}")
            for rows in {0, 1, 2, 3, 6} - {len(mine), shape[0]}:
                error = attempt(lambda: module.load_state_dict({"w": numbers(rows, 2)}))  # noqa: B023
                assert_refusal(error, "w", kinds=(RuntimeError,), what=f"{rows} rows of {shape}")
                assert_same(module.w.detach(), mine, f"{shape}, after the refusal")

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_buffers(self, judged: Any, mesh: Any, world: Any) -> None:
        """A DTensor buffer is saved as a DTensor and loaded, one that is not persistent neither."""
        line, full = mesh(world.size), numbers(5, 2)
        module = bag(w=weight(full, line, [S(0)]), mean=dtensor(full, line, [S(0)]))
        module.register_buffer("passing", dtensor(full, line, [S(0)]), persistent=False)
        judged(module)
        state = module.state_dict()
        assert list(state) == ["w", "mean"]
        assert_type(state["mean"], DTensor, "state['mean']")
        assert_same(local(state["mean"]), part(full, line, [S(0)]), "saved")
        for given in (full + 1, dtensor(full + 2, line, [S(0)])):
            module.load_state_dict({"w": full, "mean": given})
            expected = local(given) if isinstance(given, DTensor) else part(given, line, [S(0)])
            assert_same(local(module.mean), expected, "loaded")

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_hooks_of_others_still_run(self, judged: Any, mesh: Any) -> None:
        """State dict hooks of others run, before the transform or after, when saved and loaded."""
        module, ran = net(mesh(1)), list[str]()
        module.register_state_dict_pre_hook(lambda *_: ran.append("save"))
        module.register_load_state_dict_pre_hook(lambda *_: ran.append("load"))
        judged(module)
        module.register_state_dict_post_hook(lambda *_: ran.append("saved"))
        module.register_load_state_dict_post_hook(lambda *_: ran.append("loaded"))
        module.load_state_dict(module.state_dict())
        assert ran == ["save", "saved", "load", "loaded"]

    @pytest.mark.law("values")
    @pytest.mark.world(1, 2, 4)
    @pytest.mark.thorough(but=["w1"])
    def test_through_the_checkpoint_functions(self, judged: Any, mesh: Any, world: Any) -> None:
        """get_model_state_dict gives global tensors when full, DTensors when not, step for step."""
        line, oracle = mesh(world.size), net(hidden=3)
        module = net(line, 3)
        judged(module)
        for what in ("transformed", "after a forward"):
            full = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
            expected = oracle.state_dict()
            assert list(full) == list(expected), f"{what}: {list(full)}"
            for name, value in expected.items():
                assert_same(full[name], value, f"{what}: {name}")
            assert_sharded(get_model_state_dict(module), line, oracle, what)
            backward(module)
            backward(oracle)

    @pytest.mark.law("values")
    @pytest.mark.world(1, 2, 4)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.thorough(but=["w1-replicated"])
    def test_load(self, judged: Any, mesh: Any, world: Any, kind: str) -> None:
        """Full tensors and DTensors land in the same Parameters; what was given is not changed."""
        line = mesh(world.size)
        module = net(line)
        judged(module)
        held = [id(p) for p in module.parameters()]
        for salt, what in ((1, "transformed"), (2, "after a forward")):
            oracle, given = net(salt=salt), KINDS[kind](line, salt)
            before = fingerprint(given)
            result = module.load_state_dict(given)
            assert result.missing_keys == result.unexpected_keys == [], f"{what}: {result}"
            assert [id(p) for p in module.parameters()] == held, f"{what}: other objects"
            assert_holds(module, line, oracle, f"{what}, loaded")
            assert module.calls.item() == 0, f"{what}: buffer not loaded"
            backward(module)
            backward(oracle)
            assert_holds(module, line, oracle, f"{what}, trained")
            with torch.no_grad():
                for param in module.parameters():
                    param.add_(1)
            assert fingerprint(given) == before, f"{what}: the given dict was changed"
            module.zero_grad()

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_load_over_an_unsorted_mesh(self, judged: Any, mesh: Any) -> None:
        """Full tensors and DTensors land where full_tensor() reads them, if ranks are unsorted."""
        line, zero = mesh(2, ranks=[1, 0]), numbers(4, 2) * 0
        module = bag(w=weight(zero, line, [S(0)]))
        judged(module)
        for salt, placement in enumerate((None, R, S(0), S(1))):
            full = numbers(4, 2, salt=salt + 1)
            given = full if placement is None else dtensor(full, line, [placement])
            module.load_state_dict({"w": given})
            assert_same(module.w.detach(), part(full, line, [S(0)]), f"loaded from {placement}")
            assert_same(read_whole(module.state_dict()["w"]), full, f"saved after {placement}")

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_load_through_the_checkpoint_functions(self, judged: Any, mesh: Any, rank: int) -> None:
        """set_model_state_dict lands a full dict, one on the first rank only, and a sharded one."""
        line = mesh(2)
        module = net(line)
        judged(module)
        held = [id(p) for p in module.parameters()]
        everywhere = StateDictOptions(full_state_dict=True)
        from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        for what, given, salt, options in (
            ("sharded", sharded_state(line, 1), 1, None),
            ("full", whole_state(line, 2), 2, everywhere),
            ("first rank", whole_state(line, 3) if rank == 0 else {}, 3, from_first),
        ):
            result = set_model_state_dict(module, given, options=options)
            assert result.missing_keys == result.unexpected_keys == [], f"{what}: {result}"
            assert_holds(module, line, net(salt=salt), what)
            assert [id(p) for p in module.parameters()] == held, f"{what}: other objects"
            module(batch())

    @pytest.mark.law("values")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w1"])
    def test_save_and_load(self, judged: Any, mesh: Any, world: Any) -> None:
        """What one transformed module saves another loads, through a wrapper as well."""
        line = mesh(world.size)
        source, target = net(line, salt=1), net(line)
        judged(source)
        judged(target)
        backward(source)
        source.zero_grad()
        target.load_state_dict(source.state_dict())
        assert_holds(target, line, net(salt=1), "loaded")
        assert target.calls.item() == 1
        other = nn.Sequential(net(line, salt=2))
        judged(other)
        other.load_state_dict(nn.Sequential(target).state_dict())
        assert_holds(other[0], line, net(salt=1), "loaded through wrappers")

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_after_a_state_dict_that_raised(self, judged: Any, mesh: Any) -> None:
        """A state dict that ended half-way, of either kind, must leave nothing to the next."""
        module: Any = bag(w=weight(numbers(4, 2), mesh(2), [S(0)]), last=Stubborn())
        judged(module)
        for keep_vars in (True, False):
            module.last.refuses = True
            with pytest.raises(RuntimeError, match="no state today"):
                module.state_dict(keep_vars=keep_vars)
            module.last.refuses = False
            for _ in range(2):
                got = module.state_dict()["w"]
                assert_type(got, DTensor, f"after keep_vars={keep_vars}")
                assert_same(read_whole(got), numbers(4, 2))
                assert module.state_dict(keep_vars=True)["w"].requires_grad

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("kind", ["full", "sharded"])
    @pytest.mark.thorough(but=["w1-full", "w2-sharded"])
    def test_keys_that_do_not_fit(self, judged: Any, mesh: Any, world: Any, kind: str) -> None:
        """Missing and unexpected keys are reported as nn.Module does; strict ones by name."""
        line = mesh(world.size)
        module, oracle = net(line), net()
        judged(module)
        for drop, add in (
            (["up.weight"], []),
            ([], ["up.extra"]),
            (["down.bias", "gain", "calls"], ["other.weight", "downs"]),
        ):
            given, plain = KINDS[kind](line, 1), whole_state(line, 1)
            for state in (given, plain):
                for name in drop:
                    del state[name]
                for name in add:
                    state[name] = small(2)
            error = attempt(lambda g=given: module.load_state_dict(g))  # type: ignore[misc]
            names = [f'"{name}"' for name in (*drop, *add)]
            assert_refusal(error, *names, kinds=(RuntimeError,), what=f"{drop} {add}")
            got = module.load_state_dict(given, strict=False)
            expected = oracle.load_state_dict(plain, strict=False)
            assert got.missing_keys == expected.missing_keys, f"{drop} {add}: {got}"
            assert got.unexpected_keys == expected.unexpected_keys, f"{drop} {add}: {got}"
            assert_holds(module, line, oracle, f"{drop} {add}, not strict")

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_a_shape_that_does_not_fit(self, judged: Any, mesh: Any, world: Any) -> None:
        """A global shape other than the weight's is an error that names the key, also if lax."""
        line = mesh(world.size)
        module = net(line)
        judged(module)
        before = [id(p) for p in module.parameters()]
        for name, shape in {"up.weight": (9, 4), "down.weight": (3, 7), "up.bias": (3,)}.items():
            for strict in (True, False):
                given = whole_state(line, 1)
                given[name] = small(*shape)
                kept = module.get_parameter(name).detach().clone()
                error = attempt(lambda g=given, s=strict: module.load_state_dict(g, strict=s))  # type: ignore[misc]
                assert_refusal(error, name, kinds=(RuntimeError,), what=f"{shape} for {name}")
                assert_same(module.get_parameter(name).detach(), kept, name)
        assert [id(p) for p in module.parameters()] == before
