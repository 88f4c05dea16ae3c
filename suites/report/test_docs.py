"""Every link of a page resolves, and every command that a page shows exists with its options."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = [*DOCS, *sorted(ROOT.glob("suites/**/*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]\[]*\]\(([^)\s]+)\)")
_COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(ci/[\w-]+)(?![\w.-])(.*)")
_TAKE_PYTEST = ("ci/conformance", "ci/integration", "ci/ecosystem", "ci/test")
"""Commands that hand what they do not know on to pytest, with the harness as its plugin."""


def _prose(text: str) -> str:
    return _FENCE.sub("", text)


@cache
def _anchors(page: Path) -> frozenset[str]:
    """The anchors of a page, as GitHub makes them of its headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.+?) *$", _prose(page.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        again = found.count(slug)
        found.append(slug)
        if again:
            found.append(f"{slug}-{again}")
    return frozenset(found)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_link_resolves(page: Path) -> None:
    broken = []
    for link in _LINK.findall(_prose(page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert not broken, f"{_name(page)}: these lead nowhere"


@pytest.mark.parametrize("page", DOCS, ids=_name)
def test_the_readme_leads_to_every_page(page: Path) -> None:
    links = {link.partition("#")[0] for link in _LINK.findall(README.read_text())}
    assert page == README or _name(page) in links


def test_the_readme_is_read_at_one_sitting() -> None:
    assert len(README.read_text().splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_file_that_is_named_exists(page: Path) -> None:
    """Paths from the root, in code; placeholders such as <subject> and NAME stand for others."""
    named = re.findall(
        r"`((?:ci|docker|docs|reference|suites)/[\w./-]+)[`:]", _prose(page.read_text())
    )
    lost = [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    assert not lost


def _commands(page: Path) -> set[str]:
    """The commands of ci/ in a page: lines of its blocks, and code in its text.

    Of a block of output only the line behind a `$ ` is one.
    """
    text = page.read_text()
    lines = [
        line for line in re.findall(r"`([^`\n]+)`", _prose(text)) if " " in line or "/" in line
    ]
    for language, block in _FENCE.findall(text):
        shown = block.replace("\\\n", " ").splitlines()
        if language == "text":
            shown = [line[2:] for line in shown if line.startswith("$ ")]
        lines += shown
    return {line for line in lines if _COMMAND.fullmatch(line)}


@cache
def _known(script: str, pytest_options: frozenset[str]) -> frozenset[str]:
    """The options of a command: those of its --help, and those of the module that it starts."""
    text = (ROOT / script).read_text()
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))
    for module in re.findall(r"-m ([a-z_.]+)|(suites/\w+/\w+)\.py", text):
        path = ROOT / "suites" / module[0].replace(".", "/") if module[0] else ROOT / module[1]
        files = [path.with_suffix(".py")] if path.with_suffix(".py").exists() else path.glob("*.py")
        for file in files:
            if not file.name.startswith("test_"):
                known |= set(re.findall(r'"(--?[a-z][a-z-]*)"', file.read_text()))
    return frozenset(known | pytest_options if script in _TAKE_PYTEST else known)


@pytest.fixture(scope="session")
def pytest_options(pytestconfig: pytest.Config) -> frozenset[str]:
    """The options of pytest and of the harness."""
    parser = pytestconfig._parser
    groups = [parser._anonymous, *parser._groups]
    return frozenset(
        name for group in groups for option in group.options for name in option.names()
    )


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_command_exists_with_its_options(page: Path, pytest_options: frozenset[str]) -> None:
    wrong = []
    for line in sorted(_commands(page)):
        for part in re.split(r" (?:&&|\|\|?|>&2) ", line):
            found = _COMMAND.fullmatch(part)
            if not found:
                continue
            script, rest = found.groups()
            if not (ROOT / script).is_file():
                wrong.append(f"{part}: no such script")
                continue
            options = {w.partition("=")[0] for w in shlex.split(rest) if re.match(r"--?[a-z]", w)}
            unknown = options - _known(script, pytest_options)
            wrong += [f"{part}: {script} has no {option}" for option in sorted(unknown)]
    assert not wrong


@pytest.mark.parametrize("page", DOCS, ids=_name)
def test_every_service_of_compose_exists(page: Path) -> None:
    services = set(
        re.findall(r"^  ([a-z][\w-]*):", (ROOT / "compose.yaml").read_text(), re.MULTILINE)
    )
    lines = re.findall(r"docker compose (?:run|build)\b(.*)", page.read_text())
    for line in lines:
        words = shlex.split(line.partition("`")[0])
        assert services & set(words), f"docker compose{line}: expected one of {sorted(services)}"


def test_the_test_itself_sees_what_is_wrong(tmp_path: Path, pytest_options: frozenset[str]) -> None:
    assert "--subjekt" not in _known("ci/conformance", pytest_options)
    assert {"--subject", "--jobs", "--laws", "-k", "--lf"} <= _known(
        "ci/conformance", pytest_options
    )
    assert "--planted" in _known("ci/fuzz", pytest_options)
    page = tmp_path / "page.md"
    page.write_text("# The `way` of a_b\n```text\n$ ci/test -x\nci/not a command\n```\n`ci/lint`\n")
    assert _anchors(page) == {"the-way-of-a_b"}
    assert _commands(page) == {"ci/test -x", "ci/lint"}
