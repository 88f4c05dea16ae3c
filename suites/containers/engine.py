"""A folder with compose.yaml and an out/, as a user has it, and what its services do there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IMAGE = "shardproof:suites"
REVISION = "0123456789abcdef0123456789abcdef01234567"
BUILD_LIMIT, RUN_LIMIT = 1500, 280

FEW = "TestUpdateModuleParam"
"""A class of checks that is through in seconds."""


def build_environment() -> dict[str, str]:
    """The environment of every compose command of these tests.

    SHARDPROOF_BASE_IMAGE names another base than the Dockerfile's own.
    """
    env = {**os.environ, "SHARDPROOF_IMAGE": IMAGE, "REVISION": REVISION}
    env.pop("RUN_AS", None)
    if base := os.environ.get("SHARDPROOF_BASE_IMAGE"):
        env["BASE_IMAGE"] = base
    return env


def build() -> None:
    """Build the image of the working tree; AssertionError with the end of the log."""
    done = subprocess.run(
        ["docker", "compose", "--progress", "plain", "build", "tests-cpu"],
        cwd=ROOT,
        env=build_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_LIMIT,
        check=False,
    )
    assert done.returncode == 0, "the image cannot be built:\n" + done.stdout[-4000:]


@dataclass
class Outcome:
    """What one compose command left."""

    exit: int
    output: str
    out: Path

    def results(self) -> dict[str, Any]:
        """The results.json that the command says it wrote."""
        found = re.findall(r"^results: (out/\S+)$", self.output, re.MULTILINE)
        assert found, self.output
        path = self.out.parent / found[-1]
        data: dict[str, Any] = json.loads(path.read_text())
        return data

    def left_nothing(self) -> bool:
        """No run was started."""
        return not list(self.out.glob("*/results.json"))


class Project:
    """One compose project of its own, in a folder of its own."""

    def __init__(self, folder: Path, owner: int = 54321, group: int = 54322) -> None:
        """By default neither the image's own user nor the one who runs these tests owns it."""
        self.folder, self.out = folder, folder / "out"
        self.name = f"shardproof-{uuid.uuid4().hex[:8]}"
        self.owner, self.group = owner, group
        self.out.mkdir(parents=True)
        (folder / "docker").mkdir()
        shutil.copy(ROOT / "compose.yaml", folder)
        shutil.copy(ROOT / "docker" / "communication.env", folder / "docker")
        (folder / ".git").symlink_to(ROOT / ".git")
        for path in (folder, *folder.rglob("*")):
            os.chown(path, owner, group, follow_symlinks=False)

    @property
    def user(self) -> str:
        """Who owns it, as an engine takes it."""
        return f"{self.owner}:{self.group}"

    def compose(self, *words: str, **env: str) -> Outcome:
        """`docker compose WORDS` in this project, to its end."""
        done = subprocess.run(
            ["docker", "compose", "--project-name", self.name, *words],
            cwd=self.folder,
            env={**build_environment(), **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=RUN_LIMIT,
            check=False,
        )
        print(done.stdout[-20_000:])
        return Outcome(done.returncode, done.stdout, self.out)

    def run(
        self, service: str, *arguments: str, options: tuple[str, ...] = (), **env: str
    ) -> Outcome:
        """`docker compose run --rm OPTIONS SERVICE ARGUMENTS`."""
        return self.compose("run", "--rm", "--no-TTY", *options, service, *arguments, **env)

    def assert_owns_its_results(self) -> None:
        """All that stands below out/ belongs to the project's owner."""
        found = list(self.out.rglob("*"))
        assert found, f"{self.out} is empty"
        for path in found:
            state = path.lstat()
            assert (state.st_uid, state.st_gid) == (self.owner, self.group), path

    def down(self) -> None:
        """End and remove what the project left in the engine."""
        self.compose("--profile", "*", "down", "--remove-orphans", "--timeout", "5")
