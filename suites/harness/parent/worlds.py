"""Which world a check gets: the one kept from the check before, one started ahead, or a fresh one.

While a check runs, the ranks of the next one's world start and find each other: the check leaves
cores idle wherever its ranks wait for each other. They get nothing to do before the check is
judged and its world has ended, so no check runs beside another.
"""

from __future__ import annotations

import contextlib

import pytest

from harness.parent.machines import Machines
from harness.parent.world import World
from harness.records.verdicts import Judgement, Verdict
from harness.settings import requirements
from harness.settings.options import Settings
from harness.settings.requirements import WorldSpec
from harness.system import warm


class Worlds:
    """The worlds of a session, one check at a time."""

    def __init__(self, settings: Settings, machines: Machines) -> None:
        self._settings = settings
        self._machines = machines
        self._kept: tuple[object, World] | None = None
        self._ahead: tuple[str, World] | None = None

    def get(self, item: pytest.Item, spec: WorldSpec) -> World | Judgement:
        """A world for the item, whose ranks have been gathered; or why there can be none."""
        if (kept := self._take_kept(item)) is not None:
            return kept
        ahead = self._take_ahead(item)
        if ahead is not None and self._gathered(ahead).usable:
            return ahead
        if ahead is not None:  # the check that ran meanwhile may have taken what it needed
            ahead.end()
        if self._settings.start_method == "fork" and (reason := warm.unfit()):
            return Judgement(Verdict.ERROR, reason, reason)
        try:
            return self._gathered(self._launch(spec))
        except OSError as error:  # no room, no descriptor, no process: the next check may find one
            reason = f"the world could not be started: {type(error).__name__}: {error}"
            return Judgement(Verdict.ERROR, reason, reason)

    def keeps(self, item: pytest.Item, nextitem: pytest.Item | None, spec: WorldSpec) -> bool:
        """Whether the item's world is to be used again by the next item."""
        return spec.reuse and nextitem is not None and self._key(nextitem) == self._key(item)

    def keep(self, item: pytest.Item, world: World) -> None:
        """Hold a usable world for the next item."""
        self._kept = (self._key(item), world)

    def unmet(self, item: pytest.Item, spec: WorldSpec | None) -> str:
        """What this run cannot give the item, in words; empty when it can."""
        missing = requirements.unmet(item, spec, self._settings)
        return missing or (self._machines.unmet(spec) if spec is not None else "")

    def launch_ahead(self, nextitem: pytest.Item | None) -> None:
        """Begin to start the next item's world, beside the one that runs.

        Whatever stands against it is left to be found, and told, when the item's turn comes.
        """
        if (
            nextitem is None
            or self._settings.start_method != "fork"
            or not requirements.is_check(nextitem)
        ):
            return
        spec = requirements.spec_of(nextitem, self._settings)
        if not self.unmet(nextitem, spec) and not warm.unfit():
            with contextlib.suppress(OSError):  # no process to be had, now: it is tried again
                self._ahead = (nextitem.nodeid, self._launch(spec))

    def close(self) -> None:
        """End the worlds that nobody will use."""
        worlds = [held[1] for held in (self._kept, self._ahead) if held is not None]
        self._kept = self._ahead = None
        for world in worlds:
            world.end()

    def _gathered(self, world: World) -> World:
        try:
            world.gather()
        except BaseException:
            world.end()
            raise
        return world

    def _launch(self, spec: WorldSpec) -> World:
        world = World(spec, self._machines.parts(spec), self._settings.start_method)
        try:
            world.launch()
        except BaseException:
            world.end()
            raise
        return world

    def _take_kept(self, item: pytest.Item) -> World | None:
        held, self._kept = self._kept, None
        if held is None:
            return None
        key, world = held
        if key == self._key(item) and world.usable:
            for member in world.members:
                member.next_check()
            return world
        world.end()
        return None

    def _take_ahead(self, item: pytest.Item) -> World | None:
        held, self._ahead = self._ahead, None
        if held is None:
            return None
        name, world = held
        if name == item.nodeid:
            return world
        world.end()
        return None

    def _key(self, item: pytest.Item) -> object:
        if not requirements.is_check(item):
            return None
        parent = getattr(item, "cls", None) or item.nodeid
        return (requirements.spec_of(item, self._settings), parent)
