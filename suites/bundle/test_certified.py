"""`--certified`: what it refuses before it starts, and when there is no certificate at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bundle.small_repository import Repository, repository
from harness.session import certified, results

CONFORMANCE = ["-o", "testpaths=suites/conformance"]
NARROWED = [
    (["-k", "gather"], "-k"),
    (["-m", "not thorough"], "-m"),
    (["-x"], "-x"),
    (["--maxfail=1"], "--maxfail=1"),
    (["--deselect", "a"], "--deselect"),
    (["--ignore=suites/conformance/test_ties.py"], "--ignore"),
    (["--lf"], "--lf"),
    (["suites/conformance/state_dict_utils"], "suites/conformance/state_dict_utils"),
    (["a.py::test_it"], "a.py::test_it"),
    (["--expectations=mine"], "--expectations"),
    (["--update-expectations"], "--update-expectations"),
    (["--world-size", "2"], "--world-size"),
    (["--check-limit", "900"], "--check-limit"),
    (["-o", "testpaths=suites/report"], "-o testpaths=suites/report"),
    (["-o", "addopts=-k x"], "-o addopts=-k x"),
    (["-p", "mine"], "-p mine"),
    (["-c", "mine.ini"], "-c"),
    (["--rootdir=/tmp"], "--rootdir"),
    (["--collect-only"], "--collect-only"),
    (["--pdb"], "--pdb"),
]


@pytest.mark.parametrize(("arguments", "named"), NARROWED, ids=[n for _, n in NARROWED])
def test_what_would_leave_something_out_is_refused_by_name(
    arguments: list[str], named: str
) -> None:
    with pytest.raises(pytest.UsageError) as caught:
        certified.refuse_what_narrows(["--certified", "--subject=x", *CONFORMANCE, *arguments])
    assert str(caught.value).startswith(f"--certified: {named}")


@pytest.mark.parametrize("name", ["PYTEST_ADDOPTS", "PYTEST_PLUGINS"])
def test_what_the_environment_adds_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "-k x")
    with pytest.raises(pytest.UsageError, match=name):
        certified.refuse_what_narrows(["--certified"])


def test_what_changes_no_verdict_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    usual = ["--tb=no", "-rN", "-q", "--run-dir=out/x", "--subject", "a", "--backend", "nccl"]
    more = ["--device=cuda", "--jobs", "2", "--order", "reverse", "--seed=random", "--share-gpus"]
    certified.refuse_what_narrows(["--certified", "--thorough", *CONFORMANCE, *usual, *more])


def check(identity: str, verdict: str, level: str = "MUST", message: str = "") -> dict[str, Any]:
    return {"id": identity, "verdict": verdict, "level": level, "message": message}


CERTIFICATES = [
    ([check("a", "pass"), check("b", "fail", "SHOULD")], 1, "", []),
    ([check("a", "pass"), check("b", "fail")], 1, "", ["1 checks of a MUST do not hold"]),
    ([check("a", "pass")], 0, "", ["1 checks were not judged, as b"]),
    (
        [check("a", "pass"), check("b", "precondition", message="needs 2 GPUs")],
        0,
        "",
        ["1 checks were not judged: needs 2 GPUs"],
    ),
    (
        [check("a", "pass"), check("b", "error", "SHOULD")],
        3,
        "",
        ["the environment or the harness failed"],
    ),
    ([check("a", "pass"), check("b", "pass")], 0, "x is not as in the commit", ["x is not"]),
]


@pytest.mark.parametrize(("checks", "code", "changed", "refused"), CERTIFICATES)
def test_why_there_is_no_certificate(
    checks: list[dict[str, Any]], code: int, changed: str, refused: list[str]
) -> None:
    found = certified.certificate(checks, ["a", "b"], code, changed)
    assert found["granted"] is (not refused)
    assert len(found["refused"]) == len(refused)
    assert all(said.startswith(why) for said, why in zip(found["refused"], refused, strict=True))
    assert certified.in_words(found).startswith("no certificate" if refused else "certificate")


@pytest.mark.thorough
def test_a_must_that_does_not_hold_ends_with_1(tmp_path: Path) -> None:
    one = "import pytest\n@pytest.mark.world(1)\ndef test_it(): assert 1 == 2\n"
    # An entry that would excuse it, and a variant that a usual run leaves out.
    small = repository(tmp_path, one)
    entry = 'check = "suites/conformance/test_small.py::test_it[w1]"\nreason = "known"\n'
    small.write("suites/expectations/torch.distributed.toml", f"[[expect]]\n{entry}")
    small.commit()
    code, said, folder = small.run("--certified")
    assert code == 1
    assert "no certificate: 1 checks of a MUST do not hold" in said
    data = json.loads((folder / "results.json").read_text())
    assert data["run"]["certificate"]["granted"] is False
    assert data["run"]["counts"]["fail"] == 1
    assert "--certified" in data["run"]["command"].split()
    usual, _, folder = small.run(name="usual")
    assert usual == 0, "known, without --certified"
    assert "certificate" not in json.loads((folder / "results.json").read_text())["run"]


@pytest.mark.parametrize("name", ["suites/conformance/test_small.py", "suites/conformance/new.py"])
@pytest.mark.thorough(but=["suites/conformance/test_small.py"])
def test_a_tree_with_changes_is_refused(name: str, tmp_path: Path) -> None:
    small = repository(tmp_path)
    small.write(name, "def test_it(): pass\n")
    code, said, folder = small.run("--certified")
    assert code == 2
    assert f"--certified: {name} is not as in the commit" in said
    assert not folder.exists()


def test_another_commit_than_the_checkouts_is_refused(tmp_path: Path) -> None:
    root = repository(tmp_path).root
    head = results.commit_of(root)
    assert certified.changes(root, head) == ""
    assert certified.changes(root, "a" * 40) == (
        f"the commit is said to be {'a' * 40}, and this checkout is of {head}"
    )


def test_no_commit_is_refused(tmp_path: Path) -> None:
    small = Repository(tmp_path)
    small.write("pytest.ini", "[pytest]\naddopts = -p harness.session.plugin\n")
    small.write("suites/conformance/test_small.py", "def test_it(): pass\n")
    code, said, _ = small.run("--certified")
    assert code == 2
    assert "the commit of the suites is not known: expected a clean checkout" in said
