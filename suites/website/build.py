"""Writes the pages of a site into a folder, in one step each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from defects.catalogue import Defect, read
from defects.summary import sentence
from defects.words import SEVERITIES
from report.changes import changes
from report.compare import NotComparableError
from report.html.pages import render
from report.laws import LAWS
from report.matrix import matrix
from website import comparison
from website.badge import badge
from website.history import TORCH, History, Run, state
from website.mixture import Mixture, mixture

_STYLE = ("website/website.css",)
_MARKS = {"holds": "✓", "known": "x", "unexpected": "✗", "not run": "?", "": "·"}


def build(found: History, out: Path) -> list[Path]:
    """All pages; what stood in the folder under another name stays, for old addresses."""
    known = read()
    files = {
        "index.html": index(found, known),
        "diff.html": render(
            "website/diff.html",
            scripts=("website/diff.js",),
            styles=_STYLE,
            data=comparison.data(found, known),
        ),
        "runs.json": json.dumps([_listed(run) for run in found.runs], indent=1) + "\n",
        "badge.svg": badge(_shown_first(found)),
        ".nojekyll": "",
    }
    for run in found.runs:
        files[f"runs/{run.slug}.html"] = of_run(found, run, known)
    for column, runs in found.columns.items():
        files[f"badges/{column.slug}.svg"] = badge(runs[0])
    for name, text in files.items():
        file = out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        step = file.with_name(f".{file.name}.new")
        step.write_text(text)
        step.replace(file)
    return [out / name for name in files]


def _shown_first(found: History) -> Run:
    """Of torch's newest release, else of whatever is first."""
    released = [c for c in found.columns if c.subject == TORCH and c.torch != "nightly"]
    column = max(released, key=lambda c: c.rank) if released else next(iter(found.columns))
    return found.columns[column][0]


# --- the first page -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """How many checks of a function hold in a run, of how many that ran."""

    state: str
    text: str
    words: str


@dataclass(frozen=True)
class Subject:
    """One subject: its newest runs beside each other."""

    name: str
    runs: list[Run]
    mixed: Mixture
    modules: dict[str, dict[str, list[Cell]]]
    """Module to function to a cell of each run."""


@dataclass(frozen=True)
class Night:
    """One run in the list, with what it says that the one before did not."""

    run: Run
    before: Run | None
    news: list[tuple[str, str]]
    """State and words."""


def index(found: History, known: dict[str, Defect]) -> str:
    """Versions x backends x functions, and the nights."""
    names = dict.fromkeys(column.subject for column in found.columns)
    return render(
        "website/index.html",
        styles=_STYLE,
        subjects=[_subject(found, name) for name in names],
        nights=[_night(found, run) for run in found.runs],
        sentences={run.slug: said(run, known) for run in found.runs},
        mixed=mixture(found.runs),
        left_out=found.left_out,
        columns=found.columns,
        first=_shown_first(found),
        # In the page itself, whose policy lets it load no picture.
        badges={column: Markup(badge(runs[0])) for column, runs in found.columns.items()},
    )


def _subject(found: History, name: str) -> Subject:
    runs = found.newest(name)
    mixed = mixture(runs)
    functions: dict[str, dict[str, None]] = {}
    for run in runs:
        for check in run.checks.values():
            if check["function"]:
                functions.setdefault(check["module"], {})[check["function"]] = None
    modules = {
        module: {
            function: [_cell(run, mixed, module, function) for run in runs]
            for function in sorted(functions[module], key=lambda f: f.casefold().lstrip("_"))
        }
        for module in sorted(functions)
    }
    return Subject(name, runs, mixed, modules)


def _cell(run: Run, mixed: Mixture, module: str, function: str) -> Cell:
    of = (module, function)
    counts = Counter(
        state(check)
        for identity, check in run.checks.items()
        if (check["module"], check["function"]) == of and mixed.counts(identity)
    )
    return _as_cell(counts)


def _as_cell(counts: Counter[str]) -> Cell:
    ran = counts.total() - counts["not run"]
    worst = next((s for s in ("unexpected", "known", "holds", "not run") if counts[s]), "")
    words = ", ".join(f"{n} {_WORDS[s]}" for s, n in counts.items() if n)
    text = f"{counts['holds']}/{ran}" if ran else ""
    return Cell(worst, f"{_MARKS[worst]} {text}".strip(), words or "no check")


