"""In the session of `ci/soak`: checks round after round, their verdicts, what the parent holds."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from harness.parent import local_ranks
from harness.rank import rank_process
from harness.records.verdicts import UNEXPECTED, Verdict
from harness.settings import requirements
from soak.trend import Sample, grown

_A_SECOND = 50
"""More checks than any machine runs in a second: rounds for all the time that there is."""
_SAY = 30.0
"""Seconds between lines of progress."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("soak")
    group.addoption("--soak-minutes", type=float, default=0.0)
    group.addoption("--soak-checks", type=int, default=0)
    group.addoption("--soak-seed", type=int, default=0)
    group.addoption("--soak-json", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.soak_minutes:
        config.pluginmanager.register(Soak(config), "shardproof-soak")


class Soak:
    """What is seen of one session."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._random = random.Random(config.option.soak_seed)
        self._began = self._said = 0.0
        self._first: dict[str, str] = {}
        self._changed: list[dict[str, Any]] = []
        self._samples: list[Sample] = []
        self._each = 1
        self._checks = 0
        self._seed = 0
        self._session: pytest.Session

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        checks = [
            item
            for item in session.items
            if requirements.is_check(item) and not item.get_closest_marker("warns_of_nothing")
        ]
        self._each = max(1, len(checks))
        found: list[pytest.Item] = []
        most = self._config.option.soak_checks or self._config.option.soak_minutes * 60 * _A_SECOND
        while checks and len(found) < most:
            found += self._random.sample(checks, len(checks))
        self._session, session.items = session, found
        self._seed_worlds()
        self._began = self._said = time.monotonic()

    def _seed_worlds(self) -> None:
        """Give each world a seed of its own, which its ranks draw their data from."""
        original = local_ranks.LocalRanks._rank_spec

        def rank_spec(
            made: local_ranks.LocalRanks, number: int, place: int
        ) -> rank_process.RankSpec:
            seed = (self._config.option.soak_seed << 32) + made.order.world
            self._seed = seed
            return dataclasses.replace(original(made, number, place), seed=seed)

        local_ranks.LocalRanks._rank_spec = rank_spec  # type: ignore[assignment, method-assign]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        verdict = getattr(report, "verdict", None)
        if verdict is None or verdict is Verdict.PRECONDITION:
            return
        self._checks += 1
        first = self._first.setdefault(report.nodeid, str(verdict))
        if first != verdict:
            text = str(report.longrepr or "")[:2000]
            found = {"check": report.nodeid, "first": first, "then": str(verdict), "text": text}
            self._changed.append(found | {"number": self._checks, "seed": self._seed})
            self._say(f"{report.nodeid}: {first} at first, now {verdict}")

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        run: Any = self._config.pluginmanager.get_plugin("shardproof-run")
        run._checks.clear()  # what a run keeps of each check is no leak, and would hide one
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        kilobytes = pages * resource.getpagesize() // 1024
        self._samples.append(Sample(self._checks, kilobytes, len(os.listdir("/proc/self/fd"))))
        now = time.monotonic()
        option = self._config.option
        over = now > self._began + option.soak_minutes * 60
        if self._checks >= option.soak_checks if option.soak_checks else over:
            self._session.shouldstop = "it has been long enough"
        if now - self._said > _SAY:
            self._said = now
            self._say(self._progress())

    def _progress(self) -> str:
        last = self._samples[-1]
        return (
            f"{(time.monotonic() - self._began) / 60:.1f} min: {self._checks:,} checks, "
            f"round {1 + self._checks // self._each}, {len(self._changed)} verdicts changed; the "
            f"parent holds {last.kilobytes / 1024:.1f} MB and {last.descriptors} descriptors"
        )

    def _say(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def pytest_sessionfinish(self) -> None:
        found = {
            "checks": self._checks,
            "of": self._each,
            "minutes": (time.monotonic() - self._began) / 60,
            "changed": self._changed,
            "unexpected": {c: v for c, v in self._first.items() if v in UNEXPECTED},
            "grown": grown(self._samples),
            "samples": [tuple(vars(s).values()) for s in self._samples],
        }
        self._config.option.soak_json.write_text(json.dumps(found) + "\n")
