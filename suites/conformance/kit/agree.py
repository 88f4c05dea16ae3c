"""What all ranks say of one call, exchanged by no collective, so that nothing can hang.

A call that must fail on every rank alike is made with `attempt`, and its outcomes compared with
`everywhere`, which also names a rank that never came back from the call.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from conformance.kit.refusals import MISFIT, Mention, attempt, flaw

__all__ = ["assert_raises_everywhere", "attempt", "exchange"]


def exchange(world: Any, value: Any, name: str = "outcome", patience: float = 6.0) -> list[Any]:
    """Each rank's value (JSON), in rank order; an AssertionError names ranks that gave none."""
    world.post(name, json.dumps(value))
    deadline = time.monotonic() + patience
    told: dict[int, str] = {}
    while True:
        for rank in range(world.size):
            if rank not in told and (text := world.read(name, rank)) is not None:
                told[rank] = text
        missing = [r for r in range(world.size) if r not in told]
        if not missing:
            break
        if time.monotonic() > deadline:
            raise AssertionError(
                f"no answer from rank {', '.join(map(str, missing))} within {patience:g} s: "
                f"it hangs in the call, while this rank got {value!r}"
            )
        time.sleep(0.002)
    return [json.loads(told[r]) for r in range(world.size)]


def assert_raises_everywhere(
    world: Any,
    call: Callable[[], Any],
    *mentions: Mention,
    kinds: tuple[type[Exception], ...] = MISFIT,
    name: str = "outcome",
) -> None:
    """Every rank raises the same type, one of `kinds`, with a message that holds all `mentions`.

    A pattern stands for words of which any will do. See `conformance.kit.refusals`.
    """
    error = attempt(call)
    mine = None if error is None else [type(error).__name__, flaw(error, mentions, kinds)]
    told = exchange(world, mine, name)
    types = [t and t[0] for t in told]
    assert None not in types, f"no error on rank {types.index(None)}; by rank: {types}"
    assert len(set(types)) == 1, f"the ranks raise different errors: {types}"
    for rank, (_, found) in enumerate(told):
        assert not found, f"rank {rank}: {found}"
