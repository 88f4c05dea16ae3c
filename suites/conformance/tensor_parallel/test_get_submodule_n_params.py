"""From a parameter's dotted path to the module that owns it."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from conformance.kit.agree import attempt
from conformance.kit.cases import each
from conformance.kit.compare import fingerprint
from conformance.kit.data import numbers
from conformance.kit.layouts import S
from conformance.kit.refusals import MISSING, refused
from conformance.kit.tensor_parallel import bag, weight


def tree(mesh: Any) -> nn.Module:
    """A module with each kind of container that holds parameters."""

    def plain(salt: int) -> nn.Parameter:
        return nn.Parameter(numbers(3, salt=salt))

    shared = bag(scale=plain(1))
    return bag(
        top=plain(2),
        sharded=weight(numbers(4), mesh, [S(0)]),
        buffer=numbers(3),
        nest=bag(deep=bag(deeper=bag(leaf=plain(3)))),
        line=nn.Sequential(bag(scale=plain(4)), shared),
        pool=nn.ModuleDict({"a": shared, "b": bag(scale=weight(numbers(4), mesh, [S(0)]))}),
        several=nn.ParameterList([plain(5), plain(6)]),
        named=nn.ParameterDict([("one", plain(7)), ("two", plain(8))]),
    )


@pytest.mark.judges("tensor.parallel.ddp._get_submodule_n_params")
class TestGetSubmoduleNParams:
    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_the_owner_and_the_leaf(self, judged: Any, mesh: Any) -> None:
        """Each path that named_parameters() knows gives its owner and the name it has there."""
        module = tree(mesh(1))
        named = list(module.named_parameters(remove_duplicate=False))
        assert len(named) == 11
        for path, param in named:
            owner, leaf = judged(module, path)
            prefix, _, name = path.rpartition(".")
            assert owner is module.get_submodule(prefix), f"{path}: owner {owner}"
            assert leaf == name, f"{path}: leaf {leaf!r}"
            assert getattr(owner, leaf) is param, f"{path}: another parameter"

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_what_was_replaced_since(self, judged: Any, mesh: Any) -> None:
        """A module that was asked before is looked at anew: what stands at the path now counts."""
        module: Any = tree(mesh(1))
        path = "nest.deep.deeper.leaf"
        fresh = lambda: bag(leaf=nn.Parameter(numbers(3)))  # noqa: E731
        changes = {
            "the owner": lambda: setattr(module.nest.deep, "deeper", fresh()),
            "the module around it": lambda: setattr(module.nest, "deep", bag(deeper=fresh())),
            "the child of the root": lambda: setattr(module, "nest", bag(deep=bag(deeper=fresh()))),
        }
        kept = []  # what is gone is not freed, so that nothing new has its address
        for name, change in changes.items():
            kept.append(judged(module, path)[0])
            change()
            owner, _ = judged(module, path)
            assert owner is module.nest.deep.deeper, f"{name} was replaced: {owner}"

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_from_a_module_further_down(self, judged: Any, mesh: Any) -> None:
        """A path starts at the module that is given, which need not be the root."""
        module = tree(mesh(1))
        nest = module.get_submodule("nest.deep")
        owner = nest.get_submodule("deeper")
        assert judged(nest, "deeper.leaf") == (owner, "leaf")
        assert judged(owner, "leaf") == (owner, "leaf")

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_a_path_that_does_not_exist(self, judged: Any, mesh: Any) -> None:
        """A path that leads nowhere is an error that names what is not there."""
        module = tree(mesh(1))

        def refuse(case: tuple[str, str]) -> None:
            path, missing = case
            refused(lambda: judged(module, path), missing, kinds=MISSING, what=repr(path))

        each(
            [
                ("nowhere", "nowhere"),
                ("nest.nowhere", "nowhere"),
                ("nest.deep.deeper.nowhere", "nowhere"),
                ("nowhere.leaf", "nowhere"),
                ("nest.nowhere.deeper.leaf", "nowhere"),
                ("top.leaf", "top"),
                ("several.2", "2"),
                ("named.three", "three"),
                ("pool.c.scale", "c"),
                ("", ""),
                ("nest.", ""),
                ("nest..deep", ""),
            ],
            refuse,
        )

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_the_module_stays_as_it_was(self, judged: Any, mesh: Any) -> None:
        """Looking up, found or not, changes nothing; a second call gives the same."""
        module = tree(mesh(1))
        before = fingerprint(dict(module.named_parameters(remove_duplicate=False)))[2]
        for path in ("nest.deep.deeper.leaf", "top", "nowhere.leaf"):
            attempt(lambda p=path: judged(module, p))  # type: ignore[misc]
            if path != "nowhere.leaf":
                assert judged(module, path) == judged(module, path), path
            after = fingerprint(dict(module.named_parameters(remove_duplicate=False)))[2]
            assert after == before, f"changed by looking up {path}"
