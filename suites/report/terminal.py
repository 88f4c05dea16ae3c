"""A run on a terminal: the matrix, unexpected verdicts with their ranks, where the results are."""

from __future__ import annotations

import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterable
from typing import Any, TextIO

from defects.summary import lines, worst_first
from harness.session.certified import in_words
from report.compare import CALLERS
from report.matrix import matrix
from report.matrix_text import matrix_lines

UNEXPECTED = ("fail", "error", "timeout", "crash", "xpass")
_COLOURS = {
    "unexpected": "1;31",
    "expected": "33",
    "holds": "32",
    "absent": "36",
    "empty": "2",
    "title": "1",
}
_FIELD = 11
"""Where the text of a field begins, as `  cause    `."""
_DEFECT = 17
"""Where the title of a defect begins, behind its severity and id."""
_LINES = 30
_CALLS = 3
_NEARLY_ALL = 0.9


class Screen:
    """Lines to a stream, so wide and coloured as the terminal is."""

    def __init__(self, stream: TextIO, colour: bool, width: int = 80) -> None:
        self._stream, self._colour, self.width = stream, colour, max(width, 40)

    def line(self, text: str = "") -> None:
        """As it is: what people copy, and what fits."""
        self._stream.write(text + "\n")

    def wrapped(self, text: str, indent: int = 0, state: str = "") -> None:
        """Over several lines where it has to be, those after the first indented."""
        for line in textwrap.wrap(
            text,
            self.width,
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
        ):
            self.line(self.paint(line, state) if state else line)

    def paint(self, text: str, state: str) -> str:
        return f"\x1b[{_COLOURS[state]}m{text}\x1b[0m" if self._colour else text


def show(
    data: dict[str, Any],
    folder: str,
    screen: Screen,
    *,
    failures: bool = True,
    beside: Iterable[str] = (),
) -> None:
    """The whole report of one run; `beside` compares it with one of another torch."""
    if failures:
        _show_unexpected(data["checks"], folder, screen)
    found = matrix(data["checks"])
    if found:
        screen.line()
        for line in matrix_lines(found, screen.width, screen.paint):
            screen.line(line)
    _show_defects(data, screen)
    for number, line in enumerate(beside):
        if not number:
            screen.line()
        screen.wrapped(line, _DEFECT if number else 0, "" if number else "title")
    _show_end(data, folder, screen)
    if failures:
        _show_next(data, folder, screen)


def _show_unexpected(checks: list[dict[str, Any]], folder: str, screen: Screen) -> None:
    bad = [c for c in checks if c["verdict"] in UNEXPECTED]
    if not bad:
        return
    screen.line()
    lesser = sum(map(_is_should, bad))
    said = f", {lesser} of them SHOULD, not MUST" if lesser else ""
    screen.line(screen.paint(f"{len(bad)} unexpected{said}", "title"))
    for check in bad:
        screen.line()
        screen.line(screen.paint(f"{check['verdict'].upper()}  {check['id']}", "unexpected"))
        if check["clause"]:
            screen.wrapped(f"  clause   {check['clause']}", _FIELD)
        if _is_should(check):
            screen.wrapped(f"  level    SHOULD: {check['level_reason']}", _FIELD)
        screen.wrapped(f"  cause    {check['message'].partition(chr(10))[0][:800]}", _FIELD)
        for rank in _by_blame(check):
            where = f" in {rank['waiting_in']}" if rank["waiting_in"] else ""
            said = rank["message"].partition("\n")[0][:160]
            screen.wrapped(f"  rank {rank['rank']:<4}{rank['fate']}{where}: {said}", _FIELD)
        for line in _details(check):
            for part in textwrap.wrap(line, screen.width - 4, drop_whitespace=False) or [""]:
                screen.line(f"  | {part}")
        for rank in check["ranks"]:
            for call in rank.get("collectives", ())[-_CALLS:]:
                screen.wrapped(f"  rank {rank['rank']:<4}{_call(call)}", _FIELD)
        logs = [f"{folder}/{r['log']}" for r in _by_blame(check) if r["log"]]
        if logs:
            screen.line(f"  log      {logs[0]}")
        screen.line(f"  repeat   {check['command']}")


def _is_should(check: dict[str, Any]) -> bool:
    """Whether the clause is this project's choice of quality; see suites/conformance/kit/levels."""
    return bool(check.get("level") == "SHOULD")


def _details(check: dict[str, Any]) -> list[str]:
    """The traceback or stack of the rank that the cause names, its end where it is long."""
    rank = next(iter(_by_blame(check)), None)
    if rank is None or not rank["details"]:
        return []
    lines = rank["details"].rstrip().splitlines()
    cut = [f"[{len(lines) - _LINES} lines more in the log]"] if len(lines) > _LINES else []
    return cut + [line[:200] for line in lines[-_LINES:]]


