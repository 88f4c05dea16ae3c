"""A pytest plugin: leaves report.html beside results.json."""

from __future__ import annotations

import os

import pytest

from harness.settings.options import SETTINGS

_SAID: pytest.StashKey[str] = pytest.StashKey()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the page from the file, so that it says nothing else; the exit code is not its own."""
    config = session.config
    if not config.pluginmanager.has_plugin("shardproof-run") or not session.items:
        return
    folder = config.stash[SETTINGS].run_dir
    if not (folder / "results.json").exists():
        return
    from report.html import run_page
    from report.read import read

    shown = os.path.relpath(folder / run_page.NAME, config.invocation_params.dir)
    try:
        run_page.write(read(folder, validate=False), folder / run_page.NAME, folder)
        config.stash[_SAID] = f"report:  {shown}"
    except Exception as error:  # whatever it is, the run has its verdict, and its results
        config.stash[_SAID] = f"{shown} cannot be written: {error!r}"


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say where it is."""
    if said := terminalreporter.config.stash.get(_SAID, ""):
        terminalreporter.write_line(said)
