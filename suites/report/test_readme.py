"""What the README shows is what its commands print, and what it states stands elsewhere, too."""

from __future__ import annotations

import re
import tomllib

import pytest

from report import readme


@pytest.mark.parametrize("name", ["example", "example, mended"])
def test_the_example_prints_what_is_shown(name: str) -> None:
    assert readme.run(name) == readme.shown(name)


@pytest.mark.parametrize("name", list(readme.PLACES))
def test_every_place_is_filled(name: str) -> None:
    assert readme.shown(name).strip()


def test_one_range_of_torch_versions_is_stated_everywhere() -> None:
    project = tomllib.loads((readme.ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = (d for d in project["dependencies"] if d.startswith("torch"))
    first, below = re.fullmatch(r"torch>=2\.(\d+),<2\.(\d+)", torch).groups()  # type: ignore[union-attr]
    install = (readme.ROOT / "reference" / "shardproof" / "_install.py").read_text()
    assert f"TORCH_FROM, TORCH_BELOW = (2, {first}), (2, {below})\n" in install
    assert f"torch 2.{first} to 2.{int(below) - 1}" in readme.README.read_text()
