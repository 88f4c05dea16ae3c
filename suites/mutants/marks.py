"""Marks that statements leave when they run, in memory that all ranks and their children share."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator

import torch

MOST = 1 << 16
_VARIABLE = "SHARDPROOF_MARKS"
"""Names the file of the memory to interpreters that a check starts."""


def _memory() -> mmap.mmap:
    """One byte for each statement, shared by forks; where there is a file, by others as well."""
    if _VARIABLE not in os.environ:
        return mmap.mmap(-1, MOST)
    with open(os.environ[_VARIABLE], "r+b") as file:
        return mmap.mmap(file.fileno(), MOST)


_bytes = _memory()


@torch.compiler.assume_constant_result
def mark(*numbers: int) -> None:
    """Say that something runs; where it is compiled instead, that it was looked at."""
    for number in numbers:
        _bytes[number] = 1


def taken() -> int:
    """The marks since the last call, as a number with a bit for each."""
    found = sum(1 << place for place, byte in enumerate(bytes(_bytes)) if byte)
    _bytes[:] = bytes(MOST)
    return found


@contextlib.contextmanager
def in_a_file() -> Iterator[None]:
    """Share the marks with interpreters that are started inside."""
    global _bytes
    before = _bytes
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(MOST)
        os.environ[_VARIABLE] = file.name
        try:
            _bytes = _memory()
            yield
        finally:
            del os.environ[_VARIABLE]
            _bytes = before