_WORDS = {
    "holds": "hold",
    "known": "fail as is known",
    "unexpected": "fail unexpectedly",
    "not run": "not run",
}


def _night(found: History, run: Run) -> Night:
    before = found.before(run)
    return Night(run, before, list(_news(before, run)) if before else [])


def _news(before: Run, run: Run) -> Iterator[tuple[str, str]]:
    try:
        now = changes(before.results(), run.results())
    except NotComparableError:
        yield "not run", "no check ran in both"
        return
    worse = len(now.new_failures) + sum(change.worse for change in now.changed)
    better = len(now.mended) + sum(not change.worse for change in now.changed)
    for kind, ones in (("unexpected", now.appeared), ("holds", now.vanished)):
        if ones:
            several = "defects" if ones.keys() - {min(ones)} else "defect"
            yield kind, f"{len(ones)} {several} {'new' if kind == 'unexpected' else 'gone'}"
    if worse:
        yield "unexpected", f"{worse} checks worse"
    if better:
        yield "holds", f"{better} checks better"


# --- a run ----------------------------------------------------------------------------------------


def said(run: Run, known: dict[str, Defect]) -> str:
    """The run in one sentence."""
    who = f"{run.column.subject} under torch {run.column.torch} on {run.column.backend}"
    if run.missing:
        return f"{who}: the run is incomplete, {run.missing} selected checks did not run"
    if run.counts["unexpected"]:
        return f"{who}: {run.counts['unexpected']} of {len(run.ran)} checks fail unexpectedly"
    if must := _defects(run.defects, known):
        return sentence(dict(run.run), must)
    if run.counts["known"]:
        return f"{who}: {run.counts['known']} known failures in {len(run.ran)} checks"
    return f"{who}: all {len(run.ran)} checks hold" if run.ran else f"{who}: nothing was judged"


def _defects(met: dict[str, int], known: dict[str, Defect]) -> list[Defect]:
    return sorted((known[i] for i in met if i in known), key=lambda d: d.rank)


def of_run(found: History, run: Run, known: dict[str, Defect]) -> str:
    """The page of one run, at an address that stays."""
    laws = dict.fromkeys(LAWS)
    laws |= dict.fromkeys(sorted({c["law"] for c in run.checks.values() if c["law"]} - laws.keys()))
    rows = {
        module: {
            function: [
                _as_cell(_states(cells[law].verdicts)) if law in cells else _as_cell(Counter())
                for law in laws
            ]
            for function, cells in functions.items()
        }
        for module, functions in matrix(list(run.checks.values())).items()
    }
    runs = found.columns[run.column]
    place = runs.index(run)
    return render(
        "website/run.html",
        styles=_STYLE,
        run=run,
        said=said(run, known),
        defects=_defects(run.defects, known),
        choices=_defects(run.choices, known),
        severities=list(SEVERITIES),
        bad=[c for c in run.checks.values() if state(c) == "unexpected"],
        laws=laws,
        modules=rows,
        before=found.before(run),
        after=runs[place - 1] if place else None,
        facts=list(_facts(run)),
    )


def _states(verdicts: Counter[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for verdict, count in verdicts.items():
        found[state({"verdict": verdict})] += count
    return found


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    data = run.run
    for name, key in (
        ("subject", "subject_version"),
        ("torch", "torch"),
        ("CUDA", "cuda"),
        ("NCCL", "nccl"),
        ("driver", "driver"),
        ("Python", "python"),
        ("kernel", "kernel"),
        ("machine", "machine"),
        ("cores", "cpus"),
        ("commit of the suites", "commit"),
        ("began", "start"),
        ("ended", "end"),
        ("command", "command"),
    ):
        if data.get(key):
            yield name, str(data[key])
    if "certificate" in data:
        yield "certificate", "granted" if data["certificate"]["granted"] else "refused"


def _listed(run: Run) -> dict[str, Any]:
    column = run.column
    return {
        "run": run.slug,
        "page": f"runs/{run.slug}.html",
        "badge": f"badges/{column.slug}.svg",
        "subject": column.subject,
        "torch": run.run["torch"],
        "backend": column.backend,
        "device": column.device,
        "commit": run.commit,
        "start": run.run["start"],
        "state": run.state,
        "counts": dict(run.counts),
        "defects": sorted(run.defects),
    }
