"""Known failures, as data: suites/expectations/<subject>.toml, and callers.toml beside it.

The first has those of the subject; the second those of torch's code around the set, met in
suites/integration: no subject can mend it from within the set. Of an entry that one mends from
without (`--callers`), a condition says so.

    [[expect]]
    check = "suites/conformance/…/test_gather.py::TestGather::test_dtype[*]"   # or a list of them
    verdict = "fail"                       # or a list; default fail
    when = ["torch>=2.11", "world>2", "backend==gloo"]   # all must hold; default: always; also
                                           # device==cpu, accelerator==none (the machine has none),
                                           # build==cpu (what torch was built for; else cuda, xpu),
                                           # callers==no (of a run without --callers)
    defect = "SP-001"                      # of suites/defects; or a list: all have to be mended
    reason = "one sentence"                # what the defect does not say, or where it is none of
                                           # the catalogue
    link = "https://github.com/pytorch/pytorch/issues/1"  # where there is one

`*` stands for any text; nothing else is special. All is strict: an entry that matches no collected
check, an entry with neither defect nor reason for a selected check, an id that the catalogue lacks,
a check that passes against its entry, or that fails with another verdict than the entry's, are
errors. A subject without a file passes everything but what callers.toml lists: defects of torch's
callers. A check has at most one entry that holds.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

from defects import catalogue
from defects.catalogue import Defect
from harness.records.verdicts import Verdict

CALLERS = "callers.toml"
_EXPECTABLE = frozenset({Verdict.FAIL, Verdict.ERROR, Verdict.TIMEOUT, Verdict.CRASH})
_CONDITION = re.compile(
    r"(torch|world|backend|device|accelerator|build|callers)\s*(==|!=|>=|<=|>|<)\s*(\S+)"
)


@dataclass
class Entry:
    """One known failure."""

    check: str
    verdicts: frozenset[Verdict]
    when: tuple[str, ...]
    defects: tuple[Defect, ...]
    reason: str
    """What was written; `why` says it all."""
    link: str
    source: str
    """The file it stands in."""
    pattern: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        self.pattern = re.compile(".*".join(map(re.escape, self.check.split("*"))))

    @property
    def file(self) -> str:
        return self.check.partition("::")[0]

    @property
    def why(self) -> str:
        """The defects by id and title, and the reason where there is one."""
        return "; ".join(
            [*(f"{d.id} {d.title}" for d in self.defects), *([self.reason] if self.reason else [])]
        )

    def as_json(self) -> dict[str, Any]:
        upstream = [url for defect in self.defects for url in defect.upstream]
        return {
            "defects": [defect.id for defect in self.defects],
            "reason": self.why,
            "link": self.link or next(iter(upstream), ""),
            "pattern": self.check,
            "file": self.source,
        }


@dataclass(frozen=True)
class Facts:
    """What conditions may ask for."""

    torch: str
    backend: str
    device: str
    accelerator: str
    """The machine's, whether this run's tensors lie on it or not: cuda, xpu, …, or none."""
    build: str
    """What torch was built for, whether the machine has it or not: cpu, cuda, xpu, …"""
    callers: str
    """Whether the subject is in the place of torch's callers of the set, too: yes or no."""


class Expectations:
    """The entries that hold for one subject: its own, and those of torch's callers of the set."""

    def __init__(self, folder: Path, subject: str, facts: Facts, *, none: bool = False) -> None:
        """`none`: read no file; whatever fails is unexpected."""
        self.path = folder / f"{subject}.toml"
        """The subject's own file, where new entries go."""
        self._facts = facts
        paths = () if none else (self.path, folder / CALLERS)
        files = [path for path in paths if path.exists()]
        try:
            known = catalogue.read()
        except catalogue.BadDefectError as error:
            raise pytest.UsageError(str(error)) from error
        self.entries = [entry for path in files for entry in _read(path, known)]
        for entry in self.entries:
            if entry.source == CALLERS and "integration" not in Path(entry.file).parts:
                raise pytest.UsageError(
                    f"{folder / CALLERS}: {entry.check}: a check of a function of the set fails by "
                    "the subject's doing; such entries stand in the subject's own file"
                )

    def match(self, nodeid: str, world: int | None) -> Entry | None:
        """The entry for a check, under this run's conditions."""
        for entry in self.entries:
            if entry.pattern.fullmatch(nodeid) and all(self._holds(c, world) for c in entry.when):
                return entry
        return None

    def validate(
        self, selected: Sequence[str], collected: Sequence[str] | None, config: pytest.Config
    ) -> None:
        """Raise UsageError for an entry without a reason, or for one that matches no check.

        `collected`: the ids that whole files have; None where only some of them were asked for.
        """
        nameless = [entry for entry in self.entries if not entry.why]
        if waiting := [e for e in nameless if any(map(e.pattern.fullmatch, selected))]:
            raise pytest.UsageError(
                f"{self.path.parent / waiting[0].source}, {waiting[0].check}: "
                "needs a defect of suites/defects/catalogue, or a reason, one sentence"
                + (f", as do {len(waiting) - 1} more" if waiting[1:] else "")
            )
        if collected is None:
            return
        root = config.rootpath
        covered = [(root / argument).resolve() for argument in config.args]
        lost = [
            entry.check
            for entry in self.entries
            if any((root / entry.file).resolve().is_relative_to(path) for path in covered)
            and not any(map(entry.pattern.fullmatch, collected))
        ]
        if lost:
            raise pytest.UsageError(
                f"{self.path.parent}: entries that match no check: " + ", ".join(lost)
            )

    def _holds(self, condition: str, world: int | None) -> bool:
        found = _CONDITION.fullmatch(condition)
        assert found, condition
        name, operator, value = found.groups()
        if name == "torch":
            return Version(self._facts.torch).base_version in SpecifierSet(operator + value)
        if name == "world":
            return world is not None and str(world) in SpecifierSet(operator + value)
        return (getattr(self._facts, name) == value) == (operator == "==")


