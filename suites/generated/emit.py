"""A case as the Python that every rank of its world runs, and that a script repeats.

A case is plain data, so that Hypothesis can shrink it, a frame can carry it, and a person can read
it. Its parts:

- ``world``: the number of ranks;
- ``pool``: tensors, each a dict: ``kind`` (plain, parameter, dtensor, sharded, view), ``dtype``,
  ``shape`` (global), ``fill`` (of `rig.pattern`), and where it differs from the default ``layout``,
  ``mesh`` (shape, ranks, line), ``placements``, ``meta``, ``trains``, ``group``, ``boxes``,
  ``per_rank``, ``pending`` (`data.contribution`), ``of`` and ``how`` (of a view);
- ``trees``: name -> node, where a node is ("t", number in the pool), ("v", value),
  (kind of container, [(key, node), ...]) or (kind of sequence, [node, ...]), and a tree ("same",
  other) is another one's object;
- ``many``: (tree, count, number in the pool): that many more keys, each with a tensor like that;
- ``lacks``: (tree, rank, key): what a rank does not have at the top;
- ``turned``: trees whose keys stand in another order on each rank;
- ``wrong``: (number in the pool, rank, "shape", "turned" or "dtype"): a local part that is not
  as it claims;
- ``steps``: calls, dicts with ``call`` and its options, or ``rewrite`` and ``put`` between them.
  ``late`` is a rank that begins the call later than the others, ``then`` what is rewritten the
  moment it returns, ``into`` the tree that its result becomes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from generated.calls import CALLS
from generated.tensor_texts import Case, groups, meshes, tensor_text

LITERAL = 64
"""Bytes of a tensor up to which a script writes them out."""


def source(case: Case) -> str:
    """The function `run(rank, subject, tell, watch)` of a case."""
    lines = [*_shared(case), *_tensors(case), *_trees(case)]
    lines += [f"watch('t{number}', t{number})" for number in _used(case)]
    lines += [line for step in case["steps"] for line in _step(case, step)]
    body = textwrap.indent("\n".join(lines), "    ")
    return f"def run(rank, subject, tell, watch):\n{body}\n"


def _shared(case: Case) -> Iterator[str]:
    for number, (shape, ranks, line) in enumerate(meshes(case)):
        more = "" if line is None else f", {line}"
        yield f"m{number} = mesh({shape}, {ranks}{more})"
    for number, ranks in enumerate(groups(case)):
        yield f"g{number} = group({ranks})"


def _tensors(case: Case) -> Iterator[str]:
    used = set(_used(case))
    for number, entry in enumerate(case["pool"]):
        if number not in used:
            continue
        fill = f"{entry['fill']} + rank" if entry.get("per_rank") else str(entry.get("fill", 0))
        lies = {r: w for p, r, w in case.get("wrong", ()) if p == number}
        wrong = f"{lies!r}.get(rank, '')" if lies else ""
        yield f"t{number} = {tensor_text(case, entry, fill, wrong)}"


def _used(case: Case) -> Iterator[int]:
    def below(node: Any) -> Iterator[int]:
        if node[0] == "t":
            yield node[1]
        elif node[0] not in ("v", "same", "odd"):
            for item in node[1]:
                yield from below(item[1] if node[0] in MAPPINGS else item)

    found = {n for tree in case["trees"].values() for n in below(tree)}
    for step in case["steps"]:
        found |= {step[w] for w in ("tensor", "value") if isinstance(step.get(w), int)}
        found |= {step["put"][2]} if "put" in step else set()
    while more := {case["pool"][n]["of"] for n in found if "of" in case["pool"][n]} - found:
        found |= more
    yield from sorted(found)


def tensors_of(case: Case) -> int:
    """How many tensors of the pool a case uses."""
    return len(list(_used(case)))


MAPPINGS = ("dict", "OrderedDict", "with_metadata", "counted", "module")


def _trees(case: Case) -> Iterator[str]:
    for name, node in case["trees"].items():
        yield f"{name} = {node[1] if node[0] == 'same' else _node(node)}"
    for tree, count, number in case.get("many", ()):
        entry = case["pool"][number]
        more = " + rank" if entry.get("per_rank") else ""
        each = tensor_text(case, entry, f"{entry.get('fill', 0)} + n{more}")
        yield f"{tree}.update({{f'm{{n}}': {each} for n in range({count})}})"
    for tree, rank, key in case.get("lacks", ()):
        yield f"{tree}.pop({key!r}, None) if rank == {rank} else None"
    for tree in case.get("turned", ()):
        yield f"{tree} = turned({tree}, rank)"


def _node(node: Any) -> str:
    kind = node[0]
    if kind == "t":
        return f"t{node[1]}"
    if kind == "odd":
        return str(node[1])
    if kind == "v":
        return repr(node[1])
    if kind in MAPPINGS:
        items = [(repr(key), _node(item)) for key, item in node[1]]
        if kind in ("dict", "module"):
            made = "{" + ", ".join(f"{key}: {item}" for key, item in items) + "}"
            return made if kind == "dict" else f"Net({made})"
        return f"{kind}([" + ", ".join(f"({key}, {item})" for key, item in items) + "])"
    parts = [_node(item) for item in node[1]]
    if kind == "list":
        return f"[{', '.join(parts)}]"
    if kind == "Pair":
        return f"Pair({', '.join(parts)})"
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def _step(case: Case, step: dict[str, Any]) -> Iterator[str]:
    if "rewrite" in step:
        yield _rewriting(case, step["rewrite"], step["fill"])
        return
    if "freeze" in step:
        yield f"parameters_of(module)[{step['freeze']!r}].requires_grad_(False)"
        return
    if "train" in step:
        name, number, fill = step["train"]
        entry = case["pool"][number]
        values = _values_text(case, entry, fill)
        yield f"rewrite(parameters_of(module)[{name!r}], {values})"
        return
    if "put" in step:
        tree, key, number = step["put"]
        yield f"{tree}[{key!r}] = t{number}"
        return
    call = CALLS[step["call"]]
    given = ", ".join(n if "=" in n else f"{n}={n}" for n in call.given(step))
    words = ", ".join([*call.called(), *call.arguments(case, step)])
    if "late" in step:
        yield f"late(rank == {step['late']})"
    if "into" not in step and "then" not in step:
        yield f"tell(*attempt({words}), {given})"
        return
    # At once, so from values that are ready: what the call has not sent by then, or has no copy
    # of, is lost.
    then = step.get("then", ())
    for number, fill in then:
        yield f"later{number} = {_values_text(case, case['pool'][number], fill)}"
    yield f"outcome = attempt({words})"
    yield from (f"rewrite(t{number}, later{number})" for number, _ in then)
    yield f"tell(*outcome, {given})"
    if "into" in step:
        yield f"{step['into']} = outcome[1] if outcome[0] == 'returned' else {step['into']}"


def _rewriting(case: Case, number: int, fill: int) -> str:
    return f"rewrite(t{number}, {_values_text(case, case['pool'][number], fill)})"


def _values_text(case: Case, entry: dict[str, Any], fill: int) -> str:
    values = f"pattern({entry['dtype']!r}, {entry['shape']}, {fill})"
    if entry["kind"] == "dtensor":
        over = f"m{meshes(case).index(entry['mesh'])}"
        values = f"part({values}, {over}, {entry['placements']})"
    return values
