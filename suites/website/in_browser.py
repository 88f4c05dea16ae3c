"""What is wrong with pages in Chromium, as JSON: `python -m website.in_browser PAGE…`.

A process of its own, for Playwright starts threads, and ranks are forked from a process without.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from axe_playwright_python.sync_playwright import Axe

from report.browser import chromium

SIZES = {"screen": {"width": 1280, "height": 900}, "phone": {"width": 375, "height": 740}}


def findings(browser: Any, page: str, scheme: str, size: str) -> list[str]:
    """Of one page: what the console says, what it asks for, keeps people out, or sticks out."""
    found: list[str] = []
    context = browser.new_context(color_scheme=scheme, viewport=SIZES[size])
    tab = context.new_page()
    tab.on("console", lambda message: found.append(f"console: {message.text}"))
    tab.on("pageerror", lambda error: found.append(f"error: {error}"))
    asked: list[str] = []
    tab.on("request", lambda one: asked.append(one.url))
    tab.goto(page)
    for details in tab.locator("details").all():
        details.evaluate("one => one.open = true")
    for violation in Axe().run(tab).response["violations"]:
        if violation["impact"] in ("serious", "critical"):
            where = violation["nodes"][0]["target"]
            found.append(f"axe: {violation['id']} at {where}: {violation['help']}")
    wide = tab.evaluate("document.documentElement.scrollWidth")
    if wide > SIZES[size]["width"]:
        found.append(f"{wide} pixels wide")
    context.close()
    found += [f"asks for {url}" for url in asked if not url.startswith("file:")]
    return [f"{page.rpartition('/')[2][:60]}, {scheme}, {size}: {one}" for one in found]


def main() -> None:
    with chromium.started() as browser:
        found = [
            one
            for page in sys.argv[1:]
            for scheme in ("light", "dark")
            for size in SIZES
            for one in findings(browser, page, scheme, size)
        ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
