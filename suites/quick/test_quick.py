"""ci/quick: a change leads to the functions and tests that depend on it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from quick.affected import affected_by
from quick.choose import spread
from quick.imports import ROOT, graph, importers, modules

REFERENCE = ROOT / "reference" / "shardproof"


def test_importers_are_found_through_others() -> None:
    imports = {"a": frozenset("b"), "b": frozenset("c"), "c": frozenset[str](), "d": frozenset("e")}
    assert importers(["c"], imports) == {"a", "b", "c"}
    assert importers(["a"], imports) == {"a"}


def test_a_module_of_the_reference_leads_to_its_functions() -> None:
    """The floor reaches every function; a twin reaches its own and those of whoever imports it."""
    gather = affected_by([REFERENCE / "_state_dict_utils" / "gather.py"])
    assert "_state_dict_utils._gather_state_dict" in gather.functions
    assert "_state_dict_utils._flatten_state_dict" not in gather.functions
    fsdp = affected_by([REFERENCE / "tensor" / "parallel" / "fsdp" / "boxes.py"])
    assert "tensor.parallel.fsdp._get_box" in fsdp.functions
    assert "_state_dict_utils._gather_state_dict" not in fsdp.functions


def test_every_module_of_the_reference_reaches_a_function() -> None:
    known = modules()
    for name, path in known.items():
        if name.startswith("shardproof.") and not path.name.startswith("_"):
            assert affected_by([path]).functions, f"{name} reaches nothing"


def test_what_tests_import_leads_to_them() -> None:
    """A kit's module and a changed test lead to tests; a page leads nowhere, and is named."""
    kit = affected_by([ROOT / "suites" / "conformance" / "kit" / "fsdp1.py"])
    assert kit.tests
    assert not kit.functions
    assert affected_by([Path(__file__)]).tests == (Path(__file__),)
    page = ROOT / "README.md"
    assert affected_by([page]).unknown == (page,)


def test_the_graph_knows_imports_within_functions() -> None:
    assert "benchmarks.run.parent" in graph()["benchmarks.results.baseline"]


def test_each_group_gets_its_share() -> None:
    assert spread([1, 2, 3, 4, 5], "aaabc", 3) == [1, 4, 5]
    assert spread([1, 2, 3], "aab", 9) == [1, 3, 2]


@pytest.mark.thorough
def test_an_answer_within_a_minute() -> None:
    file = REFERENCE / "_state_dict_utils" / "flatten.py"
    ran = subprocess.run(
        ["ci/quick", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "that this change reaches" in ran.stdout
    assert "Left out:" in ran.stdout
