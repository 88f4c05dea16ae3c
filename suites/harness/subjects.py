"""The subject: an import root, and functions looked up under it by upstream's names."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class Subject:
    """The implementation under test, as the fixture `subject` hands it to a check.

    `subject.module("_state_dict_utils")` is that module of the implementation;
    `subject.function("_state_dict_utils._gather_state_dict")` one function of it.
    """

    def __init__(self, root: str) -> None:
        self.root = root

    def __repr__(self) -> str:
        return f"<subject {self.root}>"

    def module(self, name: str) -> ModuleType:
        """A module under the root; `name` as upstream names it below torch.distributed."""
        return importlib.import_module(f"{self.root}.{name}")

    def function(self, path: str) -> Any:
        """The attribute that `path`, module and name, stands for."""
        module, _, name = path.rpartition(".")
        return getattr(self.module(module), name)


def missing(root: str, path: str) -> str:
    """Why the subject has no such function, or an empty text."""
    module, _, name = path.rpartition(".")
    try:
        found = importlib.import_module(f"{root}.{module}")
    except ModuleNotFoundError as error:
        if error.name and f"{root}.{module}".startswith(error.name):
            return f"{root} has no module {module}"
        raise
    return "" if hasattr(found, name) else f"{root}.{module} has no {name}"
