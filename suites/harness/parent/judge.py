"""One check, judged in this process: its world, what its ranks say, the verdict."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.parent import blame
from harness.parent.machines import Machines
from harness.parent.worlds import Worlds
from harness.records.verdicts import Judgement, Verdict
from harness.settings.options import Settings
from harness.settings.requirements import WorldSpec


class Judge:
    """Judges checks, one after the other."""

    def __init__(
        self, settings: Settings, machines: Machines, tick: Callable[[], None] = lambda: None
    ) -> None:
        """`tick` is called again and again while a check runs, and has to be quick."""
        self.settings = settings
        self._tick = tick
        self.worlds = Worlds(settings, machines)

    def judge(self, item: pytest.Item, nextitem: pytest.Item | None, spec: WorldSpec) -> Judgement:
        """The verdict on a check; ``nextitem`` is what this process judges after it."""
        began = time.monotonic()
        world = self.worlds.get(item, spec)
        if isinstance(world, Judgement):
            return world
        keep = self.worlds.keeps(item, nextitem, spec)
        with world.ended_if_it_breaks():
            if world.usable:
                following = None if keep else nextitem
                records = world.run(
                    item, keep, lambda: self.worlds.launch_ahead(following), self._tick
                )
                world.save_logs(self._log_folder(item), self.settings.run_dir)
                judgement = blame.judge(records, spec.size)
            else:
                world.save_logs(self._log_folder(item), self.settings.run_dir)
                judgement = blame.not_started([m.record for m in world.members])
        if keep and world.usable:
            self.worlds.keep(item, world)
        else:
            strays = world.end()
            if strays and judgement.verdict is Verdict.PASS:
                judgement.verdict = Verdict.FAIL
                judgement.message = "left behind by the world: " + "; ".join(strays)
                judgement.text = judgement.message
        judgement.seconds = time.monotonic() - began
        return judgement

    def close(self) -> None:
        """End the worlds that nobody will use."""
        self.worlds.close()

    def _log_folder(self, item: pytest.Item) -> Path:
        # The file's name and what follows, and a mark, for two folders may hold files of one name.
        name = item.nodeid.rpartition(".py::")[0].rpartition("/")[2] + "." + item.name
        plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        mark = hashlib.sha256(item.nodeid.encode()).hexdigest()[:8]
        return self.settings.run_dir / "logs" / f"{plain[:120]}.{mark}"
