"""Which modules of the reference are mutated, and by which checks: those of the set, or callers'.

A process judges one scope. `choose` comes before anything of the reference is read.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass


@dataclass(frozen=True)
class Scope:
    """Modules, and the checks that judge them."""

    name: str
    suite: str
    """The folder of the checks."""
    besides: tuple[str, ...] = ()
    """Files of checks that are in no such folder."""
    options: tuple[str, ...] = ()
    """Of the run, beside those of every run."""
    files: tuple[str, ...] = ("*",)
    others: tuple[str, ...] = ()
    """Patterns of modules that are not its own."""

    def has(self, file: str) -> bool:
        """Whether it judges the module, a path below reference/shardproof."""
        own, others = (
            any(fnmatch.fnmatch(file, pattern) for pattern in patterns)
            for patterns in (self.files, self.others)
        )
        return own and not others


_CALLERS = ("checkpoint/*", "fsdp/*")
SCOPES = {
    scope.name: scope
    for scope in (
        Scope(
            "set",
            "suites/conformance",
            # The checks of `install` and `uninstall`, which are no functions of torch.
            besides=("suites/integration/test_install.py",),
            # What `prove` misses is measured by planted losses: ci/prove-losses. The package's own
            # module only says which names are of `prove`.
            others=(*_CALLERS, "_prove/*", "__main__.py", "__init__.py"),
        ),
        Scope("callers", "suites/integration", options=("--callers",), files=_CALLERS),
    )
}
_chosen = SCOPES["set"]
_asked = False


def current() -> Scope:
    """The scope of this process."""
    global _asked
    _asked = True
    return _chosen


def choose(name: str) -> None:
    """Judge this scope; RuntimeError where another one was asked for already."""
    global _chosen
    if _asked and SCOPES[name] is not _chosen:
        raise RuntimeError(f"the scope is {_chosen.name} already, and cannot become {name}")
    _chosen = SCOPES[name]
