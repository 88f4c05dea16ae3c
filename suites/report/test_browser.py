"""Pages in a real browser: each test of browser/pages.py, run in a process of its own."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from report.browser import chromium, example_runs

PAGES = Path(__file__).parent / "browser" / "pages.py"
TESTS = [
    one.name
    for one in ast.parse(PAGES.read_text()).body
    if isinstance(one, ast.FunctionDef) and one.name.startswith("test_")
]
_LIMIT = 280


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Each test to what its cases said; empty where a case passed."""
    try:
        chromium.find()
    except chromium.NoBrowserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("browser")
    words = ["-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider", "-W", "error"]
    words += ["-p", "no:hypothesispytest", "-p", "report.browser.visiting", "-q", "--tb=short"]
    words += ["--import-mode=importlib"]
    words += ["--basetemp", str(folder / "pages"), "--junitxml", str(folder / "junit.xml")]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *words, str(PAGES)],
        capture_output=True,
        text=True,
        timeout=_LIMIT,
        check=False,
        env={**os.environ, "PYTHONPATH": str(PAGES.parents[2])},
    )
    assert ended.returncode in (0, 1), ended.stdout[-3000:] + ended.stderr[-3000:]
    found: dict[str, list[str]] = {}
    for case in ET.parse(folder / "junit.xml").iter("testcase"):
        bad = [one for one in case if one.tag in ("failure", "error", "skipped")]
        text = "\n".join(f"{case.get('name')}: {one.text}" for one in bad)
        found.setdefault(str(case.get("name")).partition("[")[0], []).append(text)
    return found


@pytest.mark.timeout(_LIMIT + 15)
@pytest.mark.parametrize("name", TESTS)
def test_in_a_browser(name: str, said: dict[str, list[str]]) -> None:
    assert name in said
    assert not any(said[name]), "\n".join(filter(None, said[name]))


def test_a_picture_of_a_page(tmp_path: Path) -> None:
    try:
        chromium.find()
    except chromium.NoBrowserError as error:
        pytest.skip(str(error))
    (tmp_path / "results.json").write_text(json.dumps(example_runs.everything()))
    picture = tmp_path / "page.png"
    words = ["-m", "report.page_command", str(tmp_path), "--screenshot", str(picture)]
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size < 200_000