def _read(path: Path, known: dict[str, Defect]) -> list[Entry]:
    try:
        data = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise pytest.UsageError(f"{path}: {error}") from error
    if unknown := set(data) - {"expect"}:
        raise pytest.UsageError(f"{path}: expected [[expect]] tables, found {sorted(unknown)}")
    return [
        entry
        for number, raw in enumerate(data.get("expect", []), 1)
        for entry in _entries(path, number, raw, known)
    ]


def _entries(path: Path, number: int, raw: dict[str, Any], known: dict[str, Defect]) -> list[Entry]:
    """One entry for each pattern of a table."""
    where = f"{path}, entry {number} ({raw.get('check', 'without check')})"
    if unknown := set(raw) - {"check", "verdict", "when", "defect", "reason", "link"}:
        raise pytest.UsageError(f"{where}: has no use for {', '.join(sorted(unknown))}")
    if not raw.get("check"):
        raise pytest.UsageError(f"{where}: needs a check, the id or a pattern of ids")
    verdicts = raw.get("verdict", "fail")
    verdicts = [verdicts] if isinstance(verdicts, str) else verdicts
    if not verdicts or not set(verdicts) <= set(map(str, _EXPECTABLE)):
        raise pytest.UsageError(
            f"{where}: verdict {verdicts}: expected some of {', '.join(sorted(_EXPECTABLE))}"
        )
    when = raw.get("when", [])
    when = [when] if isinstance(when, str) else when
    for condition in when:
        found = _CONDITION.fullmatch(condition)
        ordered = found and found[1] in {"torch", "world"}
        if not found or not (ordered or found[2] in {"==", "!="}):
            raise pytest.UsageError(
                f"{where}: condition {condition!r}: expected for example torch>=2.11, world>2, "
                "backend==nccl, device==cpu"
            )
        if ordered:
            try:
                SpecifierSet(found[2] + found[3])
            except InvalidSpecifier as error:
                raise pytest.UsageError(f"{where}: condition {condition!r}: {error}") from error
    named = raw.get("defect") or []
    named = [named] if isinstance(named, str) else named
    for name in named:
        if name not in known:
            raise pytest.UsageError(
                f"{where}: defect {name!r}: suites/defects/catalogue has no such file"
            )
    checks = [raw["check"]] if isinstance(raw["check"], str) else raw["check"]
    return [
        Entry(
            check,
            frozenset(map(Verdict, verdicts)),
            tuple(when),
            tuple(known[name] for name in named),
            str(raw.get("reason", "")).strip(),
            raw.get("link", ""),
            path.name,
        )
        for check in checks
    ]


_DETAIL = re.compile(
    r"""0x[0-9a-f]+ | \d+ | '[^']*' | "[^"]*" | \([^()]*\) | \[[^\[\]]*\]""",
    re.VERBOSE | re.IGNORECASE,
)


def _cause(message: str) -> str:
    """The first line without its ranks, and without what differs from one check to the next."""
    first = re.sub(r"^ranks? [\d, ]+: ", "", message).partition("\n")[0]
    return " ".join(_DETAIL.sub("…", first).split())


def append(path: Path, failed: list[tuple[str, Verdict, str]], collected: Iterable[str]) -> int:
    """Write entries, defects left empty, for failed checks: (id, verdict, message).

    One entry for each cause, with all checks that it made fail. Where all parameters of a function
    are among these, one pattern stands for them.
    """
    of_function: dict[str, set[str]] = defaultdict(set)
    for nodeid in collected:
        of_function[nodeid.partition("[")[0]].add(nodeid)
    grouped: dict[tuple[Verdict, str], dict[str, str]] = defaultdict(dict)
    for nodeid, verdict, message in failed:
        grouped[verdict, _cause(message)][nodeid] = message
    lines: list[str] = []
    for (verdict, _), members in sorted(grouped.items(), key=lambda pair: min(pair[1])):
        checks = list(_patterns(members, of_function))
        quoted = [json.dumps(check) for check in checks]
        several = ["check = [", *(f"    {check}," for check in quoted), "]"]
        lines += [
            "",
            "[[expect]]",
            *([f"check = {quoted[0]}"] if len(quoted) == 1 else several),
            *([] if verdict is Verdict.FAIL else [f"verdict = {json.dumps(str(verdict))}"]),
            'defect = ""',
            "# " + " ".join(next(iter(members.values())).split())[:160],
        ]
    if lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write("\n".join(lines).lstrip("\n" if not path.stat().st_size else "") + "\n")
    return len(grouped)


def _patterns(members: Iterable[str], of_function: dict[str, set[str]]) -> Iterator[str]:
    found: dict[str, set[str]] = defaultdict(set)
    for nodeid in members:
        found[nodeid.partition("[")[0]].add(nodeid)
    for function, ids in sorted(found.items()):
        if len(ids) > 1 and ids == of_function[function]:
            yield f"{function}[*]"
        else:
            yield from sorted(ids)
