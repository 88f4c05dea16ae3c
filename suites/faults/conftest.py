"""What the tests of the harness share: small suites, and the process that starts their sessions."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults.launcher import Launcher
from faults.sessions import CASES, Session


@pytest.fixture(scope="session", autouse=True)
def launcher() -> Iterator[None]:
    """The process that starts the sessions of these tests."""
    Session.launcher = Launcher()
    yield
    Session.launcher.close()


@pytest.fixture
def suite(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with a small suite: `suite("its source")`, or `suite(case="its file")`."""

    def make(source: str = "", case: str = "") -> Path:
        target = tmp_path / "test_it.py"
        if case:
            shutil.copy(CASES / f"{case}.py", target)
        else:
            target.write_text(source)
        return tmp_path

    return make
