"""Digests of what a check got, one file a rank, so that two runs can be compared bit by bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from ecosystem.parts import Parts, inner_tensors


class Digests:
    """`note("loss", value)`: the value's digest under a name, which is noted once."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}

    def __call__(self, name: str, value: Any) -> None:
        assert name not in self._found, f"{name} is noted twice"
        self._found[name] = digest(value)

    def write(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank-{rank}.json").write_text(json.dumps(self._found, indent=1) + "\n")


def folder_of(run: Path, check: str) -> Path:
    """Where the ranks of a check leave their digests."""
    return run / "digests" / hashlib.sha256(check.encode()).hexdigest()[:16]


def read(run: Path, check: str) -> dict[str, dict[str, str]]:
    """By rank's file name and name: the digests that a check left in a run."""
    files = sorted(folder_of(run, check).glob("rank-*.json"))
    return {file.stem: json.loads(file.read_text()) for file in files}


def digest(value: Any) -> str:
    """Of bits, dtypes, shapes and keys; of what this rank holds of a DTensor. No collective."""
    found = hashlib.sha256()
    for piece in _pieces(value):
        found.update(piece)
        found.update(b"\0")
    return found.hexdigest()


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, Mapping):
        yield b"{"
        for key, inner in value.items():
            yield repr(key).encode()
            yield from _pieces(inner)
        yield b"}"
    elif isinstance(value, (list, tuple)):
        yield b"["
        for inner in value:
            yield from _pieces(inner)
        yield b"]"
    elif isinstance(value, DTensor):
        yield f"DTensor {tuple(value.shape)}".encode()
        yield from _pieces(value._local_tensor)
    elif isinstance(value, ShardedTensor):
        yield f"ShardedTensor {tuple(value.size())}".encode()
        yield from _pieces([shard.tensor for shard in value.local_shards()])
    elif isinstance(value, torch.Tensor):
        yield from _bits(value)
    else:
        yield repr(value).encode()


def _bits(value: torch.Tensor) -> Iterator[bytes]:
    inner: Parts | None = inner_tensors(value)
    if inner is not None:
        yield f"{type(value).__name__} {tuple(value.shape)}".encode()
        yield from _pieces(inner)
        return
    plain = value.detach().cpu().contiguous()
    yield f"{plain.dtype} {tuple(plain.shape)}".encode()
    yield plain.reshape(-1).view(torch.uint8).numpy().tobytes()
