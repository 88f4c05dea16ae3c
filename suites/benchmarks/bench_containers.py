"""Nested containers: walked, flattened, built again. Work of one rank, no communication."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.base import COUNTS, Measured
from benchmarks.work import Work

if TYPE_CHECKING:
    from benchmarks.rank_context import RankContext

PATH = "_state_dict_utils."


def nested(ctx: RankContext) -> dict[str, Any]:
    """An optimizer's state dict: dicts in dicts, a list, numbers beside tensors."""
    state = {leaf.name: {"exp_avg": ctx.full(leaf), "step": n} for n, leaf in enumerate(ctx.leaves)}
    names = [leaf.name for leaf in ctx.leaves]
    return {"state": state, "param_groups": [{"lr": 0.5, "params": names}]}


def same(a: Any, b: Any, path: str = "") -> None:
    """Same containers, same keys in order, the very same leaves."""
    assert type(a) is type(b), f"{path}: {type(a).__name__}, expected {type(b).__name__}"
    if isinstance(b, dict):
        assert list(a) == list(b), f"{path}: keys differ"
        for key, value in b.items():
            same(a[key], value, f"{path}.{key}")
    elif isinstance(b, list):
        assert len(a) == len(b), f"{path}: {len(a)} items, expected {len(b)}"
        for n, value in enumerate(b):
            same(a[n], value, f"{path}.{n}")
    else:
        assert a is b or a == b, f"{path}: {a}, expected {b}"


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """(path, leaf) of everything in the containers."""
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in paths(v, (*path, k))]
    if isinstance(value, list):
        return [leaf for n, v in enumerate(value) for leaf in paths(v, (*path, n))]
    return [(path, value)]


class Contained(Measured):
    """What these have in common: one rank, many leaves, and counts of Python work."""

    regimes = ("many",)
    sizes = (1,)
    tracks = COUNTS

    def floor(self, ctx: RankContext) -> Work:
        """One bare walk over the same containers."""
        made = nested(ctx)
        count = len(paths(made))

        def check(got: list[Any]) -> None:
            assert len(got) == count, f"{len(got)} of {count} leaves"

        return Work(lambda: paths(made), check)


class FlattenStateDict(Contained):
    """A nested state dict becomes flat; floor: one bare walk over the containers."""

    functions = (f"{PATH}_flatten_state_dict",)

    def work(self, ctx: RankContext) -> Work:
        flatten, made = ctx.function(self.functions[0]), nested(ctx)
        expected = [leaf for _, leaf in paths(made)]

        def check(got: Any) -> None:
            flat, mapping = got
            assert len(flat) == len(mapping), f"{len(flat)} leaves, {len(mapping)} paths"
            same(list(flat.values()), expected)

        return Work(lambda: flatten(made), check)


class UnflattenStateDict(Contained):
    """A flat state dict becomes what it was, nested; floor: one bare walk."""

    functions = (f"{PATH}_unflatten_state_dict",)

    def work(self, ctx: RankContext) -> Work:
        made = nested(ctx)
        flat, mapping = ctx.function(f"{PATH}_flatten_state_dict")(made)
        unflatten = ctx.function(self.functions[0])
        return Work(lambda: unflatten(flat, mapping), lambda got: same(got, made))


class TraverseStateDict(Contained):
    """A visitor sees each leaf with its path; floor: one bare walk."""

    functions = (f"{PATH}_traverse_state_dict",)

    def work(self, ctx: RankContext) -> Work:
        traverse, made = ctx.function(self.functions[0]), nested(ctx)
        expected = [leaf for _, leaf in paths(made)]

        def call() -> list[Any]:
            seen: list[Any] = []
            traverse(made, lambda _, value: seen.append(value))
            return seen

        return Work(call, lambda got: same(got, expected))


class SetElement(Contained):
    """A nested dict built element by element; floor: one bare walk."""

    functions = (f"{PATH}_set_element",)

    def work(self, ctx: RankContext) -> Work:
        put, made = ctx.function(self.functions[0]), nested(ctx)
        elements = paths(made)

        def call() -> dict[str, Any]:
            root: dict[str, Any] = {}
            for path, value in elements:
                put(root, path, value)
            return root

        return Work(call, lambda got: same(got, made))


class IterateStateDict(Contained):
    """A state dict walked with the identity for each tensor; floor: one bare walk."""

    functions = (f"{PATH}_iterate_state_dict", f"{PATH}_identity_func")

    def work(self, ctx: RankContext) -> Work:
        iterate, identity = map(ctx.function, self.functions)
        made = nested(ctx)
        return Work(
            lambda: iterate(made, identity, identity, identity), lambda got: same(got, made)
        )


class RefuseCompanion(Contained):
    """A companion that lacks the last key is refused; floor: one bare walk."""

    functions = (f"{PATH}_iterate_state_dict", f"{PATH}CompanionMismatch")

    def work(self, ctx: RankContext) -> Work:
        iterate, mismatch = map(ctx.function, self.functions)
        identity = ctx.function(f"{PATH}_identity_func")
        source, target = ctx.whole(), ctx.whole()
        del target[ctx.leaves[-1].name]

        def call() -> Any:
            try:
                return iterate(source, identity, identity, identity, companion_obj=target)
            except mismatch as error:
                return error

        def check(got: Any) -> None:
            assert isinstance(got, mismatch), f"took it: {type(got).__name__}"

        return Work(call, check)
