"""A subject's warnings: noted, judged by checks of their own, the cause of no other's failure."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from conformance.test_warnings import NAMES
from faults.launcher import SUITES
from faults.sessions import Outcome, Session

Suite = Callable[..., Path]
FORKS = f"{SUITES}:{Path(__file__).parent / 'forks'}"
CHECKS = (
    "state_dict_utils/test_flatten_state_dict.py::TestFlattenStateDict",
    "tensor_parallel/test_get_box.py::TestGetBoxFor",
    "test_warnings.py",
)


@pytest.fixture(scope="session")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run of some checks on a subject that warns in each call, in every way that there is."""
    return Session(
        tmp_path_factory.mktemp("loud"),
        *("--subject", "loud", "--order", "random:3"),
        *(str(SUITES / "conformance" / name) for name in CHECKS),
        env={"PYTHONPATH": FORKS},
        warm=True,
    ).finish(timeout=600)  # many checks, under load


def of_warnings(identity: str) -> bool:
    return "::TestWarnings::" in identity


@pytest.mark.thorough
def test_no_other_check_fails(loud: Outcome) -> None:
    others = {i: v for i, v in loud.verdicts().items() if not of_warnings(i)}
    assert len(others) > 20
    assert set(others.values()) == {"pass"}, [i for i, v in others.items() if v != "pass"]


@pytest.mark.thorough
def test_its_own_check_fails_and_says_of_what(loud: Outcome) -> None:
    own = {i.partition("[")[2]: v for i, v in loud.verdicts().items() if of_warnings(i)}
    for name in ("_state_dict_utils._flatten_state_dict", "tensor.parallel.fsdp._get_box_for"):
        assert own[f"{name}]"] == "fail"
    assert own["tensor.parallel.ddp._localize_dtensor]"] == "precondition"
    check = loud.check(r"test_calls_warn_of_nothing\[_state_dict_utils._flatten_state_dict\]")
    assert re.match(r"warnings in \d+ of \d+ checks, the first: \w+: ", check["message"])
    assert check["level"] == "SHOULD"
    first, last = re.findall(r"::Test\w+", check["command"])
    assert first.startswith("::TestFlatten"), check["command"]
    assert last == "::TestWarnings", check["command"]
    assert "the subject warned in " in loud.output


@pytest.mark.thorough
def test_an_import_is_judged_by_itself(loud: Outcome) -> None:
    check = loud.check("test_the_import_warns_of_nothing")
    assert check["verdict"] == "fail"
    assert "DeprecationWarning: loud will go" in check["message"]


WAYS = [
    "DeprecationWarning: will go",
    "FutureWarning: will change",
    "FutureWarning: despite filters",
    "UserWarning: from a thread",
    "UserWarning: TypedStorage is deprecated",
    "LoudWarning: took a detour",
]


@pytest.mark.thorough
def test_every_way_to_warn_is_heard(suite: Suite) -> None:
    """From torch below it, a thread, under filters of its own, at another stack level."""
    source = (
        "import pytest\n"
        "from shardproof.tensor.parallel import fsdp\n"
        "NAMES = [n for n, f in vars(fsdp).items() if type(f) is type(lambda: 0)]\n"
        "@pytest.mark.world(2)\n"
        "@pytest.mark.parametrize('name', NAMES)\n"
        "def test_it(subject, name):\n"
        "    with pytest.raises(TypeError):\n"
        "        subject.function(f'tensor.parallel.fsdp.{name}')()\n"
    )
    outcome = Session(suite(source), "--subject", "loud", env={"PYTHONPATH": FORKS}).finish()
    heard = {w for check in outcome.results["checks"] for w in check["warnings"]}
    assert set(outcome.verdicts().values()) == {"pass"}, outcome.output
    for way in WAYS:
        assert any(w.startswith(way) for w in heard), f"{way}: {heard}"


OURS = """
import warnings, pytest
pytestmark = pytest.mark.world(2)
def test_a_check_warns(): warnings.warn("mine")
@pytest.mark.judges("_state_dict_utils._traverse_state_dict")
def test_what_it_hands_to_the_subject_warns(judged):
    judged({"a": 1}, lambda path, value: warnings.warn("mine"))
@pytest.mark.filterwarnings("ignore:mine")
def test_ignored(): warnings.warn("mine")
def test_a_library_warns(subject):
    import torch
    torch.tensor([1]).storage()
def test_the_compiler_warns(subject):
    import torch
    scope = {"__name__": "torch._dynamo.backends", "warn": warnings.warn}
    code = "def backend(graph, _): warn('of the compiler'); return graph"
    exec(compile(code, "<compiler>", "exec"), scope)
    assert torch.compile(lambda x: x + 1, backend=scope["backend"])(torch.ones(1)) == 2
def of(name, code):
    scope = {"__name__": name, "warn": warnings.warn}
    exec(compile(code, f"<{name}>", "exec"), scope)
    return scope["f"]
COMPILED = of("torch._dynamo.eval_frame", "def f(call): call()")
READ = of("torch._dynamo.convert_frame", "def f(): warn('of the compiler')")
SUBJECT = of("loud.it", "def f(call): call()")
def test_the_compiler_warns_below_the_subject(): COMPILED(lambda: SUBJECT(READ))
def test_the_subject_compiles(): SUBJECT(READ)
"""


@pytest.mark.thorough
def test_a_checks_own_warnings_are_errors_still(suite: Suite) -> None:
    outcome = Session(
        suite(OURS), "--subject", "loud", env={"PYTHONPATH": FORKS}, warm=True
    ).finish()
    for name in ("a_check_warns", "what_it_hands_to_the_subject_warns"):
        assert outcome.check(f"test_{name}")["verdict"] == "fail"
        assert "UserWarning: mine" in outcome.check(f"test_{name}")["message"]
    assert outcome.check("test_ignored")["verdict"] == "pass"
    assert outcome.check("test_a_library_warns")["verdict"] == "fail"
    for name in ("the_compiler_warns", "the_compiler_warns_below_the_subject"):
        check = outcome.check(f"test_{name}")
        assert check["verdict"] == "pass", outcome.output
        assert "of the compiler" not in str(check["warnings"])
    assert "of the compiler" in str(outcome.check("test_the_subject_compiles")["warnings"])


PLANTED = """
import warnings, pytest
from shardproof.tensor.parallel import ddp
def warn(): warnings.warn("ours")
warn = type(warn)(warn.__code__, {**vars(ddp), "warnings": warnings})
@pytest.mark.world(2)
def test_it(): warn()
"""


@pytest.mark.thorough
def test_warnings_of_the_reference_are_errors(suite: Suite) -> None:
    folder = suite(PLANTED)
    assert Session(folder, "--subject", "shardproof").finish().exit == 1
    # The same code in a copy elsewhere is anybody's.
    (folder / "shardproof").symlink_to(SUITES.parent / "reference" / "shardproof")
    path = f"{folder}:{SUITES}"
    copied = Session(folder, "--subject", "shardproof", env={"PYTHONPATH": path})
    assert copied.finish().exit == 0


def test_every_function_has_its_check() -> None:
    text = "".join(p.read_text() for p in (SUITES / "conformance").rglob("test_*.py"))
    judged = re.findall(
        r'(?:judges\(|^[A-Z_]+ = )"((?:_state_dict_utils|tensor)\.[\w.]+)"', text, re.MULTILINE
    )
    assert set(judged) == set(NAMES)
