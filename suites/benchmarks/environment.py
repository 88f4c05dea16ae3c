"""The environment in which asv measures a commit: that commit's reference on .venv's packages.

asv's own environments install torch anew, from the network, at versions that nobody pinned. This
one is a bare venv that sees the packages of the interpreter that runs asv, and into which the
commit's reference is copied; so both sides of a comparison run on the very same torch. The suite
that measures them is the working tree's, as always in asv.

`asv run --quick` is heard here, too, since asv tells its benchmarks nothing of it: they take small
models then, as `ci/bench --quick` does, whose numbers keep apart from others by their names. And
the session of a run ends with asv, where nothing else has said that it owns the run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asv import environment, util

from benchmarks.session_client import OWNER
from benchmarks.settings import PREFIX

PACKAGE = "shardproof"


class Overlay(environment.Environment):
    """A venv without packages of its own, but for the commit's reference."""

    tool_name = "overlay"
    matches_python_fallback = False

    def __init__(self, conf: Any, python: str, requirements: Any, variables: Any) -> None:
        self._python, self._requirements = python, requirements  # read by what super calls
        super().__init__(conf, python, requirements, variables)

    @classmethod
    def matches(cls, python: str) -> bool:
        """Only the Python that runs asv: its packages are what the commits are measured on."""
        return python == f"{sys.version_info[0]}.{sys.version_info[1]}"

    def check_presence(self) -> bool:
        """Whether the environment is there and sees the packages that it should see."""
        try:
            return self._paths_file().read_text() == self._paths()
        except OSError:
            return False

    def _setup(self) -> None:
        venv.create(self._path, with_pip=False, clear=True)
        self._paths_file().write_text(self._paths())

    def _install_project(self, repo: Any, commit_hash: str, build_dir: str) -> None:
        source = Path(build_dir, "reference", PACKAGE)
        if not source.is_dir():
            raise util.UserError(f"commit {commit_hash[:8]} has no reference/{PACKAGE} to measure")
        shutil.copytree(source, self._packages() / PACKAGE)

    def _uninstall_project(self) -> None:
        self._set_installed_commit_hash(None)
        shutil.rmtree(self._packages() / PACKAGE, ignore_errors=True)

    def run(self, args: list[str], **kwargs: Any) -> Any:
        """Run the environment's Python."""
        return self.run_executable("python", args, **kwargs)

    def _packages(self) -> Path:
        found = sysconfig.get_path(
            "purelib", "venv", vars={"base": self._path, "platbase": self._path}
        )
        return Path(found)

    def _paths_file(self) -> Path:
        return self._packages() / "overlay.pth"

    def _paths(self) -> str:
        # Plain lines: the .pth files in there, the editable install among them, are not followed.
        suites = Path(os.getcwd(), "suites")
        return f"{sysconfig.get_path('purelib')}\n{suites}\n"


def interpreter(root: Path) -> str:
    """The interpreter of the repository's .venv."""
    return str(root / ".venv" / "bin" / "python")


def clean(root: Path) -> bool:
    """Whether what is measured is what the commit HEAD holds; False without a repository."""
    asked = ["git", "status", "--porcelain", "--", "reference", "suites"]
    try:
        told = subprocess.run(asked, cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return False
    return told.returncode == 0 and not told.stdout.strip()


def is_asv(command: Sequence[str]) -> bool:
    """Whether this command line is asv's."""
    program = Path(command[0])
    return program.name == "asv" or program.parts[-2:] == ("asv", "__main__.py")


def told_quick(command: Sequence[str]) -> bool:
    """Whether this command line is asv's, and asks for a quick run."""
    return is_asv(command) and not {"--quick", "-q"}.isdisjoint(command[1:])


if is_asv(sys.argv):  # which imports this before it starts any process
    os.environ.setdefault(OWNER, str(os.getpid()))
    if told_quick(sys.argv):
        os.environ[f"{PREFIX}QUICK"] = "1"
