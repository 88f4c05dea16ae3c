"""The catalog stays plantable, so that ci/mutants judges what it says it judges."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mutants import patches, run
from mutants.catalog import MUTANTS, Mutant
from mutants.judge import ROOT, CannotPlantError, copy_reference


def test_names_are_unique() -> None:
    names = [m.name for m in MUTANTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_fault_can_be_planted_and_still_compiles(mutant: Mutant, tmp_path: Path) -> None:
    original = ROOT / "reference" / "shardproof" / mutant.file
    planted = tmp_path / "shardproof" / mutant.file
    planted.parent.mkdir(parents=True)
    shutil.copy(original, planted)
    mutant.plant(tmp_path)
    assert planted.read_text() != original.read_text()
    compile(planted.read_text(), str(planted), "exec")
    for path in mutant.checks:
        assert (ROOT / "suites" / "conformance" / path).exists(), f"{path}: no such checks"


def test_a_text_that_is_not_there_is_named(tmp_path: Path) -> None:
    lost = Mutant("lost", "", "__init__.py", "no such text", "", ())
    copy_reference(tmp_path)
    with pytest.raises(CannotPlantError, match="lost: its text stands 0 times"):
        lost.plant(tmp_path)


def test_what_is_kept_is_of_faults_that_exist() -> None:
    names = {m.name for m in MUTANTS} | {p.stem for p in patches.FOLDER.glob("*.patch")}
    assert run.caught_before().keys() <= names


@pytest.mark.parametrize(
    ("text", "told"), [("{", "JSON"), ("[]", "object"), ('{"a": 1}', "object")]
)
def test_what_is_kept_is_told_where_it_is_wrong(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "caught.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"caught\.json: expected .*{told}"):
        run.caught_before(path)
