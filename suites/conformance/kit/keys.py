"""Keys and containers that leaves may stand under, at any depth.

A way to nest is added here, and every function that takes nested state dicts is asked of it. Each
takes the leaves of a flat dict in their order, two of them or more.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from conformance.kit.containers import CONTAINERS, Counted, OfOne
from conformance.kit.nested import Pair, with_metadata

Nest = Callable[[dict[Any, Any]], Any]

KEYS: list[Any] = [
    0,
    -1,
    2**70,
    1.5,
    None,
    False,
    True,
    "",
    " ",
    ".",
    "a.b",
    "a..b",
    "\\",
    "\\int:1",
    "[0]",
    "['a']",
    "x['a']",
    "<root>",
    "0",
    "True",
    "None",
    "gew\u00f6hnlich \U0001f600",
    "line\nbreak",
    b"bytes",
    ("x", 0),
    (),
    frozenset({1}),
]
"""Keys that a dict takes beside each other, though many of them are written alike."""


def _optimizer(flat: dict[Any, Any]) -> Any:
    """As `torch.optim` makes it: numbered parameters, whose numbers are no text."""
    leaves = list(flat.values())
    return {
        "state": {
            number: {"step": 3.0, "exp_avg": leaf, "amsgrad": None}
            for number, leaf in enumerate(leaves)
        },
        "param_groups": [
            {"lr": 0.5, "betas": (0.5, 0.75), "params": [*range(len(leaves))]},
            {"params": []},
        ],
    }


def _under_each_key(flat: dict[Any, Any]) -> Any:
    leaves = list(flat.values())
    return {key: leaves[number % len(leaves)] for number, key in enumerate(KEYS)}


def _deep(flat: dict[Any, Any]) -> Any:
    """The same three levels down, in a list, a tuple and mappings."""
    inner = _under_each_key(flat)
    return OrderedDict([(7, [None, (inner,)]), ("7", {None: {(): inner}})])


def _alike(flat: dict[Any, Any]) -> Any:
    """Paths that are written alike, and are not."""
    one, other, *_ = flat.values()
    return {
        "a.b": one,
        "a": {"b": other, "b.c": one, 0: other, "0": one},
        "a.b.c": other,
        "a['b']": one,
        "a[0]": other,
        "[0]": one,
        0: other,
        "0": {"x": one},
        (0, "x"): other,
    }


def _shared(flat: dict[Any, Any]) -> Any:
    """Containers that stand in several places, and so do those in them: none holds itself."""
    one, other, *_ = flat.values()
    inner = {"w": one, "deeper": [{"v": other}]}
    return {"a": inner, "b": inner, "c": [inner["deeper"], (inner,)], "d": {"a": inner}}


def _chain(flat: dict[Any, Any]) -> Any:
    """More levels than anybody nests, each with the keys of all others."""
    one, other, *_ = flat.values()
    chain: dict[Any, Any] = {"w": one, "next": [other]}
    for level in range(150):
        chain = {"w": level, "next": chain}
    return chain


def _pairs(flat: dict[Any, Any]) -> Any:
    made = {name: put(*list(flat.values())[:2]) for name, put in CONTAINERS.items()}
    return with_metadata(*made.items(), ("pair", Pair(made["dict"], made["tuple"])))


def _made_otherwise(flat: dict[Any, Any]) -> Any:
    """Namedtuples whose class takes other arguments than what they hold."""
    one, other, *_ = flat.values()
    return {"one": OfOne((one, [other])), "deep": [Counted(other, 2), Counted({"w": one}, 5)]}


NESTS: dict[str, Nest] = {
    "optimizer": _optimizer,
    "under-each-key": _under_each_key,
    "deep": _deep,
    "alike": _alike,
    "containers": _pairs,
    "namedtuples": _made_otherwise,
    "shared": _shared,
    "chain": _chain,
}
"""Name -> a way to nest."""


def rings(leaf: Any) -> dict[str, Any]:
    """State dicts in which a container holds itself, `layer` on the way."""
    own: dict[Any, Any] = {"w": leaf}
    own["layer"] = own
    through: dict[Any, Any] = {"w": leaf, "layer": [1, {}]}
    through["layer"][1]["again"] = through["layer"]
    two: dict[Any, Any] = {"w": leaf, "layer": {"x": {}}}
    two["layer"]["x"]["y"] = (two["layer"], 1)
    return {"itself": own, "a list": through, "each other": two}


def pickled(value: Any) -> Any:
    """What a pickle of the value gives."""
    return pickle.loads(pickle.dumps(value))
