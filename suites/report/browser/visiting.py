"""A pytest plugin: example pages, a tab of Chromium for each test, and what a tab shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from playwright.sync_api import expect

from report import slower
from report.browser import chromium, example_runs
from report.changes import changes
from report.html import comparison_page, run_page

JOURNAL = Path(__file__).parents[2] / "benchmarks" / "goals.jsonl"
PHONE = {"width": 375, "height": 740}
LOADED = 1.0
"""Seconds of CPU that the page's own thread may take: other work on the machine does not count."""

expect.set_options(timeout=15_000)

Open = Callable[..., Any]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with chromium.started() as found:
        yield found


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of each example run, one with benchmarks beside it, and a comparison."""
    found = tmp_path_factory.mktemp("pages")
    for name in ("everything", "reference", "measured", "empty", "interrupted", "large"):
        run = found / name
        run.mkdir()
        if name == "measured":
            (run / slower.NAME).write_text("\n".join(_measured()))
        data = getattr(example_runs, "reference" if name == "measured" else name)()
        run_page.write(data, run / run_page.NAME, run)
    before, now = example_runs.compared()
    names = ("out/before", "torch==2.15.0")
    costs = [slower.Slower("GatherStateDict many x4, torch.distributed: collectives", 2, 40)]
    changed = changes(before, now, costs)
    comparison_page.write(changed, (before, now), names, found / "comparison.html")
    return found


def _measured() -> list[str]:
    """Some measurements of the project's own journal, in worlds of two sizes."""
    return [line for line in JOURNAL.read_text().splitlines() if '"GatherStateDict"' in line]


@pytest.fixture
def visit(browser: Any, folder: Path) -> Iterator[Open]:
    """Open a page; at the end the console has nothing, and nothing was asked of the network."""
    said: list[str] = []
    asked: list[str] = []
    contexts = []

    def opened(name: str, place: str = "", **settings: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | settings)
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        tab = context.new_page()
        tab.set_default_timeout(15_000)
        tab.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda one: asked.append(one.url))
        file = folder / (f"{name}.html" if name == "comparison" else f"{name}/{run_page.NAME}")
        tab.goto(file.as_uri() + place)
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert not said
    assert not [url for url in asked if not url.startswith("file:")]


def shown(tab: Any, selector: str) -> list[str]:
    return [one.inner_text() for one in tab.locator(selector).all() if one.is_visible()]


def link(name: str) -> str:
    return "#check=" + quote(example_runs.check(name)["id"], safe="")


def copied(tab: Any, text: str) -> None:
    """Wait until the clipboard has it: a browser copies in its own time."""
    tab.wait_for_function("async text => await navigator.clipboard.readText() === text", arg=text)


def address(tab: Any) -> str:
    return str(tab.evaluate("location.href"))


def settle(tab: Any) -> None:
    """Wait for what the browser does after an entry is unfolded: a task, and a frame."""
    tab.evaluate("new Promise(done => setTimeout(() => requestAnimationFrame(() => done())))")


def focused(tab: Any) -> str:
    return str(tab.evaluate("document.activeElement.textContent"))
