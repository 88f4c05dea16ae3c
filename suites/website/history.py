"""Many runs: what each says, in columns of one subject under one torch on one backend."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from packaging.version import Version

from defects.summary import met
from report.matrix import NOT_RUN
from report.read import BadResultsError, read
from report.terminal import UNEXPECTED

TORCH = "torch.distributed"
_KEPT = ("id", "module", "function", "law", "level", "verdict", "message", "expected")


class NoSiteError(Exception):
    """The runs make no site; the text says which, and what was expected."""


@dataclass(frozen=True)
class Column:
    """What is judged again and again."""

    subject: str
    torch: str
    """A version without what it was built for; nightly for PyTorch's own nightly builds."""
    backend: str
    device: str

    @property
    def rank(self) -> tuple[Any, ...]:
        """Torch first, then by version, oldest first."""
        version = Version("99999") if self.torch == "nightly" else Version(self.torch)
        return self.subject != TORCH, self.subject, version, self.backend, self.device

    @property
    def slug(self) -> str:
        return slug(*(p for p in (self.subject, self.torch, self.backend, self.device) if p))

    def __str__(self) -> str:
        who = "torch" if self.subject == TORCH else f"{self.subject} on torch"
        return f"{who} {self.torch}, {self.backend} on {self.device}"


@dataclass(frozen=True, eq=False)
class Run:
    """One run, without what only its own report needs."""

    run: Mapping[str, Any]
    checks: Mapping[str, dict[str, Any]]
    missing: int
    """Checks that were selected and did not run."""

    @cached_property
    def column(self) -> Column:
        version = Version(self.run["torch"])
        torch = "nightly" if version.is_devrelease else version.base_version
        return Column(self.run["subject"], torch, self.run["backend"], self.run["device"])

    @cached_property
    def slug(self) -> str:
        """Its address: the same whenever the site is made anew."""
        at = re.sub(r"\D", "", self.run["start"])[:14]
        return f"{at[:8]}-{at[8:]}-{self.column.slug}"

    @property
    def night(self) -> str:
        return str(self.run["start"][:10])

    @property
    def commit(self) -> str:
        return str(self.run["commit"])

    @cached_property
    def ran(self) -> frozenset[str]:
        return frozenset(i for i, c in self.checks.items() if c["verdict"] not in NOT_RUN)

    @cached_property
    def counts(self) -> Counter[str]:
        """holds, known, unexpected, not run."""
        return Counter(map(state, self.checks.values()))

    @cached_property
    def defects(self) -> dict[str, int]:
        """Defects that break a MUST, with the number of checks that lead to each."""
        return {i: n for i, (n, must) in self._met.items() if must}

    @cached_property
    def choices(self) -> dict[str, int]:
        """Defects that break nothing but what is this project's choice of quality."""
        return {i: n for i, (n, must) in self._met.items() if not must}

    @cached_property
    def _met(self) -> dict[str, tuple[int, bool]]:
        found = met(list(self.checks.values()))
        return {i: (len(cs), any(c["level"] != "SHOULD" for c in cs)) for i, cs in found.items()}

    @property
    def state(self) -> str:
        """The worst that it has."""
        if self.counts["unexpected"] or self.missing:
            return "unexpected"
        return "known" if self.counts["known"] else "holds" if self.counts["holds"] else "not run"

    def results(self) -> dict[str, Any]:
        """As report.changes takes it."""
        return {"run": self.run, "checks": list(self.checks.values())}


def state(check: Mapping[str, Any]) -> str:
    """Of four words the one for a verdict."""
    if check["verdict"] in UNEXPECTED:
        return "unexpected"
    return {"pass": "holds", "xfail": "known"}.get(check["verdict"], "not run")


def of_results(data: Mapping[str, Any]) -> Run:
    """A run, from what its results.json holds."""
    checks = {}
    for check in data["checks"]:
        kept = {name: check.get(name, "") for name in _KEPT}
        kept["message"] = str(check["message"]).partition("\n")[0][:160]
        kept["ranks"] = [{"fate": rank["fate"]} for rank in check["ranks"]]
        checks[check["id"]] = kept
    return Run(data["run"], checks, data["run"]["selected"] - len(checks))


@dataclass
class History:
    """All runs, by column, the newest first."""

    columns: dict[Column, list[Run]]
    left_out: list[str] = field(default_factory=list)
    """Files that make no part of the site, each with why."""

    @property
    def runs(self) -> list[Run]:
        found = [run for runs in self.columns.values() for run in runs]
        return sorted(found, key=lambda r: (r.run["start"], r.slug), reverse=True)

    def newest(self, subject: str) -> list[Run]:
        """The newest run of each column of a subject."""
        return [runs[0] for column, runs in self.columns.items() if column.subject == subject]

    def before(self, run: Run) -> Run | None:
        """The run of the same column that came before."""
        runs = self.columns[run.column]
        place = runs.index(run) + 1
        return runs[place] if place < len(runs) else None


def history(paths: Iterable[Path]) -> History:
    """The runs of these files and folders; folders are searched for results.json.

    Of a night that judged in several orders the first counts. Raises NoSiteError.
    """
    found: dict[str, Run] = {}
    left_out: list[str] = []
    for file in _files(paths):
        try:
            run = of_results(read(file))
        except BadResultsError as error:
            left_out.append(str(error))
            continue
        if not run.checks:
            left_out.append(f"{file}: it judged nothing")
        elif run.run["order"] != "normal":
            left_out.append(f"{file}: in another order ({run.run['order']})")
        elif run.slug in found:
            left_out.append(f"{file}: of the same start as another run of the same")
        else:
            found[run.slug] = run
    if not found:
        raise NoSiteError("; ".join(["there is no run to show", *left_out[:3]]))
    columns: dict[Column, list[Run]] = defaultdict(list)
    for run in sorted(found.values(), key=lambda r: r.slug, reverse=True):
        columns[run.column].append(run)
    return History(dict(sorted(columns.items(), key=lambda one: one[0].rank)), left_out)


def _files(paths: Iterable[Path]) -> Sequence[Path]:
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise NoSiteError(f"{path}: there is no such file or folder")
        files = sorted(path.rglob("results.json")) if path.is_dir() else [path]
        if not files:
            raise NoSiteError(f"{path}: there is no results.json in it")
        found |= dict.fromkeys(file.resolve() for file in files)
    return list(found)


def slug(*parts: str) -> str:
    """A name for files and addresses."""
    return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", part) for part in parts)
