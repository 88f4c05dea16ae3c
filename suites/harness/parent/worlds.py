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
        self._held: tuple[object, World] | None = None
        """What the next check of this key gets: a world is started ahead where none is kept."""

    def get(self, item: pytest.Item, spec: WorldSpec) -> World | Judgement:
        """A world for the item, whose ranks have been gathered; or why there can be none."""
        if (held := self._take_held(item)) is not None:
            if held.usable or self._gathered(held).usable:
                return held
            held.end()  # the check that ran meanwhile may have taken what it needed
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
        for member in world.members:
            member.next_check()
        self._held = (self._key(item), world)

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
                self._held = (self._key(nextitem), self._launch(spec))

    def close(self) -> None:
        """End the world that nobody will use."""
        held, self._held = self._held, None
        if held is not None:
            held[1].end()

    def _gathered(self, world: World) -> World:
        with world.ended_if_it_breaks():
            world.gather()
        return world

    def _launch(self, spec: WorldSpec) -> World:
        world = World(spec, self._machines.parts(spec), self._settings.start_method)
        with world.ended_if_it_breaks():
            world.launch()
        return world

    def _take_held(self, item: pytest.Item) -> World | None:
        if self._held is None or self._held[0] != self._key(item):
            self.close()
            return None
        (_, world), self._held = self._held, None
        return world

    def _key(self, item: pytest.Item) -> object:
        if not requirements.is_check(item):
            return None
        parent = getattr(item, "cls", None) or item.nodeid
        return (requirements.spec_of(item, self._settings), parent)
