"""docs/contract.md, the marks of the checks and the columns of the report name the same things."""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import subprocess
from pathlib import Path

import pytest

from harness.settings.subjects import MODULES
from report.laws import LAWS
from report.terminal import Screen, show

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "contract.md").read_text()
CONFORMANCE = ROOT / "suites" / "conformance"
_FUNCTION = re.compile(rf'"((?:{"|".join(map(re.escape, MODULES))})\.[A-Za-z_]\w*)"')


def _sections(level: int) -> dict[str, str]:
    """Heading -> the text below it, up to the next heading of any level."""
    parts = re.split(r"^(#+) (.+)$", PAGE, flags=re.MULTILINE)
    threes = zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
    return {heading: text for marks, heading, text in threes if len(marks) == level}


def _functions_of_the_page() -> set[str]:
    """module.function, by the headings of both."""
    found = set()
    module = ""
    for marks, heading in re.findall(r"^(##+) (.+)$", PAGE, flags=re.MULTILINE):
        names = re.findall(r"`([\w.]+)`", heading)
        if marks == "##":
            module = names[0] if names else ""
        else:
            found |= {f"{module}.{name}" for name in names}
    return found


@pytest.fixture(scope="module")
def checks() -> str:
    """The source of all checks, and of what they share."""
    return "\n".join(path.read_text() for path in sorted(CONFORMANCE.rglob("*.py")))


def test_the_page_states_each_law_by_its_sentence() -> None:
    stated = {
        heading: " ".join(text.split("\n\n")[1].split() if "\n\n" in text else text.split())
        for heading, text in _sections(3).items()
        if "`" not in heading
    }
    assert list(stated) == list(LAWS), "docs/contract.md: the laws differ from report/laws.py"
    assert stated == LAWS


def test_the_checks_name_the_laws_and_no_others(checks: str) -> None:
    assert set(re.findall(r'mark\.law\("([^"]*)"\)', checks)) == set(LAWS)


def test_each_law_is_a_column_of_the_report() -> None:
    checks = [
        {"id": law, "module": "m", "function": "f", "law": law, "verdict": "pass"} for law in LAWS
    ]
    run = {"counts": {"pass": len(checks)}, "selected": len(checks), "device": "cpu"}
    run |= dict.fromkeys(("subject", "subject_version", "torch", "backend"), "")
    for width, shown in ((140, list(LAWS)), (80, [law[:3] for law in LAWS])):
        said = io.StringIO()
        show({"run": run, "checks": checks}, "out", Screen(said, colour=False, width=width))
        (heads,) = (line for line in said.getvalue().splitlines() if line.startswith("m "))
        assert heads.split()[1:] == shown
    assert len(set(shown)) == len(LAWS), "the first letters of two laws are alike"
    assert all(f"{law[:3]} {law}" in " ".join(said.getvalue().split()) for law in LAWS)


def test_the_command_prints_the_laws() -> None:
    said = subprocess.run(
        ["ci/conformance", "--laws"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert " ".join(said.split()) == " ".join(f"{law} {text}" for law, text in LAWS.items())


def test_the_page_has_every_function_that_is_judged(checks: str) -> None:
    """Marks name functions by constants, too, so each name in the checks counts."""
    judged, stated = set(_FUNCTION.findall(checks)), _functions_of_the_page()
    assert not judged - stated, "docs/contract.md has no clause of these"
    assert not stated - judged, "docs/contract.md has functions that no check judges"


@pytest.mark.parametrize("module", MODULES)
def test_the_page_has_every_function_of_upstream(module: str) -> None:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent / "distributed" / (module.replace(".", "/") + ".py")
    own = {
        f"{module}.{node.name}"
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert not own - _functions_of_the_page(), "docs/contract.md has no clause of these"
