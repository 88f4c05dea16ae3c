"""docs/faults.md: the table of faults as a page, which a test holds to the table.

python -m faults.page [--show]: write it, or print it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from faults.table import CELLS, KINDS, NODE, PARENT, PHASES, RANK, SENSELESS, Cell

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
_HEAD = """\
# Faults, and what a run makes of them

Written by `ci/faults` from `suites/faults/table.py`; `suites/faults/test_fault_table.py` plants
each row in a run of its own suite and holds the harness to it. Each row also asserts that no
process outlives the run (and so no port and no memory) and no file but the run's own, that the next
check of the same run passes where the run goes on, and that `results.json` fits its schema.

"At once": no limit has to run out; other ranks have two more seconds once one has failed. The rows
were planted with shorter limits than the usual ones. Verdict "none": the check has no verdict, the
run ends with 3 or was killed. A rank's row names the rank; where it says *any rank*, all of them
meet the fault. "Thorough" rows wait for what another row waits for in the same way: `--thorough`
plants them, and all rows again on rank 0, which leads the process group.
"""
_WHERE = {
    RANK: "One rank meets the fault",
    PARENT: "The parent, which starts and judges the ranks, meets the fault",
    NODE: "A node of a run over two meets the fault (`--thorough`, as root)",
}


def page() -> str:
    """The whole page."""
    lines = [_HEAD, "| phase | what happens in it |", "| --- | --- |"]
    lines += [f"| {name} | {words} |" for name, words in PHASES.items()]
    for where, title in _WHERE.items():
        lines += ["", f"## {title}", "", *_table([c for c in CELLS if c.where == where])]
    lines += ["", "## Not planted", "", "| fault | phase | why |", "| --- | --- | --- |"]
    lines += [f"| {kind} | {phase} | {why} |" for (kind, phase), why in SENSELESS.items()]
    return "\n".join(lines) + "\n"


def _table(cells: Iterable[Cell]) -> list[str]:
    rows = ["| fault | phase | verdict | who is named | what is said | when |", "| --- |" * 6]
    rows[1] = "|" + " --- |" * 6
    for cell in sorted(cells, key=lambda c: list(KINDS).index(c.kind)):
        how = f"{KINDS[cell.kind]}; {cell.how}" if cell.how else KINDS[cell.kind]
        said = f"`{cell.said.strip()}`" if cell.said else ""
        more = ", thorough" if cell.thorough else ""
        rows.append(
            f"| {cell.kind}: {how} | {cell.phase} | {cell.verdict or 'none'} | {cell.who} | {said} "
            f"| {cell.clock}{more} |"
        )
    return rows


def main(arguments: list[str]) -> int:
    """Write the page, or print it; 0."""
    parser = argparse.ArgumentParser(prog="ci/faults", allow_abbrev=False)
    parser.add_argument("--show", action="store_true", help="print the page, and write nothing")
    if parser.parse_args(arguments).show:
        print(page(), end="")
    else:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
