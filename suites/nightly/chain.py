"""The steps of a night, each a command that a person could type."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from report.read import BadResultsError, read

ROOT = Path(__file__).parents[2]
ORDERS = ("normal", "reverse")
SUITES = "suites/conformance suites/integration"
QUICK_REPRODUCERS = ("SP-002", "SP-051")
_DIFFERS = re.compile(r"(?m)^SP-\d+ .*; the catalogue says: .*$")
SHARDS = 8
"""Nights that judge all automatic mutants of the reference together."""
MINUTES = 120
"""Most time for those of one night."""
LIMIT = 4 * 3600.0
"""Seconds for one step; the steps' own limits are shorter."""
GENERATED = 30.0
"""Minutes of generated cases."""
SECONDS = 56.0
"""Most time for one benchmark: all of them, twice, have to end before the next day."""


class EnvironmentFailedError(Exception):
    """A step could not judge: the night says nothing of the subject."""


@dataclass
class Step:
    """One command of the night."""

    name: str
    command: list[str]
    status: int
    seconds: float
    log: str


@dataclass
class Night:
    """What the commands of one night are given, and what they left."""

    folder: Path
    device: str
    backend: str
    subject: str
    torch: str | None
    """Another torch than the pinned one."""
    quick: bool
    selection: list[str]
    """Words for the suites: -k EXPRESSION."""
    share_gpus: bool = False
    """Whether ranks of NCCL share the GPUs where these are fewer."""
    steps: list[Step] = field(default_factory=list)

    def preflight(self) -> None:
        """The machine is fit, or the night ends here."""
        if self._run("preflight", ["ci/preflight", *self._machine()]):
            raise EnvironmentFailedError("the preflight failed")

    def judge(self) -> list[dict[str, Any]]:
        """Every suite in both orders; the results of each."""
        found = []
        for order in ORDERS:
            words = ["ci/conformance", "--thorough", "--subject", self.subject, *self._machine()]
            words += ["--torch", self.torch] if self.torch else []
            run = self.folder / order
            words += ["--order", order, "--run-dir", str(run), *self.selection]
            status = self._run(order, words, SHARDPROOF_SUITES=SUITES)
            try:
                results = read(run)
            except BadResultsError as error:
                raise EnvironmentFailedError(f"order {order}: {error}") from None
            if status not in {0, 1}:
                raise EnvironmentFailedError(
                    f"order {order} ended with {status}: the environment or the harness failed"
                )
            found.append(results)
        return found

    def reproduce(self) -> list[str]:
        """The catalogue's reproducers under this torch; what they show against the catalogue."""
        words = ["ci/reproduce", *(QUICK_REPRODUCERS if self.quick else ["--all"])]
        words += ["--check", "--warm", *(["--torch", self.torch] if self.torch else [])]
        if not (status := self._run("reproducers", words)):
            return []
        log = (self.folder / "reproducers.log").read_text()
        if status > 3 or not (found := _DIFFERS.findall(log)):
            raise EnvironmentFailedError(f"the reproducers could not be run: exit {status}")
        return found

    def generate(self) -> list[str]:
        """Generated cases of the reference, other ones each night; what differs from the oracle."""
        journal = self.folder / "generated.jsonl"
        minutes = 0.1 if self.quick else GENERATED
        words = ["ci/fuzz", "--minutes", f"{minutes:g}", "--seed", time.strftime("%Y%m%d")]
        words += ["--journal", str(journal), "--out", str(self.folder / "generated")]
        status = self._run("generated", words)
        if status not in {0, 1}:
            raise EnvironmentFailedError(f"generated cases ended with {status}")
        lines = journal.read_text().splitlines() if status else []
        return [str(json.loads(line)["difference"]) for line in lines]

    def measure(self) -> list[Path]:
        """The benchmarks, twice: what each run left."""
        found = []
        for number in (1, 2):
            journal = self.folder / f"benchmarks-{number}.jsonl"
            words = ["ci/bench", *self._machine(), "--journal", str(journal)]
            words += ["--quick"] if self.quick else ["--seconds", f"{SECONDS:g}"]
            if status := self._run(f"benchmarks-{number}", words):
                raise EnvironmentFailedError(f"benchmarks ended with {status}")
            if not journal.exists():
                raise EnvironmentFailedError(f"benchmarks left nothing in {journal}")
            found.append(journal)
        return found

    def mutate(self, shard: int, memory: Path) -> bool:
        """The night's share of the automatic mutants; whether each is caught or answered."""
        words = ["ci/mutation", "--shard", f"{shard}/{SHARDS}", "--minutes", str(MINUTES)]
        status = self._run("mutation", [*words, "--state", str(memory)])
        if status not in {0, 1}:
            raise EnvironmentFailedError(f"the mutants could not be judged: exit {status}")
        return status == 0

    def show(self, state: Path, site: Path) -> None:
        """The pages of all nights, from their results alone."""
        # The suites change between nights, and the site says so.
        words = ["ci/site", str(state.absolute()), "--out", str(site.absolute()), "--mixed"]
        if status := self._run("site", words):
            raise EnvironmentFailedError(f"the site could not be made: exit {status}")

    def _machine(self) -> list[str]:
        shared = ["--share-gpus"] if self.share_gpus else []
        return ["--device", self.device, "--backend", self.backend, *shared]

    def _run(self, name: str, words: list[str], **variables: str) -> int:
        log = self.folder / f"{name}.log"
        print(f"--- {name}: {shlex.join(words)}", flush=True)
        began = time.monotonic()
        with log.open("w") as out:
            status = subprocess.run(
                words,
                cwd=ROOT,
                env=os.environ | variables,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=LIMIT,
                check=False,
            ).returncode
        seconds = time.monotonic() - began
        self.steps.append(Step(name, words, status, round(seconds, 1), log.name))
        print(f"    ended with {status} after {seconds:.0f} s", flush=True)
        if status:
            print("".join(f"    {line}\n" for line in log.read_text().splitlines()[-15:]), end="")
        return status


def room(folder: Path, gigabytes: float = 1.0) -> None:
    """Raise EnvironmentFailedError where a night would not find room for what it leaves."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        raise EnvironmentFailedError(
            f"{folder}: {free:.1f} GB are free; a night needs {gigabytes:g}"
        )
