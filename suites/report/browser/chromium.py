"""The system's Chromium: where it is, how pages are opened in it, and pictures of them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH, HEIGHT = 1280, 860


class NoBrowserError(Exception):
    """There is no Chromium; the text says how to get one."""


def find() -> str:
    """The path of the browser; NoBrowserError where there is none."""
    for name in _NAMES:
        if path := shutil.which(name):
            return path
    raise NoBrowserError(
        f"no browser: none of {', '.join(_NAMES)} is on the path (apt-get install chromium)"
    )


@contextlib.contextmanager
def started() -> Iterator[Any]:
    """A browser of Playwright."""
    path = find()
    from playwright.sync_api import sync_playwright

    # Chromium has no sandbox for root, as in a container.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def screenshot(page: Path, picture: Path) -> None:
    """The first screen of a page, in light colours."""
    with started() as browser:
        tab = browser.new_page(
            viewport={"width": WIDTH, "height": HEIGHT},
            color_scheme="light",
            reduced_motion="reduce",
        )
        tab.goto(page.resolve().as_uri())
        tab.screenshot(path=picture)
