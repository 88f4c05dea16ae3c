"""docs/defects.md: the catalogue as a page, by severity and by road, which a test keeps current."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from defects.catalogue import Defect
from defects.listing import chosen, mender
from defects.words import ROADS, SEVERITIES

PAGE = Path(__file__).parents[2] / "docs" / "defects.md"
Reproduced = dict[str, dict[str, dict[str, str]]]
VERSIONS = ("2.11.0", "2.13.0", "2.15.0")
"""Those that ci/verdicts runs under."""
_HEAD = """\
# What torch breaks

Written by `ci/defects --write` from `suites/defects/catalogue`. A defect is one root cause in
torch, with an id that stays. `ci/defects SP-001` tells one in full, `ci/defects --road tp-ddp`
lists those that a way of training or saving meets; `ci/reproduce SP-001` shows one with torch
alone.

- [By severity](#by-severity): each word with its rule, and its defects.
- [By road](#by-road): for each way that people train and save, what is safe on which torch.

A defect stands under the worst of its words. *Checks* are those of a run on torch {torch} with
`--thorough` that met it when they were last counted: blank where the defect is younger. *Mended by*
says whether [`shardproof.install()`](install.md), a later torch or nobody mends it.

## By severity
"""
_ROADS = """
## By road

A cell counts the defects that the road meets on this torch, by their worst word. The last two
columns name those that remain after `shardproof.install()`, and after `install(callers=True)`. A
road is safe where nothing corrupts, loses, hangs or crashes; a legal call may still be refused.
"""


_REPRODUCED = """
## Reproducers

Each defect has a script that needs nothing but torch: `ci/reproduce SP-001` prints it. This is what
they showed, by `ci/reproduce --all --check --write --torch VERSION`: as torch is, and after
`shardproof.install()`; with callers: after `shardproof.install(callers=True)`. SP-045 shows in
builds for the CPU alone, and 2.11.0 and 2.15.0 were builds for CUDA. *not run*: the defect is
younger than the last run under this torch.

"""


def page(defects: dict[str, Defect], seen: dict[str, Any], reproduced: Reproduced) -> str:
    """The whole page."""
    lines = [_HEAD.format(torch=seen["torch"].partition("+")[0])]
    counts = {i: one["checks"] for i, one in seen["defects"].items()}
    for word, rule in SEVERITIES.items():
        of_word = [d for d in chosen(defects.values()) if d.worst == word]
        lines += [f"### {word}", "", rule, "", *_table(of_word, counts), ""]
    lines += [_ROADS.strip("\n"), "", *_by_road(defects)]
    lines += [_REPRODUCED.rstrip("\n"), "", *_reproducers(defects, reproduced)]
    return "\n".join(lines) + "\n"


def _table(defects: Iterable[Defect], counts: dict[str, int]) -> list[str]:
    rows = ["| id | what breaks | also | mended by | checks |", "| --- | --- | --- | --- | ---: |"]
    for defect in defects:
        links = ", ".join(f"[#{url.rpartition('/')[2]}]({url})" for url in defect.upstream)
        whose = " *(torch's callers)*" if defect.owner != "the set" else ""
        title = _code(defect.title) + whose + (f" {links}" if links else "")
        menders = " or ".join(map(mender, defect.mended_by))
        also = ", ".join(defect.severity[1:])
        rows.append(
            f"| {defect.id} | {title} | {also} | {_code(menders)} | {counts.get(defect.id, '')} |"
        )
    return rows


def _by_road(defects: dict[str, Defect]) -> list[str]:
    titles = " | ".join(f"torch {version}" for version in VERSIONS)
    rows = [f"| road | {titles} | installed | with callers |", "| --- |" + " --- |" * 5]
    for road, words in ROADS.items():
        cells = [_cell(chosen(defects.values(), road=road, torch=version)) for version in VERSIONS]
        left = chosen(defects.values(), road=road, torch=VERSIONS[1])
        for menders in ({"install"}, {"install", "install(callers=True)"}):
            left = [d for d in left if d.mended_by[0] not in menders]
            cells.append(_cell(left, True))
        rows.append(f"| `{road}`: {_code(words)} | {' | '.join(cells)} |")
    return rows


def _reproducers(defects: dict[str, Defect], reproduced: Reproduced) -> list[str]:
    heads = " | ".join(f"torch {version} | after install" for version in reproduced)
    rows = [f"| id | {heads} |", "| --- |" + " --- |" * (2 * len(reproduced))]
    for identity in defects:
        said = [reproduced[version].get(identity, {}) for version in reproduced]
        words = " | ".join(f"{one.get('plain', 'not run')} | {_installed(one)}" for one in said)
        rows.append(f"| {identity} | {words} |")
    return rows


def _installed(said: Mapping[str, str]) -> str:
    word = said.get("installed", "not run")
    return f"{word}; {said['callers']} with callers" if "callers" in said else word


def _cell(defects: list[Defect], ids: bool = False) -> str:
    bad = [d for d in defects if d.worst in ("corrupts", "loses", "hangs", "crashes")]
    if not bad:
        return "safe" if not defects else f"safe; {len(defects)} lesser"
    if ids:
        return ", ".join(f"{d.id} {d.worst}" for d in bad)
    words = {w: sum(d.worst == w for d in bad) for w in SEVERITIES}
    return ", ".join(f"{n} {word}" for word, n in words.items() if n)


def _code(text: str) -> str:
    """Calls and names of the text as code, so that no underscore is taken for emphasis."""
    words = ((word.rstrip(",;"), word) for word in text.split(" "))
    return " ".join(
        f"`{w}`{word[len(w) :]}" if "_" in w or ("(" in w[1:] and w.endswith(")")) else word
        for w, word in words
    )
