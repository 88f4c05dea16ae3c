"""A reference implementation of PyTorch's private parallelism utilities.

The package mirrors ``torch.distributed``: a module here has the path, the function names and the
signatures of its upstream twin, so either can stand in for the other. What the functions promise
is written in their docstrings and judged by the suites.

    import shardproof
    shardproof.install()

puts the reference under torch's public API, in every process that calls it.

    proof = shardproof.prove(model, optimizer)

says whether the checkpoints of a job are whole.

Its parts, in reading order:

- ``_install``: the functions of this package in the place of torch's, and out again.
- ``checkpoint``: state dicts of models and optimizers, in the place of torch's callers of the set.
- ``fsdp``: FSDP1 over tensor parallelism, likewise.
- ``_state_dict_utils``: state dicts between sharded and whole.
- ``tensor``: tensor parallelism below DDP and FSDP.
- ``__main__``: the command line.
- ``_prove``: whether a job's checkpoints are whole; it uses nothing of the others.
- ``_core``: what the functions with upstream's names are made of.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shardproof._install import install, installed, uninstall

if TYPE_CHECKING:
    from shardproof._prove import (
        NoRoomError,
        NotWholeError,
        Proof,
        RankLostError,
        WrongUseError,
        prove,
    )

_OF_PROVE = ("NoRoomError", "NotWholeError", "Proof", "RankLostError", "WrongUseError", "prove")

__all__ = [
    "NoRoomError",
    "NotWholeError",
    "Proof",
    "RankLostError",
    "WrongUseError",
    "install",
    "installed",
    "prove",
    "uninstall",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when asked for: install() is to be the first to import torch's modules.
    if name in _OF_PROVE:
        return getattr(importlib.import_module("shardproof._prove"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
