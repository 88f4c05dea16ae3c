"""The subject: an import root, and functions looked up under it by upstream's names."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any


class Subject:
    """The implementation under test, as the fixture `subject` hands it to a check.

    `subject.module("_state_dict_utils")` is that module of the implementation;
    `subject.function("_state_dict_utils._gather_state_dict")` one function of it.
    """

    def __init__(self, root: str, install_at: str = "after", *, callers: bool = False) -> None:
        self.root = root
        self._install_at = install_at
        self._options = {"callers": True} if callers else {}

    def __repr__(self) -> str:
        return f"<subject {self.root}>"

    def module(self, name: str = "") -> ModuleType:
        """A module under the root, named as upstream below torch.distributed; "" is the root."""
        return importlib.import_module(_module(self.root, name))

    def function(self, path: str) -> Any:
        """The attribute that `path`, module and name, stands for."""
        module, _, name = path.rpartition(".")
        return getattr(self.module(module), name)

    def in_place(self) -> AbstractContextManager[None]:
        """The subject under torch's public API, for the time of a `with` block.

        torch.distributed is there already; any other has `installed()` for it. A run that installs
        before everything else (`--install-at before`) leaves it at that.
        """
        if self.root == INSTALLED_TORCH or self._install_at == "before":
            return nullcontext()
        placed: AbstractContextManager[None] = self.function("installed")(**self._options)
        return placed

    def put_in(self) -> None:
        """Put the subject under torch's public API, for good."""
        self.function("install")(**self._options)

    def take_out(self) -> None:
        """Undo what the run installed before everything else, on this rank."""
        if self._install_at != "after":
            self.function("uninstall")()


INSTALLED_TORCH = "torch.distributed"
MODULES = (
    "_state_dict_utils",
    "tensor.parallel._data_parallel_utils",
    "tensor.parallel.ddp",
    "tensor.parallel.fsdp",
)
"""The modules of the set, below an import root."""

CALLERS_MODULE = "checkpoint.state_dict"
"""A module of torch's code around the set that a subject may replace, too (`--callers`)."""

MOMENTS = {
    "before": "before torch's modules that use torch.distributed, and libraries, are imported",
    "after": "in each check, when all of them are",
    "twice": "at both moments",
}
"""When a subject that puts itself under torch's public API may do so."""


def install_early(root: str, moment: str, *, callers: bool) -> None:
    """Put the subject under torch in this process, for good, where the moment says so."""
    if moment != "after":
        Subject(root, callers=callers).put_in()


def needs_no_install(root: str) -> str:
    """Why there is nothing to install, or an empty text."""
    return f"{root} is in place already" if root == INSTALLED_TORCH else ""


def _module(root: str, name: str) -> str:
    return f"{root}.{name}" if name else root
