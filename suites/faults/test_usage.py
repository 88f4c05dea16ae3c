"""Wrong usage: a clear line that names the value and what was expected, exit 2, nothing started."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.launcher import SUITES
from faults.sessions import Session
from harness.__main__ import joined
from report.read import read
from report.terminal import Screen, show

Suite = Callable[..., Path]
ONE = "import pytest\n@pytest.mark.world(2)\ndef test_it(rank): pass\n"

WRONG = [
    (["--subject", "no.such.fork"], "--subject no.such.fork: cannot be imported"),
    (["--subject", "torch"], "--subject torch: has none of the modules _state_dict_utils, "),
    (["--subject", "not a name"], "--subject 'not a name' is not an import root"),
    (["--subject", "./my-fork"], "--subject ./my-fork: expected an import root, not a path"),
    (["--subject", "/tmp"], "--subject /tmp: expected an import root, not a path: a dotted name"),
    (["--subject", "fork.py"], "--subject fork.py: expected an import root, not a path"),
    (["--backend", "nccl"], "--backend nccl: this torch build lacks it; it has "),
    (["--backend", "smoke"], "--backend smoke: this torch build lacks it; it has "),
    (["--device", "cuda"], "--device cuda: torch "),
    (["--device", "toaster"], "--device 'toaster' is not a device type that torch knows"),
    (["--world-size", "0"], "--world-size 0: expected a number from 1 up"),
    (["--share-gpus"], "--share-gpus: expected --backend nccl; over gloo ranks share devices"),
    (["--order", "sideways"], "--order 'sideways': expected normal, reverse or random:SEED"),
    (["--install-at", "twice"], "--install-at twice: torch.distributed is in place already"),
    (
        ["--subject", "shardproof", "--install-at", "before", "--start-method", "spawn"],
        "--install-at before: a rank that starts as a new interpreter has imported torch's modules",
    ),
    (["--callers"], "--callers: torch.distributed is in place already"),
    (["--seed", "x"], "--seed 'x': expected a number or 'random'"),
    (["--collective-limit", "9", "--check-limit", "5"], "the clocks must be positive and grow"),
    (["-k", "nothing_like_this"], "no check was selected"),
    (["no_such_file.py"], "file or directory not found: no_such_file.py"),
    (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    (["--no-such-option", "-q"], "ci/conformance --help lists the options"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
@pytest.mark.thorough(
    but=["--subject no.such.fork", "--backend smoke", "--callers", "--seed x", "no_such_file.py"]
)
def test_a_wrong_argument_is_named_at_once(
    suite: Suite, arguments: list[str], message: str
) -> None:
    if "nccl" in arguments:
        dist = pytest.importorskip("torch.distributed")
        if dist.is_nccl_available():
            arguments, message = [*arguments, "--world-size", "99"], "--world-size 99: NCCL needs"
    outcome = Session(suite(ONE), *arguments).finish()
    assert message in outcome.output
    assert outcome.exit == 2
    assert "Traceback" not in outcome.output
    assert not (outcome.run_dir / "results.json").exists()


MARKS = [
    ("world(0)", "sizes are whole numbers from 1 up"),
    ("world(2, colective=3)", "world() has no colective; it takes backend, collective"),
    ("world(2, collective=50)", "the clocks must grow: collective 50 s < check 30.0 s"),
]


@pytest.mark.parametrize(("mark", "message"), MARKS, ids=[m for m, _ in MARKS])
def test_a_wrong_mark_is_named_at_once(suite: Suite, mark: str, message: str) -> None:
    source = f"import pytest\n@pytest.mark.{mark}\ndef test_it(rank): pass\n"
    outcome = Session(suite(source)).finish()
    assert message in outcome.output
    assert "test_it" in outcome.output
    assert outcome.exit in {2, 3}


@pytest.mark.parametrize("mark", ["skip(reason='x')", "xfail(reason='x')"])
def test_a_check_takes_no_mark_that_hides_it(suite: Suite, mark: str) -> None:
    source = ONE.replace("@pytest.mark.world", f"@pytest.mark.{mark}\n@pytest.mark.world")
    outcome = Session(suite(source)).finish()
    assert f"a check takes no {mark.partition('(')[0]} mark" in outcome.output
    assert outcome.exit == 2


def test_a_plain_test_without_what_it_needs_is_one_precondition(suite: Suite) -> None:
    source = (
        "import pytest\n@pytest.mark.needs('accelerator')\ndef test_it(): assert False\n"
        "def test_other(): pass\n"
    )
    outcome = Session(suite(source), env={"CUDA_VISIBLE_DEVICES": ""}).finish()
    assert [c["verdict"] for c in outcome.results["checks"]] == ["precondition", "pass"]
    assert outcome.results["run"]["selected"] == 2
    assert outcome.exit == 0


@pytest.mark.thorough
def test_a_package_that_is_not_installed_is_a_precondition(suite: Suite) -> None:
    source = "import pytest\n@pytest.mark.needs('package {}')\ndef test_it(): pass\n"
    missing = Session(suite(source.format("no-such-package"))).finish()
    (check,) = missing.results["checks"]
    assert check["verdict"] == "precondition"
    assert "the package no-such-package, which this environment lacks" in check["message"]
    installed = Session(suite(source.format("pytest"))).finish()
    assert list(installed.verdicts().values()) == ["pass"]


def test_a_smaller_world_leaves_larger_checks_as_preconditions(suite: Suite) -> None:
    source = (
        "import pytest\n@pytest.mark.world(2, 3)\ndef test_it(rank): pass\n"
        "@pytest.mark.world()\ndef test_any(world): assert world.size == 2\n"
    )
    outcome = Session(suite(source), "--world-size", "2").finish()
    assert sorted(outcome.verdicts().values()) == ["pass", "pass", "precondition"]
    assert "precondition, 1 not run: needs a world of 3; --world-size is 2" in outcome.output
    assert outcome.exit == 0


@pytest.mark.parametrize(("count", "said"), [(9, True), (8, False)])
def test_a_run_that_judges_nearly_nothing_says_so(suite: Suite, count: int, said: bool) -> None:
    source = (
        "import pytest\n"
        "@pytest.mark.world(3)\n"
        f"@pytest.mark.parametrize('n', range({count}))\n"
        "def test_large(n): pass\n"
        "@pytest.mark.world(1)\ndef test_small(): pass\n"
    )
    outcome = Session(suite(source), "--world-size", "2").finish()
    line = f"nearly nothing was judged: {count} of {count + 1} checks are preconditions"
    assert (line in outcome.output) is said
    report = io.StringIO()
    show(outcome.results, "out/run", Screen(report, colour=False))
    assert (line in report.getvalue()) is said
    assert outcome.exit == 0


def test_a_path_that_exists_is_no_place_to_look_for_the_configuration(suite: Suite) -> None:
    """As pytest would take it, where it stands after an option that it does not know yet."""
    given = ["--subject", "/tmp", "-k", "x", "--run-dir", "out/x", "--order=normal", "a.py"]
    assert joined(given) == ["--subject=/tmp", "-k", "x", "--run-dir=out/x", *given[6:]]


@pytest.mark.parametrize("command", [["ci/conformance", "--help"], ["ci/conformance", "-h"]])
def test_the_help_names_the_folder_of_known_failures(command: list[str]) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "--expectations DIR" in done.stdout


LEVELS = """
import pytest
pytestmark = pytest.mark.world(1)
def test_a_must(): pass
@pytest.mark.should("it costs time")
def test_a_should(): pass
@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.should("it is rare"))])
def test_some(n): pass
"""


def test_the_level_of_a_check_stands_in_the_results(suite: Suite) -> None:
    checks = Session(suite(LEVELS)).finish().results["checks"]
    assert [(c["level"], c["level_reason"]) for c in checks] == [
        ("MUST", ""),
        ("SHOULD", "it costs time"),
        ("MUST", ""),
        ("SHOULD", "it is rare"),
    ]


@pytest.mark.parametrize("mark", ["should", "should()", "should(' ')", "should(reason='x')"])
@pytest.mark.thorough(but=["should()"])
def test_a_should_gives_its_reason(suite: Suite, mark: str) -> None:
    outcome = Session(suite(f"import pytest\n@pytest.mark.{mark}\ndef test_it(): pass\n")).finish()
    assert "test_it: should() needs its reason, one sentence" in outcome.output
    assert outcome.exit in {2, 3}


@pytest.mark.thorough
def test_thorough_checks_run_when_they_are_asked_for(suite: Suite) -> None:
    more = "@pytest.mark.thorough\n@pytest.mark.world(1)\ndef test_more(rank): pass\n"
    folder = suite(ONE + more)
    usual = Session(folder).finish()
    assert usual.exit == 0
    assert "left out, marked thorough: 1 (--thorough runs them)" in usual.output
    assert usual.results["run"]["left_out"] == 1
    assert len(usual.results["checks"]) == 1
    for arguments in (["--thorough"], [f"{next(folder.glob('test_*.py')).name}::test_more"]):
        outcome = Session(folder, *arguments).finish()
        assert outcome.check("test_more")["verdict"] == "pass"
        assert outcome.results["run"]["left_out"] == 0
    asked = Session(folder, "--thorough", "-k", "not more").finish()
    assert asked.results["run"]["left_out"] == 0
    assert "left out" not in asked.output


@pytest.mark.thorough
def test_usual_variants_of_a_thorough_check_run_each_time(suite: Suite) -> None:
    text = (
        "import pytest\n"
        "@pytest.mark.world(1)\n"
        "@pytest.mark.parametrize('n', [1, 2, 12])\n"
        "@pytest.mark.thorough(but=[{}])\n"
        "def test_it(rank, n): pass\n"
    )
    outcome = Session(suite(text.format("'2'"))).finish()
    assert [c["id"].rpartition("::")[2] for c in outcome.results["checks"]] == ["test_it[w1-2]"]
    assert outcome.results["run"]["left_out"] == 2
    typo = Session(suite(text.format("'2', '3'"))).finish()
    assert "test_it: thorough(but='3') is no variant of it" in typo.output
    assert typo.exit == 2


@pytest.mark.thorough
def test_a_reader_that_goes_ends_the_run_without_a_traceback(suite: Suite) -> None:
    folder = suite(
        "import pytest, time\n"
        "@pytest.mark.world(1)\n"
        "@pytest.mark.parametrize('n', range(50))\n"
        "def test_it(n): time.sleep(0.2)\n"
    )
    words = ["-p", "harness.session.plugin", "-v", "--no-warm-up", "--run-dir", str(folder / "out")]
    with subprocess.Popen(
        [sys.executable, "-m", "harness", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(SUITES)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while "PASS" not in process.stdout.readline():
            pass
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 3
    ran = read(folder / "out")
    assert 0 < len(ran["checks"]) < 50
    assert ran["run"]["exit"] == 3


def test_setup_removes_no_folder_that_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    done = subprocess.run(
        [SUITES.parent / "ci" / "setup"],
        env=os.environ | {"SHARDPROOF_VENV": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert f"SHARDPROOF_VENV={tmp_path} is a folder that ci/setup did not make" in done.stderr
    assert (tmp_path / "precious").read_text() == "mine"
