"""What is known of a subject before any rank starts, without running a stranger's code here.

The installed torch and this repository's reference are imported into this process, from which
ranks fork warm. Anybody else's implementation is imported by a child, which says what it found;
its ranks import it themselves. An import that hangs, crashes or starts threads costs the run one
clear sentence.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from types import ModuleType

from harness.settings import subject_warnings
from harness.settings.subjects import CALLERS_MODULE, INSTALLED_TORCH, MODULES, needs_no_install
from harness.system import processes

IMPORT_LIMIT = 120.0
"""Seconds that a subject has for its import."""

in_spawned_rank = False
"""Set by a rank that is a new interpreter: it reads the run\'s settings as its parent did."""


@dataclass(frozen=True)
class SubjectInfo:
    """A subject, as its import has shown it."""

    root: str
    file: str = ""
    version: str = ""
    warnings: dict[str, bool] = field(default_factory=dict)
    """What imports of it have warned of so far, as `warned.IssuedWarnings` has it."""
    error: str = ""
    """Why it cannot be imported; empty where it can."""
    names: dict[str, list[str] | None] | None = None
    """What each module of the set has, and the root (""), where a child was asked."""

    @property
    def is_no_subject(self) -> bool:
        """Whether the root holds none of the set's modules; a fork may hold some of them."""
        return self.names is not None and all(self.names[name] is None for name in MODULES)

    @property
    def replaces_no_callers(self) -> str:
        """Why the subject cannot take the place of torch's callers, or an empty text."""
        path = f"{CALLERS_MODULE}._load_model_state_dict"
        return needs_no_install(self.root) or self.missing(path)

    def warm_up(self) -> None:
        """Import all its modules, so that ranks find them, where its code may run here.

        Torch's come with what every rank needs (`harness.system.warm`), in an order of theirs.
        """
        if self.root != INSTALLED_TORCH and is_imported_here(self.root):
            for name in (*MODULES, CALLERS_MODULE):
                self._names_here(f"{self.root}.{name}")

    def missing(self, path: str) -> str:
        """Why the subject has no such function, or an empty text."""
        module, _, name = path.rpartition(".")
        whole = f"{self.root}.{module}" if module else self.root
        names = self._names_here(whole) if self.names is None else self.names[module]
        if names is None:
            return f"{self.root} has no module {module}"
        return "" if name in names else f"{whole} has no {name}"

    def _names_here(self, whole: str) -> Collection[str] | None:
        # Not before it is asked for: --install-at before comes ahead of all that these import.
        noted = subject_warnings.IssuedWarnings()
        with subject_warnings.collecting(self.root, noted):
            if self.root == INSTALLED_TORCH:
                _import_in_torchs_order()
            module = _module(whole)
        self.warnings.update(noted.texts)
        return None if module is None else vars(module)

    @property
    def not_installable(self) -> str:
        """Why torch's public API cannot be run on the subject, or an empty text."""
        return "" if self.root == INSTALLED_TORCH else self.missing("installed")


def is_imported_here(root: str) -> bool:
    """Whether the subject's code may run in the process that judges it."""
    return root == INSTALLED_TORCH or subject_warnings.of_this_repository(root) or in_spawned_rank


def look(root: str) -> SubjectInfo:
    """What there is under an import root."""
    if is_imported_here(root):
        return _import(root)
    try:
        found = processes.ask_a_child(lambda: asdict(_import(root, names=True)), IMPORT_LIMIT)
    except ChildProcessError as error:
        return SubjectInfo(root, error=f"its import {error}")
    return SubjectInfo(**found)


def arrive(root: str) -> None:
    """On a rank: import the subject, before anything counts as a check's doing."""
    if not is_imported_here(root) and (error := _import(root).error):
        raise ImportError(f"{root} cannot be imported on this rank, as it could before: {error}")


def _import(root: str, names: bool = False) -> SubjectInfo:
    noted = subject_warnings.IssuedWarnings()
    found: dict[str, list[str] | None] = {}
    try:
        with subject_warnings.collecting(root, noted):
            top = importlib.import_module(root)
            version = getattr(top, "__version__", None) or getattr(
                importlib.import_module(root.partition(".")[0]), "__version__", "unknown"
            )
            if names:
                _import_in_torchs_order()
                modules = {"": top} | {
                    n: _module(f"{root}.{n}") for n in (*MODULES, CALLERS_MODULE)
                }
                found = {n: None if m is None else sorted(vars(m)) for n, m in modules.items()}
    except Exception as error:
        return SubjectInfo(root, error=f"{type(error).__name__}: {error}")
    file = str(getattr(top, "__file__", None) or "namespace")
    return SubjectInfo(root, file, str(version), noted.texts, "", found if names else None)


def _import_in_torchs_order() -> None:
    """Before `tensor.parallel.fsdp`, which imports this and is imported by it, in a circle."""
    importlib.import_module("torch.distributed.fsdp")


def _module(whole: str) -> ModuleType | None:
    try:
        return importlib.import_module(whole)
    except ModuleNotFoundError as error:
        if error.name and whole.startswith(error.name):
            return None
        raise
