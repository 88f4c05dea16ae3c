"""The patches stay plantable, and what is wrong with one is named."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from harness.settings.subjects import MODULES
from mutants import patches
from mutants.judge import REFERENCE, SUBJECT, CannotPlantError, copy_reference
from mutants.patches import Patch
from mutants.scope import SCOPES

_HEADER = "Fault: it is lost\nDimension: 4\nFunctions: _gather_state_dict\n\n"
_DIFF = f"""--- a/{SUBJECT}/__init__.py
+++ b/{SUBJECT}/__init__.py
@@ -1,1 +1,1 @@
-no such line
+another
"""


@pytest.mark.parametrize("path", sorted(patches.FOLDER.glob("*.patch")), ids=lambda p: p.stem)
def test_a_patch_applies_and_compiles(path: Path) -> None:
    patch = Patch.read(path)
    for file, planted in patch.planted().items():
        assert planted != (REFERENCE / file).read_text(), f"{file} is as it was"
        compile(planted, file, "exec")
    if patch.scope is SCOPES["callers"]:
        for module, _, name in (f.rpartition(".") for f in patch.functions):
            assert hasattr(importlib.import_module(f"{SUBJECT}.{module}"), name)
        return
    modules = [SUBJECT, *(f"{SUBJECT}.{module}" for module in MODULES)]
    names = {n for module in modules for n in vars(importlib.import_module(module))}
    classes = {f.partition(".")[0] for f in patch.functions if f.partition(".")[0] in names}
    assert all(f.rpartition(".")[2] in names or classes for f in patch.functions)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_HEADER, "holds no unified diff"),
        (_HEADER.replace("4", "11") + _DIFF, "a number from 1 to 10"),
        (_HEADER.replace("_gather_state_dict", "") + _DIFF, "'Functions:' with names"),
        (_DIFF, "expected 'Dimension:'"),
    ],
)
def test_a_header_that_is_wrong_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "lost.patch"
    path.write_text(text)
    with pytest.raises(CannotPlantError, match=rf"lost\.patch: .*{message}"):
        Patch.read(path)


def test_a_patch_that_does_not_apply_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lost.patch"
    path.write_text(_HEADER + _DIFF)
    copy_reference(tmp_path)
    with pytest.raises(CannotPlantError, match=r"lost: does not apply: .*patch failed"):
        Patch.read(path).plant(tmp_path)


def test_the_lines_are_those_of_today(tmp_path: Path) -> None:
    """A patch whose own numbers are of an earlier day still applies, and changes other lines."""
    path = tmp_path / "lost.patch"
    lines = (REFERENCE / "_install.py").read_text().splitlines()
    hunk = [f" {line}" for line in lines[40:47]]
    hunk[3:4] = [f"-{lines[43]}", "+lost"]
    names = _DIFF.replace("__init__", "_install").splitlines()[:2]
    path.write_text(_HEADER + "\n".join([*names, "@@ -34,7 +34,7 @@", *hunk, ""]))
    assert Patch.read(path).lines() == {"_install.py": {44}}
