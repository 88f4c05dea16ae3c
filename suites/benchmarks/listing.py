"""All benchmarks, and the functions of the contract that they cover."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

from benchmarks.base import Measured

HERE = Path(__file__).parent


def benchmarks() -> list[Measured]:
    """One of each class that measures functions, by module and name."""
    found = []
    for path in sorted(HERE.glob("bench_*.py")):
        module = importlib.import_module(f"benchmarks.{path.stem}")
        for thing in vars(module).values():
            is_its_own = inspect.isclass(thing) and thing.__module__ == module.__name__
            if is_its_own and issubclass(thing, Measured) and not inspect.isabstract(thing):
                found.append(thing())
    return found


def label(benchmark: Measured, regime: str, size: int) -> str:
    """The name of a measurement: GatherStateDict model x4."""
    return f"{type(benchmark).__name__} {regime} x{size}"
