"""All benchmarks, and the functions of the contract that they cover."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

from benchmarks.base import Measured

HERE = Path(__file__).parent


def modules() -> list[str]:
    """The names of the bench_<area> modules."""
    return sorted(f"benchmarks.{path.stem}" for path in HERE.glob("bench_*.py"))


def benchmarks() -> list[Measured]:
    """One of each class that measures functions, by module and name."""
    found = []
    for name in modules():
        module = importlib.import_module(name)
        for thing in vars(module).values():
            if (
                inspect.isclass(thing)
                and issubclass(thing, Measured)
                and not inspect.isabstract(thing)
                and thing.__module__ == name
            ):
                found.append(thing())
    return found


def label(benchmark: Measured, regime: str, size: int) -> str:
    """The name of a measurement: GatherStateDict model x4."""
    return f"{type(benchmark).__name__} {regime} x{size}"
