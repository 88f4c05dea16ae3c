"""The same checks under several versions of torch, as a page in Markdown, from their results.json.

`python -m report.versions RUN RUN … [--write FILE]`; `ci/verdicts` makes the runs and calls this.
A run is of one subject under one torch. Functions down, versions across; what is not the same in
all versions is listed below with its reason, and what is unexpected before that.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from defects.catalogue import read as read_defects
from defects.summary import met
from harness.system import pipes
from report.compare import AREA
from report.matrix import Cell
from report.read import BadResultsError, read
from report.terminal import UNEXPECTED

TORCH = "torch.distributed"
_HEAD = """\
# Verdicts by version of torch

Torch {versions}; {backend} on {device}. Written by `ci/verdicts`; [the runs](#the-runs) have dates.

A cell says how many checks hold, of how many. The others fail for a known reason; it stands in
[torch.distributed.toml](torch.distributed.toml), or in [callers.toml](callers.toml) where torch's
code around the functions is at fault. `✗` marks a cell with a verdict that nothing expects, `·` one
without checks.
"""


class NotOneTableError(Exception):
    """The runs do not make one table; the text says which, and what was expected."""


@dataclass(frozen=True)
class Column:
    """One subject under one torch."""

    run: dict[str, Any]
    checks: dict[str, dict[str, Any]]

    @property
    def subject(self) -> str:
        return str(self.run["subject"])

    @property
    def torch(self) -> str:
        """Without what it was built for: 2.15.0 of 2.15.0+cu132."""
        return str(self.run["torch"]).partition("+")[0]

    def cell(self, ids: Iterable[str]) -> str:
        """How many of these checks hold, of how many that ran."""
        found = Cell()
        found.verdicts.update(self.checks[i]["verdict"] for i in ids if i in self.checks)
        if not found.total:
            return "·"
        absent = found.verdicts["precondition"]
        ran = f"{found.held} of {found.total - absent}" if absent < found.total else ""
        text = ", ".join(filter(None, [ran, f"{absent} not run" if absent else ""]))
        return f"✗ {text}" if found.state == "unexpected" else text


def columns(runs: Sequence[dict[str, Any]]) -> list[Column]:
    """Torch's own columns first, each subject's in the order of versions.

    Raises NotOneTableError where a run was stopped early, where two are of the same subject and
    torch, or on different backends or devices.
    """
    found = [Column(data["run"], {c["id"]: c for c in data["checks"]}) for data in runs]
    seen: set[tuple[str, str]] = set()
    for column in found:
        run = column.run
        name = f"{column.subject} under torch {column.torch}"
        if not column.checks or run["selected"] != len(column.checks):
            raise NotOneTableError(
                f"{name}: {len(column.checks)} of {run['selected']} selected checks ran: run it "
                "again, to its end"
            )
        if (column.subject, column.torch) in seen:
            raise NotOneTableError(f"{name} is given twice: give one run for each")
        seen.add((column.subject, column.torch))
    if len({(c.run["backend"], c.run["device"]) for c in found}) != 1:
        raise NotOneTableError(
            "the runs are of several backends or devices: give those of one at a time"
        )
    return sorted(found, key=lambda c: (c.subject != TORCH, c.subject, Version(c.torch)))


def page(found: Sequence[Column]) -> Iterator[str]:
    """The lines of the page."""
    subjects = list(dict.fromkeys(c.subject for c in found))
    versions = ", ".join(dict.fromkeys(c.torch for c in found))
    run = found[0].run
    yield from _HEAD.format(versions=versions, **run).splitlines()
    yield from _tables(found, subjects)
    yield from _unexpected(found)
    yield from _defects(found)
    yield from _differences(found, subjects)
    yield from _runs(found)


def _tables(found: Sequence[Column], subjects: Sequence[str]) -> Iterator[str]:
    rows: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for identity, check in sorted(_union(found).items()):
        if check["function"]:
            rows[check["module"]][check["function"]].append(identity)
    others = [s for s in subjects if s != TORCH]
    heads = [f"torch {c.torch}" for c in found if c.subject == TORCH]
    heads += [f"{s}, under each" for s in others]
    for module in sorted(rows, key=lambda name: (not name, name == AREA, name)):
        yield ""
        # What a subject's own root holds, as shardproof.install, has no module.
        yield f"## {f'`{module}`' if module not in ('', AREA) else module or 'the root'}"
        yield ""
        yield "| | " + " | ".join(heads) + " |"
        yield "| --- |" + " ---: |" * len(heads)
        named = sorted(rows[module].items(), key=lambda row: row[0].casefold().lstrip("_"))
        for function, ids in named:
            yield _row(f"`{function}`" if module != AREA else function, found, others, ids)
        yield _row("**all**", found, others, [i for _, ids in named for i in ids])


def _row(name: str, found: Sequence[Column], others: Sequence[str], ids: Sequence[str]) -> str:
    cells = [c.cell(ids) for c in found if c.subject == TORCH]
    for subject in others:
        by_version = {c.torch: c.cell(ids) for c in found if c.subject == subject}
        several = [f"{version}: {cell}" for version, cell in by_version.items()]
        same = len(set(by_version.values())) == 1
        cells.append(next(iter(by_version.values())) if same else "<br>".join(several))
    return f"| {name} | " + " | ".join(cells) + " |"


def _unexpected(found: Sequence[Column]) -> Iterator[str]:
    bad = list(unexpected(found))
    if not bad:
        return
    yield ""
    yield "## Unexpected"
    yield ""
    for column, check in bad:
        said = " ".join(check["message"].split())[:200].replace("`", "'")
        yield f"- {column.subject} under torch {column.torch}: {check['verdict']} `{check['id']}`:"
        yield f"  `{said}`"


def unexpected(found: Sequence[Column]) -> Iterator[tuple[Column, dict[str, Any]]]:
    """The checks whose verdict nothing expects, of functions or not."""
    for column in found:
        for _, check in sorted(column.checks.items()):
            if check["verdict"] in UNEXPECTED:
                yield column, check


def _defects(found: Sequence[Column]) -> Iterator[str]:
    """The defects that torch's columns meet, versions across: how many checks lead to each."""
    columns = [c for c in found if c.subject == TORCH]
    counts = [{i: len(ids) for i, ids in met(list(c.checks.values())).items()} for c in columns]
    known = read_defects()
    rows = sorted({i for count in counts for i in count} & set(known), key=lambda i: known[i].rank)
    if not rows:
        return
    yield ""
    yield "## Defects by version"
    yield ""
    yield "How many checks lead to each; `·` none. A list of a check counts for each."
    yield ""
    yield "| defect | | severity | " + " | ".join(f"torch {c.torch}" for c in columns) + " |"
    yield "| --- | --- | --- |" + " ---: |" * len(columns)
    for identity in rows:
        defect = known[identity]
        cells = [str(count.get(identity, "·")) for count in counts]
        yield f"| {identity} | {defect.title} | {defect.worst} | " + " | ".join(cells) + " |"


def _differences(found: Sequence[Column], subjects: Sequence[str]) -> Iterator[str]:
    for subject in subjects:
        of_subject = [c for c in found if c.subject == subject]
        alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for identity in sorted(_union(of_subject)):
            said = tuple(_said(c.checks.get(identity)) for c in of_subject)
            if len(set(said)) > 1:
                alike[said].append(identity)
        yield ""
        yield f"## What differs between versions: {subject}"
        yield ""
        if not alike:
            yield f"Nothing, in {len(_union(of_subject))} checks."
        for said, ids in alike.items():
            at: dict[str, list[str]] = defaultdict(list)
            for column, words in zip(of_subject, said, strict=True):
                at[words].append(column.torch)
            yield f"- {len(ids)} check{'s' if len(ids) > 1 else ''}:"
            yield from (f"  - {', '.join(where)}: {words}" for words, where in at.items())
            yield from (f"  - `{identity}`" for identity in ids)


def _said(check: dict[str, Any] | None) -> str:
    """A verdict with its reason, as it stands in the list of differences."""
    if check is None:
        return "there is no such check"
    if check["verdict"] == "pass":
        return "holds"
    if check["verdict"] == "xfail":
        expected = check["expected"]
        link = f" ([link]({expected['link']}))" if expected["link"] else ""
        known = read_defects()
        met_here = expected.get("defects", ())
        named = ", ".join(f"{i} ({known[i].title})" if i in known else i for i in met_here)
        return (
            " ".join(
                filter(None, ["fails" + (f": {named}." if named else "."), expected["reason"]])
            )
            + link
        )
    if check["verdict"] == "precondition":
        return "not run: " + " ".join(check["message"].split())
    return f"**{check['verdict']}**, unexpected"


def _runs(found: Sequence[Column]) -> Iterator[str]:
    yield ""
    yield "## The runs"
    yield ""
    yield "| subject | torch | Python | machine | date | commit | checks | seconds |"
    yield "| --- | --- | --- | --- | --- | --- | ---: | ---: |"
    for column in found:
        run = column.run
        counts = run["counts"]
        cells = [
            f"{run['subject']} {run['subject_version']}",
            run["torch"],
            run.get("python", ""),
            f"{run.get('cpus', '')} {run.get('machine', '')} cores".strip(),
            run["start"][:10],
            f"`{run['commit'][:12]}{'-dirty' if run['commit'].endswith('-dirty') else ''}`",
            ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n),
            f"{sum(c['seconds'] for c in column.checks.values()):.0f}",
        ]
        yield "| " + " | ".join(cells) + " |"


def _union(found: Sequence[Column]) -> dict[str, dict[str, Any]]:
    return {identity: check for column in found for identity, check in column.checks.items()}


def main(arguments: list[str] | None = None) -> int:
    """Print or write the page; 1 with an unexpected verdict, 3 where the runs make no page."""
    parser = argparse.ArgumentParser(prog="python -m report.versions", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a folder with results.json"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="there, not on the terminal")
    options = parser.parse_args(arguments)
    try:
        found = columns([read(run) for run in options.runs])
    except (BadResultsError, NotOneTableError) as error:
        print(f"report.versions: {error}", file=sys.stderr)
        return 3
    text = "\n".join(page(found)) + "\n"
    if options.write:
        options.write.write_text(text)
    else:
        print(text, end="")
    bad = list(unexpected(found))
    for column, check in bad:
        print(
            f"report.versions: {column.subject} under torch {column.torch}: "
            f"{check['verdict']} {check['id']}",
            file=sys.stderr,
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(pipes.run(main))
