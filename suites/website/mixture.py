"""Whether runs are of one commit of the suites; if not, only checks that all of them ran count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from website.history import NoSiteError, Run


@dataclass(frozen=True)
class Mixture:
    """The commits of some runs, and the checks that may be held against each other."""

    commits: tuple[str, ...]
    ids: frozenset[str] | None
    """Those that ran in all; None: the runs are of one commit, and each counts whole."""
    others: int
    """How many ran in some of them only."""

    def counts(self, identity: str) -> bool:
        return self.ids is None or identity in self.ids


def mixture(runs: Sequence[Run]) -> Mixture:
    """What may be compared between these runs."""
    commits = tuple(dict.fromkeys(run.commit for run in runs))
    clean = all(commit and not commit.endswith("-dirty") for commit in commits)
    if len(commits) <= 1 and (clean or len(runs) <= 1):
        return Mixture(commits, None, 0)
    every = frozenset.intersection(*(run.ran for run in runs))
    some = frozenset.union(*(run.ran for run in runs))
    return Mixture(commits, every, len(some - every))


def refuse_mixture(runs: Sequence[Run]) -> None:
    """Raise NoSiteError where runs are of several commits of the suites."""
    found = mixture(runs)
    if found.ids is not None:
        names = ", ".join(commit[:12] + commit[40:] or "unknown" for commit in found.commits[:5])
        more = f" and {len(found.commits) - 5} more" if found.commits[5:] else ""
        raise NoSiteError(
            f"the runs are of {len(found.commits)} commits of the suites ({names}{more}): what "
            "differs between them may be the suites' doing; --mixed makes the site all the same, "
            "says so on it, and compares only checks that both runs have"
        )
