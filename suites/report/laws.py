"""The laws of the contract: the columns of the report, each with the sentence that states it.

docs/contract.md explains them; a check names one in its mark `law(name)`. This table is the only
list of them, and `suites/report/test_contract.py` holds the page and the marks to it.
"""

from __future__ import annotations

import textwrap

LAWS = {
    "values": (
        "Results are exact to the bit, for every dtype, memory layout, shard size, placement and "
        "mesh that the function can meet."
    ),
    "structure": (
        "Containers, keys, ties, dtypes, devices and flags survive the call, and no key appears or "
        "disappears unless the caller asked for it."
    ),
    "isolation": (
        "A call changes nothing except its documented output: no input, no live training memory, "
        "no state of the process, and nothing accumulates from call to call."
    ),
    "symmetry": (
        "All ranks agree on the result and on the error: invalid input on one rank raises the same "
        "exception on every rank before any tensor moves, and no rank hangs."
    ),
    "all-or-nothing": "After an error, every output is as it was before the call.",
    "group": (
        "Only the ranks of the given process group, or of the tensor's own mesh, take part, and "
        "ranks are counted in that group's numbering."
    ),
    "autograd": (
        "Gradients flow where the function's clause says so, and arrive complete; everywhere else "
        "the call builds and keeps no graph."
    ),
    "compatibility": (
        "A call that gives a right answer with upstream's function gives a right answer with this "
        "one."
    ),
    "cost": (
        "The number of collectives does not grow with the number of tensors, and bytes and memory "
        "stay near the minimum that the ranks need."
    ),
}
"""Name -> the demand in one sentence, in the order of the report's columns."""


def listing(width: int = 100) -> str:
    """The laws for a terminal: the name, then the sentence beside it."""
    margin = max(map(len, LAWS)) + 2
    return "\n".join(
        textwrap.fill(
            sentence,
            width,
            initial_indent=name.ljust(margin),
            subsequent_indent=" " * margin,
        )
        for name, sentence in LAWS.items()
    )
