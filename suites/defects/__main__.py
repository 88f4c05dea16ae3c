"""ci/defects: lists what torch breaks, tells one defect in full, writes docs/defects.md."""

from __future__ import annotations

import argparse
import sys

from defects import catalogue, seen
from defects.listing import chosen, in_full
from defects.page import PAGE, page
from defects.reproduce import reproduced
from defects.summary import line
from defects.words import ROADS, SEVERITIES
from harness.system import pipes


def main() -> int:
    """Print or write; 0, or 2 for wrong usage, as an id that no defect has."""
    parser = argparse.ArgumentParser(prog="ci/defects", allow_abbrev=False)
    parser.add_argument("ids", nargs="*", metavar="ID", help="tell these in full: SP-001")
    parser.add_argument("--severity", choices=SEVERITIES, metavar="WORD", help="of this severity")
    parser.add_argument("--road", choices=ROADS, metavar="ROAD", help="that this road meets")
    parser.add_argument("--function", metavar="NAME", help="that break this function")
    parser.add_argument("--torch", metavar="VERSION", help="that are in this torch")
    parser.add_argument("--words", action="store_true", help="print severities and roads")
    parser.add_argument("--write", action="store_true", help="write docs/defects.md")
    options = parser.parse_args()
    try:
        defects = catalogue.read()
    except catalogue.BadDefectError as error:
        parser.error(str(error))
    what_was_seen = seen.kept()
    if unknown := [i for i in options.ids if i not in defects]:
        parser.error(f"{unknown[0]}: there is no such defect; ci/defects lists them")
    if options.write:
        PAGE.write_text(page(defects, what_was_seen, reproduced()))
        return 0
    if options.words:
        for word, text in (SEVERITIES | ROADS).items():
            print(f"{word:20} {text}")
        return 0
    counts = {i: one["checks"] for i, one in what_was_seen["defects"].items()}
    if options.ids:
        texts = ["\n".join(in_full(defects[i], counts.get(i, 0))) for i in options.ids]
        print("\n\n".join(texts))
        return 0
    filters = {n: getattr(options, n) for n in ("severity", "road", "function", "torch")}
    try:
        found = chosen(defects.values(), **filters)
    except ValueError as error:
        parser.error(f"--torch: {error}")
    for word in SEVERITIES:
        for defect in found:
            if defect.worst == word:
                print(line(defect, counts.get(defect.id, 0)))
    print(f"{len(found)} of {len(defects)} defects")
    return 0


if __name__ == "__main__":
    sys.exit(pipes.run(main))
