"""What the pages show is what their commands print, and what they state stands elsewhere, too."""

from __future__ import annotations

import re
import tomllib

import pytest

from report import readme


@pytest.mark.parametrize("name", ["example", "example, mended"])
def test_the_example_prints_what_is_shown(name: str) -> None:
    assert readme.run(readme.PLACES[name].command) + "\n" == readme.shown(name)


@pytest.mark.parametrize("name", list(readme.PLACES))
def test_every_place_is_filled(name: str) -> None:
    assert readme.shown(name).strip()


@pytest.mark.parametrize(
    ("short", "whole"),
    [
        ("ci/conformance, in short", "ci/conformance"),
        ("failure, in short", "failure"),
        ("ci/bench --table, in short", "ci/bench --table"),
        ("before and after, in all", "before and after"),
    ],
)
def test_the_short_form_is_taken_from_the_whole(short: str, whole: str) -> None:
    place = readme.PLACES[short]
    assert readme.shown(short) == place.keep(readme.shown(whole).strip("\n")) + "\n"


def test_every_place_of_a_page_has_a_command() -> None:
    marks = [
        mark
        for page in readme.PAGES
        for mark in re.findall(r"^<!-- output: (.*) -->$", page.read_text(), re.MULTILINE)
    ]
    assert sorted(marks) == sorted(readme.PLACES)


def test_one_range_of_torch_versions_is_stated_everywhere() -> None:
    project = tomllib.loads((readme.ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = (d for d in project["dependencies"] if d.startswith("torch"))
    first, below = re.fullmatch(r"torch>=2\.(\d+),<2\.(\d+)", torch).groups()  # type: ignore[union-attr]
    install = (readme.ROOT / "reference" / "shardproof" / "_install.py").read_text()
    assert f"TORCH_FROM, TORCH_BELOW = (2, {first}), (2, {below})\n" in install
    assert f"torch 2.{first} to 2.{int(below) - 1}" in readme.README.read_text()
