"""The one issue of a thing that is judged: open while something is wrong; through gh."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass

LABEL = "nightly"


class TrackerError(Exception):
    """gh could not do what it was asked; the text is what it said."""


@dataclass(frozen=True)
class Tracker:
    """Issues of one repository."""

    repository: str
    dry_run: bool = False

    def settle(self, title: str, body: str, *, wrong: bool, news: bool) -> str:
        """Open, update or close the issue of that title; what was done, in words.

        `wrong`: something is unexpected tonight; `news`: tonight differs from the night before.
        """
        if self.dry_run:
            if wrong:
                return f"would open or update {title!r}" if news else f"would leave {title!r} open"
            return f"would close {title!r}, if open" + (" with a comment" if news else "")
        number = self._find(title)
        if wrong and number is None:
            self._gh("issue", "create", "--title", title, "--label", LABEL, "--body", body)
            return f"opened {title!r}"
        if number is None:
            return "no issue is open"
        if wrong:
            if news:
                self._gh("issue", "comment", number, "--body", body)
            return f"#{number} stays open"
        self._gh("issue", "close", number, "--comment", body)
        return f"closed #{number}"

    def _find(self, title: str) -> str | None:
        found = json.loads(
            self._gh("issue", "list", "--state", "open", "--label", LABEL, "--limit", "200")
        )
        return next((str(i["number"]) for i in found if i["title"] == title), None)

    def _gh(self, *words: str) -> str:
        command = ["gh", *words, "--repo", self.repository]
        if words[1] == "list":
            command += ["--json", "number,title"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        except FileNotFoundError:
            raise TrackerError("there is no gh command: install GitHub's CLI") from None
        if done.returncode:
            raise TrackerError(f"{' '.join(command[:3])}: {done.stderr.strip()}")
        return done.stdout
