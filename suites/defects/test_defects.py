"""The catalogue is strict, every defect is met, and severities agree with how checks fail."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from defects import __main__ as command
from defects import catalogue, reproduce, seen
from defects.listing import chosen, in_full
from defects.page import PAGE, page
from defects.reproduce import reproduced
from defects.summary import lines
from defects.words import FOR_A_CHOICE, IN_WORDS, SEVERITIES
from report.laws import LAWS

EXPECTATIONS = Path(__file__).parents[1] / "expectations"
DEFECTS = catalogue.read()
SEEN: dict[str, Any] = seen.kept()["defects"]
GOOD = (catalogue.FOLDER / "SP-001.toml").read_text()


def entries(name: str) -> list[dict[str, Any]]:
    return tomllib.loads((EXPECTATIONS / name).read_text())["expect"]


def named(entry: dict[str, Any]) -> list[str]:
    ids = entry.get("defect", [])
    return [ids] if isinstance(ids, str) else ids


@pytest.fixture
def one(tmp_path: Path) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        (tmp_path / "SP-001.toml").write_text(text)
        return catalogue.read(tmp_path)

    return read


BAD = [
    ('colour = "red"\n' + GOOD, "colour: there is no such field"),
    (GOOD.replace("severity = [", "severities = ["), "severities: there is no such field"),
    (GOOD.replace('severity = ["loses", "refuses"]\n', ""), "severity: missing or empty"),
    (GOOD.replace('["loses", "refuses"]', "[]"), "severity: missing or empty"),
    (GOOD.replace('["loses", "refuses"]', '["refuses", "loses"]'), "is not worst first"),
    (GOOD.replace('["loses", "refuses"]', '["loses", "loses"]'), "severity: the same twice"),
    (GOOD.replace('["loses", "refuses"]', '["bad"]'), "severity: 'bad', expected one of corrupts"),
    (GOOD.replace('"tp-ddp"', '"ddp"'), "roads: 'ddp', expected one of tp-ddp"),
    (GOOD.replace('"the set"', '"us"'), "owner: 'us', expected one of the set"),
    (GOOD.replace('["install"]', '["later"]'), "mended_by: 'later', expected as 'torch >=2.14'"),
    (GOOD.replace('"SP-001"', '"SP-002"'), "id: 'SP-002', expected 'SP-001'"),
    (GOOD.replace("github.com", "example.org"), "upstream: "),
    (GOOD + "\n[", "SP-001.toml: "),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_wrong_file_names_the_file_and_the_field(
    one: Callable[[str], Any], text: str, message: str
) -> None:
    assert one(GOOD)["SP-001"].worst == "loses"
    with pytest.raises(catalogue.BadDefectError, match=r"SP-001\.toml: ") as told:
        one(text)
    assert message in str(told.value)


@pytest.mark.parametrize("main", [command.main, reproduce.main])
def test_a_command_names_the_wrong_file_in_a_line(
    main: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "SP-001.toml").write_text("title = 'a wrong one'\n")
    monkeypatch.setattr(catalogue, "read", partial(catalogue.read, tmp_path))
    monkeypatch.setattr("sys.argv", ["a command", "SP-001"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "SP-001.toml: id: missing" in capsys.readouterr().err


def test_ids_have_no_gap() -> None:
    assert list(DEFECTS) == [f"SP-{n:03}" for n in range(1, len(DEFECTS) + 1)]


@pytest.mark.parametrize("name", ["torch.distributed.toml", "callers.toml"])
def test_every_expected_failure_of_torch_leads_to_a_defect(name: str) -> None:
    without = [entry["check"] for entry in entries(name) if not named(entry)]
    assert not without, f"{name}: give these entries a defect: {without}"


def test_every_defect_is_met_by_a_check() -> None:
    files = {name: entries(name) for name in ("torch.distributed.toml", "callers.toml")}
    met = {i for found in files.values() for entry in found for i in named(entry)}
    assert sorted(set(DEFECTS) - met) == []
    callers = {i for entry in files["callers.toml"] for i in named(entry)}
    assert callers == {d.id for d in DEFECTS.values() if d.owner == "torch's callers"}


def test_a_defect_of_torchs_callers_is_not_mended_by_install() -> None:
    for defect in DEFECTS.values():
        if defect.owner == "torch's callers":
            assert "install" not in defect.mended_by, defect.id


def test_install_with_callers_mends_defects_of_torchs_callers_alone() -> None:
    for defect in DEFECTS.values():
        if "install(callers=True)" in defect.mended_by:
            assert defect.owner == "torch's callers", defect.id


def test_a_version_that_mends_a_defect_lacks_it() -> None:
    for defect in DEFECTS.values():
        for mender in defect.mended_by:
            if mender.startswith("torch"):
                version = mender.partition(">=")[2].strip()
                assert not defect.is_in(version), f"{defect.id}: {mender}, affects {defect.affects}"


@pytest.mark.parametrize("identity", sorted(SEEN))
def test_a_severity_agrees_with_how_checks_fail(identity: str) -> None:
    """Only checks that this defect alone makes fail can tell.

    A check that meets a defect of torch's callers may fail by one of the set before.
    """
    if DEFECTS[identity].owner != "the set":
        return
    words, one = set(DEFECTS[identity].severity), SEEN[identity]
    alone = one["alone"]
    total = sum(alone.values())
    refused = alone.get("raises", 0) + alone.get("bad words", 0)
    differs = alone.get("wrong", 0) + alone.get("costs", 0)
    if one["should"] == one["checks"]:
        assert DEFECTS[identity].worst in FOR_A_CHOICE
    if "hangs" in alone:
        assert "hangs" in words, alone
    if "crashes" in alone:
        assert "crashes" in words, alone
    if "costs" in alone:
        assert "slow" in words, alone
    if total and 2 * refused >= total:
        assert words & {"refuses", "hangs", "crashes"}, alone
    if total and not differs:
        assert not words & {"corrupts", "loses", "leaks"}, alone


def test_a_defect_breaks_what_its_checks_judge() -> None:
    for identity, one in SEEN.items():
        defect = DEFECTS[identity]
        if defect.owner == "the set":
            assert set(one["functions"]) <= set(defect.functions), identity
        assert set(one["laws"]) <= set(defect.laws) <= set(LAWS), identity


def test_every_severity_has_a_phrase() -> None:
    assert list(IN_WORDS) == list(SEVERITIES)


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(DEFECTS, seen.kept(), reproduced()), (
        "ci/defects --write writes it"
    )


def test_a_defect_of_one_build_is_in_no_other() -> None:
    assert DEFECTS["SP-045"].is_in("2.15.0+cpu")
    assert DEFECTS["SP-045"].is_in("2.15.0")
    assert not DEFECTS["SP-045"].is_in("2.15.0+cu132")


def test_defects_are_chosen_by_every_filter() -> None:
    found = chosen(
        DEFECTS.values(),
        severity="loses",
        road="tp-ddp",
        function="_update_module_param",
        torch="2.13.0+cpu",
    )
    assert "SP-001" in [d.id for d in found]
    assert all(d.is_in("2.11") for d in chosen(DEFECTS.values(), torch="2.11"))
    assert not chosen(DEFECTS.values(), function="no_such_function")


def test_a_defect_is_told_in_full() -> None:
    for defect in DEFECTS.values():
        text = "\n".join(in_full(defect, 3))
        assert defect.id in text
        assert len(defect.title) <= 100
        assert all(url in text for url in defect.upstream)
        assert max(map(len, text.splitlines())) <= 140


def check(*ids: str, level: str = "MUST", verdict: str = "xfail") -> dict[str, Any]:
    return {"verdict": verdict, "level": level, "expected": {"defects": list(ids)}}


def test_a_run_ends_with_a_sentence_and_a_line_for_each() -> None:
    run = {"subject": "torch.distributed", "torch": "2.13.0+cpu", "backend": "gloo"}
    of = {word: next(i for i, d in DEFECTS.items() if d.worst == word) for word in SEVERITIES}
    checks = [
        check(of["refuses"]),
        check(of["corrupts"]),
        check(of["corrupts"], of["loses"]),
        check(of["slow"], level="SHOULD"),
        check(of["hangs"], verdict="pass"),
    ]
    first, *rest = lines({"run": run, "checks": checks})
    assert first == (
        "torch 2.13.0 on Gloo breaks the contract in 3 ways: 1 corrupts data silently, "
        "1 loses data silently, 1 refuses what is legal"
    )
    assert [line.split()[1] for line in rest] == [
        *(of[w] for w in ("corrupts", "loses", "refuses")),
        "1",
        of["slow"],
    ]
    assert "2 checks" in rest[0]
    assert not list(lines({"run": run, "checks": []}))
