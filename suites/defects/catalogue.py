"""Reads the catalogue: suites/defects/catalogue/SP-*.toml. Strict: each error names file and field.

id = "SP-001"               the file's name, too; never reused
title                       one sentence that a user understands
severity = ["corrupts"]     words of words.SEVERITIES, worst first
severity_note               which call shows each word
owner                       a word of words.OWNERS
mended_by = ["install"]     "install", "install(callers=True)", "nobody", or "torch >= 2.14"
affects = "torch <2.14"     the versions that have it; default: every one
build = "cpu"               the builds that have it, as in 2.13.0+cpu; default: every one
roads = ["tp-ddp"]          words of words.ROADS
functions, laws             what its checks judge
upstream = ["https://…"]    threads about it; default: none is known
sees, cause, workaround     what a user sees; where it is in torch 2.13; what helps without
                            shardproof, where something does
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

from defects.words import MENDERS, OWNERS, ROADS, SEVERITIES

FOLDER = Path(__file__).parent / "catalogue"
_ID = re.compile(r"SP-\d{3}")
_TEXTS = ("id", "title", "severity_note", "owner", "sees", "cause")
_LISTS = ("severity", "mended_by", "roads", "functions", "laws")
_OPTIONAL_TEXTS = ("affects", "build", "workaround")
_OPTIONAL_LISTS = ("upstream",)
_UPSTREAM = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+")


class BadDefectError(Exception):
    """A file of the catalogue that is not as it must be; the text names file and field."""


@dataclass(frozen=True)
class Defect:
    """One root cause by which torch breaks the contract."""

    id: str
    title: str
    severity: tuple[str, ...]
    severity_note: str
    owner: str
    mended_by: tuple[str, ...]
    affects: SpecifierSet
    build: str
    roads: tuple[str, ...]
    functions: tuple[str, ...]
    laws: tuple[str, ...]
    upstream: tuple[str, ...]
    sees: str
    cause: str
    workaround: str

    @property
    def worst(self) -> str:
        return self.severity[0]

    @property
    def rank(self) -> tuple[int, str]:
        """For sorting: worst first, then by id."""
        return list(SEVERITIES).index(self.worst), self.id

    @property
    def versions(self) -> str:
        """The versions of torch that have it, in words."""
        some = f"torch {self.affects}" if str(self.affects) != ">=0" else "every torch so far"
        return some + f", built for {self.build}" * bool(self.build)

    def is_in(self, torch: str) -> bool:
        """Whether this version of torch has it; a version that names no build may be any."""
        version = Version(torch)
        other = self.build and version.local and version.local != self.build
        return not other and Version(version.base_version) in self.affects


def read(folder: Path = FOLDER) -> dict[str, Defect]:
    """Every defect by its id, in the order of ids."""
    found = [_one(path) for path in sorted(folder.glob("*.toml"))]
    return {defect.id: defect for defect in found}


def _one(path: Path) -> Defect:
    try:
        raw = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise BadDefectError(f"{path}: {error}") from error
    known = {*_TEXTS, *_LISTS, *_OPTIONAL_TEXTS, *_OPTIONAL_LISTS}
    if unknown := sorted(set(raw) - known):
        raise BadDefectError(f"{path}: {unknown[0]}: there is no such field")
    texts = {name: _text(path, raw, name) for name in _TEXTS}
    texts |= {name: _text(path, raw, name) if name in raw else "" for name in _OPTIONAL_TEXTS}
    lists = {name: _list(path, raw, name) for name in _LISTS}
    lists |= {name: _list(path, raw, name) if name in raw else () for name in _OPTIONAL_LISTS}
    if not _ID.fullmatch(texts["id"]) or texts["id"] != path.stem:
        raise BadDefectError(f"{path}: id: {texts['id']!r}, expected {path.stem!r}, as SP-001")
    _of_vocabulary(path, "severity", lists["severity"], SEVERITIES)
    if list(lists["severity"]) != sorted(lists["severity"], key=list(SEVERITIES).index):
        raise BadDefectError(f"{path}: severity: {list(lists['severity'])} is not worst first")
    _of_vocabulary(path, "roads", lists["roads"], ROADS)
    _of_vocabulary(path, "owner", (texts["owner"],), OWNERS)
    for mender in lists["mended_by"]:
        if mender not in MENDERS:
            _versions(path, "mended_by", mender)
    for url in lists["upstream"]:
        if not _UPSTREAM.fullmatch(url):
            raise BadDefectError(
                f"{path}: upstream: {url!r}, expected an issue or a pull request on GitHub"
            )
    affects = _versions(path, "affects", texts.pop("affects") or "torch >=0")
    return Defect(**texts, **lists, affects=affects)  # type: ignore[arg-type]


def _text(path: Path, raw: dict[str, Any], name: str) -> str:
    value = raw.get(name)
    if not isinstance(value, str) or not value.strip():
        raise BadDefectError(f"{path}: {name}: missing or empty, expected a text")
    return " ".join(value.split())


def _list(path: Path, raw: dict[str, Any], name: str) -> tuple[str, ...]:
    value = raw.get(name)
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(v, str) and v.strip() for v in value)
    ):
        raise BadDefectError(f"{path}: {name}: missing or empty, expected a list of texts")
    if len(set(value)) < len(value):
        raise BadDefectError(f"{path}: {name}: the same twice: {value}")
    return tuple(value)


def _of_vocabulary(
    path: Path, name: str, values: tuple[str, ...], words: Mapping[str, str]
) -> None:
    for value in values:
        if value not in words:
            raise BadDefectError(f"{path}: {name}: {value!r}, expected one of {', '.join(words)}")


def _versions(path: Path, name: str, text: str) -> SpecifierSet:
    try:
        if not text.startswith("torch "):
            raise InvalidSpecifier
        return SpecifierSet(text.removeprefix("torch "))
    except InvalidSpecifier:
        raise BadDefectError(f"{path}: {name}: {text!r}, expected as 'torch >=2.14'") from None
