"""Which checks the suites of a commit have: collected from the commit's own files."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

_LIMIT = 300.0
"""Seconds for one collection; it takes about ten where nothing else runs."""


class CannotCollectError(Exception):
    """Nobody can say here which checks the commit has; the text says why."""


def of_commit(
    root: Path, commit: str, suites: Sequence[str], backend: str, *, thorough: bool
) -> set[str]:
    """The ids of the checks in these folders of the commit.

    Only a commit that HEAD has among its ancestors is collected, for that runs its files.

    Raises CannotCollectError.
    """
    known = _git(root, "merge-base", "--is-ancestor", commit, "HEAD")
    if known.returncode:
        raise CannotCollectError(
            f"commit {commit[:12]} is not in the history of this checkout ({root}): check out a "
            "version of this project that has it"
        )
    packed = _git(root, "archive", "--format=tar", commit)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
            archive.extractall(folder, filter="data")
        words = [sys.executable, "-m", "harness", "--collect-only", "-q", "-p", "no:cacheprovider"]
        words += ["--subject", "torch.distributed", "--backend", backend]
        words += ["--thorough"] if thorough else []
        words += suites
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "SHARD"))}
        variables |= {"PYTHONPATH": f"{folder}/suites", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                words,
                cwd=folder,
                env=variables,
                capture_output=True,
                text=True,
                timeout=_LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise CannotCollectError(
                f"collecting the suites of {commit[:12]} did not end within {_LIMIT:g} s"
            ) from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it said nothing"]
        raise CannotCollectError(f"the suites of {commit[:12]} cannot be collected here: {said[0]}")
    return {line for line in done.stdout.splitlines() if "::" in line}


def commit_here(root: Path) -> str:
    """The commit that is checked out, without changes; empty where there is none."""
    try:
        done = _git(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except CannotCollectError:
        return ""
    return done.stdout.decode().strip()


def _git(root: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, check=False)
    except FileNotFoundError:
        raise CannotCollectError("there is no git on this machine") from None
