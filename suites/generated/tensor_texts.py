"""The tensors, meshes and groups of a case, as expressions of a script."""

from __future__ import annotations

from typing import Any

Case = dict[str, Any]


def meshes(case: Case) -> list[tuple[Any, ...]]:
    """Its meshes, each once, in the order in which all ranks make them."""
    named = [e.get("mesh") for e in case["pool"]] + [s.get("mesh") for s in case["steps"]]
    return list(dict.fromkeys(mesh for mesh in named if mesh))


def groups(case: Case) -> list[tuple[int, ...]]:
    """Its groups."""
    named = [e.get("group") for e in case["pool"]] + [s.get("pg") for s in case["steps"]]
    return list(dict.fromkeys(g for g in named if g))


def group_name(case: Case, ranks: tuple[int, ...] | None) -> str:
    """The variable of a group."""
    return "None" if not ranks else f"g{groups(case).index(ranks)}"


def _values(entry: dict[str, Any], fill: str) -> str:
    if entry.get("meta"):
        return f"torch.empty({entry['shape']}, dtype=torch.{entry['dtype']}, device='meta')"
    if entry.get("pending"):
        return f"contribution({entry['dtype']!r}, {entry['shape']}, rank)"
    return f"pattern({entry['dtype']!r}, {entry['shape']}, {fill})"


def tensor_text(case: Case, entry: dict[str, Any], fill: str, wrong: str = "") -> str:
    kind = entry["kind"]
    how = entry.get("layout", "contiguous")
    if kind == "view":
        return f"view_of(t{entry['of']}, {entry['how']!r})"
    text = _values(entry, fill)
    if kind == "dtensor":
        more = [f"how={how!r}"] if how != "contiguous" and not entry.get("meta") else []
        more += [f"wrong={wrong}"] if wrong else []
        over = f"m{meshes(case).index(entry['mesh'])}"
        text = f"dtensor({', '.join([text, over, repr(entry['placements']), *more])})"
    elif kind == "sharded":
        more = [f"wrong={wrong}"] if wrong else []
        seat = group_name(case, entry.get("group"))
        text = f"sharded({', '.join([text, repr(entry['boxes']), seat, *more])})"
    elif how != "contiguous" and not entry.get("meta"):
        text = f"laid_out({text}, {how!r})"
    if "trains" in entry:
        text = f"parameter({text}, {entry['trains']})"
    return text