def _call(call: dict[str, Any]) -> str:
    """A collective that a rank issued, in one line."""
    group = ", ".join(map(str, call["group"][:8])) + (", ..." if call["group"][8:] else "")
    said = f", {call['arguments']}" if call["arguments"] else ""
    return (
        f"{call['state']} {call['op']} #{call['number']} of group ({group}){said}, "
        f"{call['seconds_before_the_end']:.1f} s before the end"
    )


def _by_blame(check: dict[str, Any]) -> list[dict[str, Any]]:
    """The ranks that did not pass, the one that the cause names first."""
    bad = [r for r in check["ranks"] if r["fate"] != "passed"]
    named = re.match(r"ranks? (\d+)\b", check["message"])
    return sorted(bad, key=lambda r: not (named and r["rank"] == int(named[1])))


def _show_defects(data: dict[str, Any], screen: Screen) -> None:
    """What is broken and known, then how much is broken and not."""
    found = list(lines(data))
    if found:
        screen.line()
        screen.wrapped(found[0], state="title")
        for line in found[1:]:
            screen.wrapped(line, _DEFECT)
    if bad := sum(c["verdict"] in UNEXPECTED for c in data["checks"]):
        if not found:
            screen.line()
        text = f"{bad} unexpected verdicts lead to no defect; they stand above the matrix"
        screen.line(screen.paint(text, "unexpected"))


def _show_end(data: dict[str, Any], folder: str, screen: Screen) -> None:
    run = data["run"]
    known = [c["expected"] for c in data["checks"] if c["verdict"] == "xfail"]
    screen.line()
    if known:
        screen.line(f"{len(known)} known failures; --known lists each with its defect")
    for name, verdicts in (("known", ("xfail",)), ("unexpected", UNEXPECTED)):
        lesser = [c for c in data["checks"] if _is_should(c) and c["verdict"] in verdicts]
        if lesser:
            text = f"{len(lesser)} of the {name} failures are SHOULD, our choice of quality"
            screen.wrapped(text, 2)
    if callers := sum(e["file"] == CALLERS for e in known):
        screen.wrapped(f"{callers} of them in torch's callers of the set, whoever the subject", 2)
    counts = (
        ", ".join(f"{n} {verdict}" for verdict, n in run["counts"].items() if n) or "nothing ran"
    )
    screen.wrapped(
        f"{run['subject']} {run['subject_version']} (torch {run['torch']}, {run['backend']} on "
        f"{run['device']}): {counts}",
        2,
    )
    if run["selected"] != len(data["checks"]):
        missing = run["selected"] - len(data["checks"])
        screen.line(screen.paint(f"{missing} selected checks did not run", "unexpected"))
    if "certificate" in run:
        granted = run["certificate"]["granted"]
        screen.wrapped(in_words(run["certificate"]), 2, "holds" if granted else "unexpected")
    screen.line(f"results: {folder}/results.json")
    if os.path.exists(page := f"{folder}/report.html"):
        screen.line(f"report:  {page}")
    unrun = run["counts"].get("precondition", 0)
    if unrun and unrun >= _NEARLY_ALL * len(data["checks"]):
        said = (
            f"nearly nothing was judged: {unrun} of {len(data['checks'])} checks are preconditions"
        )
        why = Counter(c["message"] for c in data["checks"] if c["verdict"] == "precondition")
        screen.wrapped(f"{said}, most for: {why.most_common(1)[0][0]}", 2, "absent")


def _show_next(data: dict[str, Any], folder: str, screen: Screen) -> None:
    """The commands that lead on from here."""
    steps: list[tuple[str, str]] = []
    if any(c["verdict"] in UNEXPECTED for c in data["checks"]):
        steps.append(("each failure's repeat", "that check alone, with its traceback"))
    if worst := next((d.id for d in worst_first(data)), ""):
        steps.append((f"ci/defects {worst}", "the worst in full, and a way around it"))
        steps.append((f"ci/reproduce {worst}", "a script that shows it with torch alone"))
    if not steps:
        return
    screen.line()
    screen.line(screen.paint("next", "title"))
    room = max(len(command) for command, _ in steps) + 2
    for command, text in steps:
        screen.wrapped(f"  {command.ljust(room)}{text}", room + 2)


def show_known(data: dict[str, Any], screen: Screen) -> None:
    """Each known failure: its defects or reason once, with its link and the checks it explains."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for check in data["checks"]:
        if check["verdict"] == "xfail":
            key = (check["expected"]["reason"], check["expected"]["link"])
            by_reason.setdefault(key, []).append(check["id"])
    for (reason, link), ids in sorted(by_reason.items(), key=lambda pair: pair[1]):
        screen.line()
        screen.line(reason + (f"  {link}" if link else ""))
        for identity in ids:
            screen.line(f"  {identity}")
