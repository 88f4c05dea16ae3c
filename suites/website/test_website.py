"""The site: what is mixed is said, what is compared ran in both, every address leads somewhere."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree as ET

import pytest

from report.browser import chromium
from report.changes import changes
from report.test_report import RANK, check, results
from website import __main__ as command
from website.badge import badge
from website.history import History, NoSiteError, history, of_results
from website.mixture import mixture, refuse_mixture

COMMIT, OTHER = "a" * 40, "b" * 40
KNOWN = {"reason": "r", "link": "", "pattern": "*", "file": "x.toml"}
TORCH = {"subject": "torch.distributed", "commit": COMMIT}


def known(identity: str, *defects: str, **more: Any) -> dict[str, Any]:
    return check(id=identity, verdict="xfail", expected=KNOWN | {"defects": list(defects)}, **more)


def holds(identity: str, **more: Any) -> dict[str, Any]:
    return check(id=identity, verdict="pass", ranks=[], message="", **more)


def nights() -> dict[str, dict[str, Any]]:
    """Two nights of one torch, one of another, and one of the reference."""
    one = results(
        known("a", "SP-001"), known("b", "SP-002"), holds("c"), holds("d", law="cost"), **TORCH
    )
    two = results(
        *(known("a", "SP-001"), holds("b"), known("c", "SP-003"), check(id="d", law="cost")),
        start="2026-01-02T02:17:00.000+00:00",
        **TORCH,
    )
    newer = results(
        *(holds("a"), holds("b"), holds("c"), check(id="d", verdict="precondition", ranks=[])),
        torch="2.15.0+cu130",
        **TORCH,
    )
    ours = results(holds("a"), holds("b"), subject="shardproof", commit=COMMIT)
    return {"one": one, "two": two, "newer": newer, "ours": ours}


def laid(folder: Path, runs: dict[str, dict[str, Any]]) -> Path:
    for name, data in runs.items():
        file = folder / "state" / name / "normal" / "results.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data))
    return folder / "state"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    out = tmp_path / "site"
    assert command.main([str(laid(tmp_path, nights())), "--out", str(out)]) == 0
    return out


def text_of(page: Path) -> str:
    body = re.sub(r"<(style|script)\b.*?</\1>", "", page.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_versions_functions_and_nights_are_beside_each_other(site: Path) -> None:
    text = text_of(site / "index.html")
    assert "torch 2.13.0 gloo 2026-01-02 torch 2.15.0 gloo 2026-01-01" in text
    assert "_f ✗ 1/4 ✓ 3/3" in text, "the newest night of each version"
    assert "of 2 commits" not in text
    assert text.count("the first") == 3
    assert "1 defect new , 1 defect gone , 1 checks worse" in text
    assert "2026-01-02 02:17 torch 2.13.0, gloo on cpu 1 2 1 0 2" in text


def test_every_link_leads_somewhere_and_nothing_is_asked_of_a_network(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) == 6
    slugs = {run["run"] for run in json.loads((site / "runs.json").read_text())}
    for page in pages:
        text = page.read_text()
        for link in re.findall(r'(?:href|src)="([^"]*)"', text):
            path, _, anchor = unquote(html.unescape(link)).partition("#")
            if path.startswith("data:"):
                continue
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), f"{page.name}: {link}"
            assert target.is_relative_to(site)
            if ".." in anchor:
                assert set(anchor.split("..")) <= slugs
            elif anchor:
                assert f'id="{anchor}"' in html.unescape(target.read_text()), f"{page}: {link}"
        assert not re.search(r'url\(|@import|(?:src|href)="(?:https?:)?//', text), page


def test_runs_of_several_commits_are_refused_without_a_word_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = nights()
    runs["newer"]["run"]["commit"] = OTHER
    words = [str(laid(tmp_path, runs)), "--out", str(tmp_path / "site")]
    assert command.main(words) == 3
    said = capsys.readouterr().err
    assert "the runs are of 2 commits of the suites (" in said
    assert all(commit[:12] in said for commit in (COMMIT, OTHER))
    assert not (tmp_path / "site").exists()
    assert command.main([*words, "--mixed"]) == 0
    text = text_of(tmp_path / "site" / "index.html")
    assert "These runs are of 2 commits of the suites." in text
    # d ran in one of the two alone: it counts in neither column.
    assert "only the 3 checks that ran in all of them count, 1 others do not" in text
    assert "_f x 1/3 ✓ 3/3" in text


@pytest.mark.parametrize("commit", ["", f"{COMMIT}-dirty"])
def test_two_runs_of_a_tree_with_changes_are_a_mixture(commit: str) -> None:
    two = [of_results(results(holds("a"), commit=commit, start=f"2026-01-0{n}")) for n in (1, 2)]
    assert mixture(two).ids == frozenset("a")
    assert mixture(two[:1]).ids is None
    with pytest.raises(NoSiteError, match="--mixed"):
        refuse_mixture(two)


def test_what_makes_no_part_of_the_site_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = nights() | {"back": results(holds("a"), order="reverse", **TORCH)}
    runs |= {"empty": results(**TORCH), "again": runs["one"], "torn": {"run": 1}}
    folder = laid(tmp_path, runs)
    assert command.main([str(folder), "--out", str(tmp_path / "site")]) == 0
    said = capsys.readouterr().err
    for why in ("in another order (reverse)", "it judged nothing", "of the same start", "at $"):
        assert said.count(why) == 1, why
    assert "4 files are not shown" in text_of(tmp_path / "site" / "index.html")


@pytest.mark.parametrize("name", ["missing", "."])
def test_no_run_makes_no_site(name: str, tmp_path: Path) -> None:
    assert command.main([str(tmp_path / name), "--out", str(tmp_path / "site")]) == 3


def test_the_same_runs_make_the_same_pages_at_the_same_addresses(site: Path) -> None:
    before = {file: file.read_bytes() for file in site.rglob("*") if file.is_file()}
    state = site.parent / "state"
    assert command.main([str(state), "--out", str(site)]) == 0
    assert {file: file.read_bytes() for file in site.rglob("*") if file.is_file()} == before
    (state / "two" / "normal" / "results.json").unlink()
    assert command.main([str(state), "--out", str(site)]) == 0
    assert all(file.exists() for file in before), "an address stays"


def test_what_a_run_says_is_no_html(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    data = results(check(message=evil, id=f"x.py::{evil}", function=evil, law=evil))
    data["run"] |= {"subject": evil, "command": evil, "commit": evil, "kernel": '"><b>'}
    state = laid(tmp_path, {"evil": data})
    assert command.main([str(state), "--out", str(tmp_path / "site")]) == 0
    for file in (tmp_path / "site").rglob("*.*"):
        if file.suffix in (".html", ".svg"):
            assert evil not in file.read_text(), file.name
    assert {f.parent.name for f in (tmp_path / "site").rglob("*.html")} == {"site", "runs"}


BADGES: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (lambda: nights()["one"], "torch 2.13.0, gloo: 2 defects"),
    (lambda: nights()["two"], "torch 2.13.0, gloo: 1 unexpected failure"),
    (lambda: nights()["ours"], "shardproof on torch 2.13.0, gloo: 2 checks hold"),
    (lambda: results(holds("a"), selected=3, **TORCH), "torch 2.13.0, gloo: 2 checks did not run"),
    (
        lambda: results(known("a"), torch="2.16.0.dev20261101", **TORCH),
        "torch nightly, gloo: 1 known failure",
    ),
    (
        lambda: results(check(verdict="precondition", ranks=[]), **TORCH),
        "torch 2.13.0, gloo: nothing was judged",
    ),
    (
        lambda: results(known("a", "SP-001", level="SHOULD"), **TORCH),
        "torch 2.13.0, gloo: 1 known failure",
    ),
]


@pytest.mark.parametrize(("data", "said"), BADGES, ids=[said for _, said in BADGES])
def test_a_badge_says_the_worst(data: Callable[[], dict[str, Any]], said: str) -> None:
    drawn = ET.fromstring(badge(of_results(data())))
    assert drawn.get("aria-label") == f"shardproof: {said}"


def test_the_first_badge_is_of_torchs_newest_release(site: Path) -> None:
    assert "torch 2.15.0, gloo" in (site / "badge.svg").read_text()
    names = {file.name for file in (site / "badges").iterdir()}
    assert "torch.distributed-2.13.0-gloo-cpu.svg" in names
    assert len(names) == 3


def hangs(identity: str, *defects: str) -> dict[str, Any]:
    return known(identity, *defects) | {"ranks": [RANK | {"fate": "silent"}]}


PAIRS = {
    "defects new and gone": (
        [known("a", "SP-001"), holds("b"), known("x", "SP-003")],
        [holds("a"), known("b", "SP-002", "SP-004"), holds("y")],
    ),
    "failures without a defect": (
        [holds("a"), check(id="b"), known("c"), known("d", "SP-001")],
        [check(id="a"), holds("b"), known("c"), check(id="d")],
    ),
    "worse and better": (
        [known("a", "SP-001"), hangs("b", "SP-001")],
        [hangs("a", "SP-001"), known("b", "SP-001")],
    ),
    "another way that its defect names": (
        [known("a", "SP-033"), known("b", "SP-001")],
        [hangs("a", "SP-033"), hangs("b", "SP-001", "SP-033")],
    ),
    "another name": ([known("a", "SP-001")], [known("a", "SP-002")]),
    "not run": (
        [known("a", "SP-001"), holds("b")],
        [check(id="a", verdict="precondition"), holds("b")],
    ),
    "nothing": ([known("a", "SP-001")], [known("a", "SP-001")]),
}


@pytest.fixture(scope="module")
def browser() -> str:
    try:
        return chromium.find()
    except chromium.NoBrowserError as error:
        pytest.skip(str(error))


def test_in_a_browser_no_page_complains_keeps_people_out_or_sticks_out(
    site: Path, browser: str
) -> None:
    two, one = sorted(f.stem for f in (site / "runs").glob("*torch.distributed-2.13.0*"))[::-1]
    pages = [site / "index.html", site / "runs" / f"{two}.html", site / "diff.html"]
    addresses = [*(page.as_uri() for page in pages), f"{pages[-1].as_uri()}#{one}..{two}"]
    done = subprocess.run(
        [sys.executable, "-m", "website.in_browser", *addresses],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize(("before", "now"), PAIRS.values(), ids=PAIRS)
def test_in_a_browser_two_runs_differ_as_ci_compare_says(
    before: list[dict[str, Any]], now: list[dict[str, Any]], browser: str, tmp_path: Path
) -> None:
    one = results(*before, **TORCH)
    two = results(*now, **TORCH, start="2026-01-02T00:00:00.000+00:00")
    state = laid(tmp_path, {"one": one, "two": two})
    assert command.main([str(state), "--out", str(tmp_path / "site")]) == 0
    found: History = history([state])
    second, first = (run.slug for run in found.runs)
    address = f"{(tmp_path / 'site' / 'diff.html').as_uri()}#{first}..{second}"
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'p'}"]
    done = subprocess.run(
        [browser, *words, "--virtual-time-budget=5000", "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    page = tmp_path / "dumped.html"
    page.write_text(done.stdout)
    shown = done.stdout.partition('id="changes"')[2].partition("<noscript")[0]
    expected = changes(one, two)
    print(text_of(page))

    def section(title: str) -> str:
        match = re.search(rf"<section><h2>{title}(.*?)</section>", shown)
        return match[1] if match else ""

    for title, met in (("New", expected.appeared), ("Gone", expected.vanished)):
        assert set(re.findall(r"SP-\d{3}", section(f"{title}: "))) == set(met)
    assert set(re.findall(r"SP-\d{3}", section("Met now by"))) == set(expected.renamed)
    for title, several in (
        ("Now failing, without a defect", expected.new_failures),
        ("Now holding, without a defect", expected.mended),
        ("Worse", [c for c in expected.changed if c.worse]),
        ("Better, and still failing", [c for c in expected.changed if not c.worse]),
    ):
        listed = re.findall(r"<li>(\w+) → (\w+) +<code>(\w+)</code>", section(f"{title}: "))
        assert sorted(listed) == sorted((c.before, c.now, c.check) for c in several), title
    assert ("in another of the ways" in shown) is bool(expected.varied)
    assert f"{expected.common} check{'s' if expected.common != 1 else ''} ran in both." in text_of(
        page
    )
    assert ("Something got worse" in text_of(page)) is expected.worse
