"""The set of benchmarks is whole, and asv sees all of it."""

from __future__ import annotations

import importlib
import inspect

from asv_runner.discovery import disc_benchmarks

from benchmarks import base
from benchmarks.listing import HERE, benchmarks
from benchmarks.settings import REFERENCE, Settings

QUICK = Settings(quick=True)
DDP = (
    "_get_submodule_n_params",
    "_localize_dtensor",
    "_pre_dp_module_transform",
    "_reconstruct_dtensor",
    "_update_module_param",
)
"""Upstream's module exports nothing; these are the contract's."""


def contract() -> set[str]:
    """Module.name of every function and class of the set."""
    found = {f"tensor.parallel.ddp.{name}" for name in DDP}
    for name in (
        "_state_dict_utils",
        "tensor.parallel._data_parallel_utils",
        "tensor.parallel.fsdp",
    ):
        module = importlib.import_module(f"{REFERENCE}.{name}")
        found |= {
            f"{name}.{n}"
            for n in module.__all__
            if inspect.isfunction(getattr(module, n)) or inspect.isclass(getattr(module, n))
        }
    return found


def test_every_function_of_the_contract_is_measured() -> None:
    covered = {function for b in benchmarks() for function in b.functions}
    # STATE_DICT_TYPE and its kin are types for annotations: nothing runs.
    types = {n for n in contract() if n.rpartition(".")[2].isupper()}
    assert contract() - types - covered == set()
    assert covered - contract() == set(), "no such function"


def test_asv_finds_each_benchmark_once() -> None:
    """The classes of bench_*.py with all their tracks, and nothing else of the package."""
    names = [b.name for b in disc_benchmarks(str(HERE))]
    expected = [
        f"{type(b).__module__.partition('.')[2]}.{type(b).__name__}.{kind}"
        for b in benchmarks()
        for kind in ("time_call", *(f"track_{t}" for t in b.tracks))
    ]
    expected += ["bench_harness.FreshWorld.time_call", "bench_harness.TrivialCheck.time_call"]
    assert sorted(names) == sorted(expected)


def test_every_track_has_a_unit() -> None:
    for found in disc_benchmarks(str(HERE)):
        assert found.unit != "unit", found.name
        assert found.version.isdigit(), f"{found.name}: a version that asv made of its source"


def test_each_benchmark_states_itself() -> None:
    for b in benchmarks():
        name = type(b).__name__
        assert b.functions, f"{name}: measures no function"
        assert "floor" in (type(b).__doc__ or ""), f"{name}: its docstring states no floor"
        assert list(b.sizes) == sorted(b.sizes), f"{name}: sizes {b.sizes}"
        assert set(b.tracks) <= set(base.TRACKS), f"{name}: {b.tracks}"
        assert not b.missing(REFERENCE, QUICK) or b.device_only, f"{name}: lacks the reference"
