"""The process that starts the runs of these tests: it has imported torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bundle.small_repository import Repository
from faults.launcher import Launcher


@pytest.fixture(scope="session", autouse=True)
def launcher() -> Iterator[None]:
    Repository.launcher = Launcher()
    yield
    Repository.launcher.close()
