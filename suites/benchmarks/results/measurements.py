"""Measurements for a table: made now, or read from a journal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import journal
from benchmarks.journal import Arms
from benchmarks.listing import label
from benchmarks.machine_label import machine_label
from benchmarks.run.parent import Parent, Wanted
from benchmarks.settings import Settings


def measure_or_read(
    wanted: Sequence[Wanted], settings: Settings, file: Path | None, **how: Any
) -> tuple[str, list[Arms | Exception]] | None:
    """(where it was measured, of each its numbers or why there are none).

    None where `file` is given and is no journal, which is told.
    """
    if file is not None:
        try:
            where, kept = journal.read(file)
        except (OSError, ValueError) as error:
            print(f"ci/bench: {error}; --journal makes one", file=sys.stderr)
            return None
        return where, [kept.get(label(*one)) or LookupError(f"not in {file}") for one in wanted]
    # As Ctrl-C does it: what was measured is in the journal.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found = Parent(settings).measure_each(
        wanted, told=lambda text: print(text, file=sys.stderr, flush=True), **how
    )
    return machine_label(settings), found
