"""Each answer for a survivor is one of a mutant of today, and says something."""

from __future__ import annotations

from pathlib import Path

import pytest

from mutants import answers
from mutants.answers import BadAnswerError, entry_for
from mutants.operators import Automatic, all_mutants

_MUTANT = Automatic("some.py", "f", "constant", 'g("a\\n", 1)', "g('b', 2)", 1)
_CHECK = "test_warnings.py::TestWarnings::test_the_import_warns_of_nothing"


def test_each_answer_is_of_a_mutant_of_today_and_says_something() -> None:
    answers.read(all_mutants())


@pytest.mark.parametrize("more", [{"equivalent": "why"}, {"check": _CHECK}])
def test_an_entry_that_is_written_can_be_read(more: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "survivors.toml"
    path.write_text(entry_for(_MUTANT, **more))
    assert vars(answers.read([_MUTANT], path)[_MUTANT]).items() >= more.items()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (entry_for(_MUTANT, equivalent=""), "expected either a reason"),
        (entry_for(_MUTANT, equivalent="why", check=_CHECK), "expected either a reason"),
        (entry_for(_MUTANT, equivalent="why") * 2, "stands twice"),
        (entry_for(_MUTANT, check="test_warnings.py::test_lost"), "there is no check"),
        (entry_for(_MUTANT, equivalent="why", reason="b"), "unknown: reason"),
        (entry_for(_MUTANT, equivalent="why").replace("old =", "older ="), "a text for old"),
        (entry_for(Automatic("some.py", "g", "constant", "1", "2"), equivalent="why"), "no such"),
    ],
)
def test_an_entry_that_does_not_hold_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "survivors.toml"
    path.write_text(text)
    with pytest.raises(BadAnswerError, match=message):
        answers.read([_MUTANT], path)
