"""A repository with a small suite, certified runs of it, and bundles that somebody has changed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bundle import archive, contents
from faults.launcher import Launcher
from harness.session import results
from report.read import parse

SUITES = Path(__file__).parents[1]
CONFIGURATION = """
[pytest]
testpaths = suites/conformance
addopts = -p harness.session.plugin --import-mode=importlib
"""
CHECKS = """
import pytest
@pytest.mark.judges("_state_dict_utils._identity_func")
@pytest.mark.law("values")
class TestIt:
    @pytest.mark.world(1, 2)
    def test_one(self): pass
    @pytest.mark.thorough
    @pytest.mark.world(1)
    def test_more(self): pass
    @pytest.mark.should("it is a matter of taste")
    @pytest.mark.world(1)
    def test_taste(self): assert 1 == 2
    def test_plain(self): pass
"""


@dataclass
class Repository:
    """The repository, and what runs in it leave beside it."""

    root: Path
    launcher: ClassVar[Launcher]

    def write(self, name: str, text: str) -> None:
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def commit(self) -> str:
        who = {f"GIT_{a}_{b}": "x@example.org" for a in ("AUTHOR", "COMMITTER") for b in _WHO}
        for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "x"]):
            subprocess.run(["git", *words], cwd=self.root, env=os.environ | who, check=True)
        return self.git("rev-parse", "HEAD")

    def git(self, *words: str) -> str:
        words = ("git", *words)
        return subprocess.run(
            words, cwd=self.root, check=True, capture_output=True, text=True
        ).stdout.strip()

    def run(self, *arguments: str, name: str = "run") -> tuple[int, str, Path]:
        """(exit code, what it said, its folder)."""
        folder = self.root.parent / name
        output = folder.with_suffix(".txt")
        words = ["-q", "--tb=no", "--jobs", "1", "--no-warm-up", "--run-dir", str(folder)]
        words += ["-o", "testpaths=suites/conformance", *arguments]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "SHARD"))}
        session = self.launcher.start(
            words, self.root, output, kept | {"PYTHONPATH": str(SUITES)}, fresh=False
        )
        code = session.wait(200)
        print(said := output.read_text())
        return code, said, folder


_WHO = ("NAME", "EMAIL")


def repository(folder: Path, checks: str = CHECKS) -> Repository:
    """A repository in the folder, committed."""
    made = Repository(folder / "repository")
    made.write("pytest.ini", CONFIGURATION)
    made.write(".gitignore", "__pycache__/\n.pytest_cache/\n")
    made.write("suites/conformance/test_small.py", checks)
    made.commit()
    return made


Change = Callable[[dict[str, Any]], None]


def edited(bundle: bytes, change: Change, *also: str, junit: tuple[str, str] = ("", "")) -> bytes:
    """A bundle whose results were changed, with all checksums made again.

    Args:
        bundle: the original.
        change: what is done to the results; their counts are made to fit.
        also: what is made again, too: summary.json, reports, inventory.txt.
        junit: what is replaced in junit.xml, and by what.

    """
    files = archive.unpack(bundle)
    data = json.loads(files["results.json"])
    change(data)
    checks = data["checks"]
    data["run"]["counts"] = {
        v: sum(c["verdict"] == v for c in checks) for v in data["run"]["counts"]
    }
    if "inventory.txt" in also:
        ids = [check["id"] for check in checks]
        text, data["run"]["inventory"] = results.inventory(ids)
        files["inventory.txt"] = text.encode()
    files["results.json"] = json.dumps(data).encode()
    read = parse(files["results.json"], "results.json")
    if "summary.json" in also:
        files["summary.json"] = contents.summary(files["results.json"], read)
    if "reports" in also:
        files |= contents.reports(read)
    old, new = (part.encode() for part in junit)
    assert old in files["junit.xml"]
    files["junit.xml"] = files["junit.xml"].replace(old, new, 1)
    return archive.pack(files)
