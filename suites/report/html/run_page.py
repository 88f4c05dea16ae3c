"""report.html: a run as one page, from its results and the catalogue of defects."""

from __future__ import annotations

import datetime
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from defects.catalogue import read
from defects.summary import met
from defects.words import ROADS
from report.answer import answer, by_level
from report.html import benchmark_data, check_data, defect_data
from report.html.pages import render
from report.laws import LAWS
from report.matrix import matrix
from report.terminal import UNEXPECTED

NAME = "report.html"
_SCRIPTS = ("checks.js", "filter.js", "report.js")
_VENDORED = ("licences.js", "d3-7.9.2.min.js", "plot-0.6.17.umd.min.js")
_CHARTS = (*(f"vendor/{name}" for name in _VENDORED), "benchmarks.js")


def write(data: dict[str, Any], file: Path, folder: Path) -> None:
    """Write the page of the run in `folder` in one step: who reads it sees a whole one.

    Raises ValueError where its benchmarks are no journal.
    """
    text = page(data, benchmark_data.benchmarks_of(folder))
    step = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        step.write_text(text, encoding="utf-8", errors="replace")
        step.replace(file)
    finally:
        step.unlink(missing_ok=True)


def page(data: dict[str, Any], benchmarks: dict[str, Any] | None = None) -> str:
    """The page of a run, from what its results.json holds, and its benchmarks where it has any."""
    checks, catalogue = data["checks"], read()
    found = met(checks)
    must, choices = by_level(checks, catalogue)
    known = [*must, *choices]
    names = {(c["module"], c["function"]) for c in checks if c["function"]}
    of_checks = {c["law"] for c in checks if c["law"]}
    laws = [law for law in LAWS if law in of_checks] + sorted(of_checks - set(LAWS))
    return render(
        "report.html",
        scripts=(*_SCRIPTS, *(_CHARTS if benchmarks else ())),
        styles=("report.css",),
        data={
            "checks": check_data.checks(checks),
            "defects": defect_data.for_scripts(catalogue, found),
            **({"benchmarks": benchmarks} if benchmarks else {}),
        },
        benchmarks=benchmarks,
        run=data["run"],
        answer=answer(data, catalogue),
        counts=[(verdict, n) for verdict, n in data["run"]["counts"].items() if n],
        total=len(checks),
        unexpected=sum(check["verdict"] in UNEXPECTED for check in checks),
        **defect_data.values(known),
        by_severity=defect_data.by_severity(must),
        choices=choices,
        strangers=sorted(identity for identity in found if identity not in catalogue),
        seen={identity: len(several) for identity, several in found.items()},
        others=_without_defect(checks),
        matrix=matrix(checks),
        laws={law: LAWS.get(law, "") for law in laws},
        environment=environment(data["run"]),
        seconds=_seconds(data["run"]),
        choose={
            "function": sorted(f"{module}.{function}" for module, function in names),
            "law": laws,
            "verdict": [verdict for verdict, n in data["run"]["counts"].items() if n],
            "severity": defect_data.severities(known),
            "level": sorted({check.get("level", "MUST") for check in checks}),
            "road": [road for road in ROADS if any(road in defect.roads for defect in known)],
        },
    )


def _without_defect(checks: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Known failures that lead to no defect, by their reason."""
    groups: dict[tuple[str, str, str], int] = defaultdict(int)
    for check in checks:
        expected = check["expected"]
        if check["verdict"] == "xfail" and not expected.get("defects"):
            groups[expected["reason"], expected["link"], expected["file"]] += 1
    return [
        {"reason": reason, "link": link, "file": file, "count": count}
        for (reason, link, file), count in groups.items()
    ]


_TITLES = {
    "subject": "Subject",
    "subject_file": "Subject's file",
    "torch": "torch",
    "backend": "Backend",
    "device": "Device",
    "cuda": "CUDA",
    "nccl": "NCCL",
    "driver": "Driver",
    "python": "Python",
    "kernel": "Linux",
    "machine": "Machine",
    "cpus": "CPU cores",
    "start_method": "Ranks start by",
    "jobs": "Checks at a time",
    "world": "Largest world asked for",
    "order": "Order",
    "seed": "Seed",
    "commit": "Commit of the suites",
    "start": "Began",
    "end": "Ended",
    "exit": "Exit code",
}


def environment(run: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run ran with, as titles and values."""
    values = dict(run)
    values["subject"] = f"{run['subject']} {run['subject_version']}".rstrip()
    for moment in ("start", "end"):
        values[moment] = run[moment][:19].replace("T", " ") + " UTC"
    rows = [(t, str(values[n])) for n, t in _TITLES.items() if values.get(n) not in (None, "")]
    if limits := run.get("limits"):
        rows.append(("Limits", ", ".join(f"{name} {value:g} s" for name, value in limits.items())))
    nodes = run.get("nodes", [])
    for node in nodes if len(nodes) > 1 else ():
        versions = ", ".join(f"{name} {value}" for name, value in node["versions"].items())
        taken = f", up to {node['ranks']} ranks" if node["ranks"] is not None else ""
        rows.append((f"Node {node['node']}", f"{node['host']}{taken}; {versions}".rstrip("; ")))
    return rows


def _seconds(run: dict[str, Any]) -> str:
    start, end = (datetime.datetime.fromisoformat(run[moment]) for moment in ("start", "end"))
    whole = round((end - start).total_seconds())
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
