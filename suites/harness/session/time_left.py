"""How long a run still takes: from the seconds of an earlier run, else from its own rate."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

_KNOWN = 0.5
"""The share of the checks that an earlier run must have judged; with less the rate counts."""
_TRUST = 0.1
"""The share of a run after which its own pace weighs as much as the earlier run's."""
_RATE_FROM = 0.05
"""The share of the checks that must be done before a rate says anything."""


class TimeLeft:
    """The work that is left of a run, and the pace of this machine."""

    def __init__(self, alone: Mapping[str, bool], known: Mapping[str, float], jobs: int) -> None:
        """`alone`: id of each check to whether nothing runs beside it; `known`: its seconds."""
        found = [known[i] for i in alone if i in known]
        self._measured = bool(alone) and len(found) >= _KNOWN * len(alone)
        typical = statistics.fmean(found) if self._measured else 1.0
        self._cost = {
            identity: (known.get(identity, typical) if self._measured else 1.0)
            / (1 if by_itself else jobs)
            for identity, by_itself in alone.items()
        }
        self._total = self._left = sum(self._cost.values())
        self.checks = len(alone)

    def done(self, identity: str) -> None:
        """A check has its verdict."""
        self._left -= self._cost.pop(identity, 0.0)

    def seconds(self, elapsed: float) -> float | None:
        """What is left `elapsed` seconds after the first check began; None: nobody can say yet."""
        done = self._total - self._left
        if self._measured:
            trust = _TRUST * self._total
            return self._left * (elapsed + trust) / (done + trust) if self._total else 0.0
        return self._left * elapsed / done if done >= _RATE_FROM * self._total > 0 else None


def in_words(seconds: float | None) -> str:
    """The time left, no more exact than it is known."""
    if seconds is None:
        return "time left not known yet"
    if seconds < 10:
        return "seconds left"
    if seconds < 100:
        return f"about {5 * round(seconds / 5)} s left"
    if seconds < 5400:
        return f"about {round(seconds / 60)} min left"
    return f"about {seconds / 3600:.1f} h left"
