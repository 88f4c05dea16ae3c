"""What asv sees: classes whose samples and counts come from the ranks of a session.

asv times what its own process does; here that is only a proxy. `time_call` moves a clock of its
own forward by each sample that the ranks took, and asv does its statistics on that clock.
"""

from __future__ import annotations

import abc
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.settings import ARMS, FLOOR, REFERENCE, TORCH, Settings
from benchmarks.statistics import ERROR, doubt

if TYPE_CHECKING:
    from benchmarks.rank_context import RankContext
    from benchmarks.work import Work

SUBJECTS = (TORCH, REFERENCE)


class _Clock:
    """A clock that stands still but for the samples."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


_CLOCK = _Clock()

TRACKS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "ratio_to_floor": ("x floor", SUBJECTS, "Time over the floor's, of the same rounds."),
    "ratio_to_torch": ("x torch", (REFERENCE,), "Time over torch's, of the same rounds."),
    "collectives": ("collectives", SUBJECTS, "Collectives that one call issues on a rank."),
    "received": ("bytes", ARMS, "Bytes that one call receives on a rank from others."),
    "peak": ("bytes", SUBJECTS, "Peak of the memory that one call allocates on a rank."),
    "calls": ("calls", SUBJECTS, "Python functions that one call enters on a rank."),
}
"""Name of each track to its unit, the arms it is there for, and what it is; ranks: the largest."""

RATIOS = {"ratio_to_floor": FLOOR, "ratio_to_torch": TORCH}
"""Tracks with noise, and what a time is held against. One that the worlds have not made known has
no number: two runs agree about those that have one (`ci/bench --agree`)."""

COUNTED = ("collectives", "received", "peak", "calls")
"""Tracks without noise."""

MOVED = ("ratio_to_floor", "ratio_to_torch", "collectives", "received", "peak")
"""Tracks of a benchmark that communicates."""
COUNTS = ("ratio_to_floor", "ratio_to_torch", "calls", "peak")
"""Tracks of a benchmark whose ranks work alone."""
SCALE = ("collectives", "calls", "peak")
"""Tracks of rank 0 of a fake world."""

CONSTANT, LINEAR = "constant", "linear"
"""Growth of a count with the size of the world."""


class AsvSettings:
    """asv's own settings: one call a sample; the session has its own, shorter limits."""

    timeout = 1500
    version = "1"
    number = 1
    rounds = 1
    warmup_time = 0
    min_run_count = 1


class Measured(AsvSettings, abc.ABC):
    """One benchmark: a call of the subject, its floor, and where both are measured.

    `work` and `floor` run on every rank of the world; what they return is called in turns, in the
    same world, and each result is checked before its time counts.
    """

    functions: ClassVar[tuple[str, ...]] = ()
    """The functions of the contract that the call spends its time in: module.name."""
    regimes: ClassVar[tuple[str, ...]] = ("model",)
    sizes: ClassVar[tuple[int, ...]] = (4,)
    """Sizes of the worlds, smallest first."""
    device_only: ClassVar[bool] = False
    """Whether it says nothing without an accelerator."""
    absent: ClassVar[Mapping[str, str]] = {}
    """Arm to the reason why it cannot be measured: torch refuses, or gives a wrong result."""
    varies: ClassVar[Mapping[tuple[str, str], str]] = {}
    """(regime, count) to how torch's differs from call to call, so that it has none there."""
    redistributes: ClassVar[bool] = False
    """Whether torch's function gathers DTensors by torch's own redistribution."""
    tracks: ClassVar[tuple[str, ...]] = MOVED
    fake: ClassVar[bool] = False
    """Whether one process stands for rank 0 of a world whose communication does nothing."""
    growth: ClassVar[Mapping[str, str]] = {}
    """Count to how the reference's grows with the world: constant, or at most linear."""

    param_names = ("subject", "regime", "world")

    @abc.abstractmethod
    def work(self, ctx: RankContext) -> Work:
        """The call of `ctx.function(...)`, its check and its reset; runs on every rank."""

    @abc.abstractmethod
    def floor(self, ctx: RankContext) -> Work:
        """The least that the machine must do for the same result; runs on every rank."""

    @classmethod
    def grid(cls, settings: Settings) -> list[tuple[str, int]]:
        """(regime, size of the world) of every measurement; quick leaves out the largest."""
        sizes: Sequence[int] = cls.sizes
        if settings.quick:
            sizes = [n for n in sizes if n in ((8, 512) if cls.fake else (1, 2, 4))]
        if settings.smallest:
            sizes = sizes[:1]
        return [(regime, size) for regime in cls.regimes for size in sizes]

    @classmethod
    def missing(cls, arm: str, settings: Settings) -> str:
        """Why there is no number for the arm, in words; empty when there must be one."""
        if cls.device_only and settings.device == "cpu":
            return "needs an accelerator: ci/bench --device cuda"
        if arm == TORCH and cls.redistributes and settings.over_gloo:
            return "Gloo ends a process that gathers DTensors on a device (pytorch#152645)"
        return cls.absent.get(arm, "")

    def __init_subclass__(cls) -> None:
        """Give the class the functions that asv finds by name, each with its own parameters."""
        settings = Settings.from_environment()
        sizes = dict.fromkeys(size for _, size in cls.grid(settings))
        axes = (
            [settings.regime(r) for r in cls.regimes],
            [f"{size} ranks, {settings.where()}" for size in sizes],
        )

        time_call: Any = sampled(
            # One world is one sample: its rounds have in common where its memory lies.
            lambda params: list(
                map(statistics.median, _ask(cls, "time", params)[params[0]]["seconds"])
            )
        )
        time_call.__doc__ = f"Seconds, largest over the ranks: {cls.__doc__}"
        time_call.params = [list(ARMS), *axes]
        cls.time_call = time_call  # type: ignore[attr-defined]
        for name, (unit, arms, meaning) in TRACKS.items():
            if name not in cls.tracks:  # nor is a base class's, which asv would find
                setattr(cls, f"track_{name}", None)
                continue

            def track(self: Any, *params: str, name: str = name) -> float:
                return _value(cls, name, params)

            track.__name__ = f"track_{name}"
            track.__doc__ = meaning
            track.unit = unit  # type: ignore[attr-defined]
            track.params = [list(arms), *axes]  # type: ignore[attr-defined]
            track.setup = partial(_torch_has_it, cls, name)  # type: ignore[attr-defined]
            setattr(cls, track.__name__, track)

    def setup(self, *params: str) -> None:
        """Leave out what is known to be absent: asv shows it as n/a."""
        settings = Settings.from_environment()
        size = int(params[2].split()[0])
        reason = self.missing(params[0], settings) or ("" if self.fake else settings.beyond(size))
        if reason:
            raise NotImplementedError(reason)


def _torch_has_it(cls: type[Measured], track: str, arm: str, regime: str, *_: str) -> None:
    """Leave out the ratio where torch has no number, and its count where that differs each time.

    asv calls it with the parameters.
    """
    reason = ""
    if track == "ratio_to_torch":
        reason = cls.missing(TORCH, Settings.from_environment())
    elif arm == TORCH:
        reason = cls.varies.get((regime.removeprefix("quick "), track), "")
    if reason:
        raise NotImplementedError(f"torch: {reason}")


def _ask(cls: type[Measured], metric: str, params: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The numbers of all arms; RuntimeError where the one that is asked for has none."""
    from benchmarks import session_client

    settings = Settings.from_environment()
    arm, regime, world = params
    answer = session_client.ask(
        {
            "module": cls.__module__,
            "benchmark": cls.__name__,
            "regime": regime.removeprefix("quick "),
            "size": int(world.split()[0]),
            "reader": f"{metric} {arm}",
        },
        settings,
    )
    arms: dict[str, dict[str, Any]] = answer["arms"]
    if wrong := arms[arm]["wrong"]:
        raise RuntimeError(f"no number for {arm}: {wrong}")
    return arms


def sampled(fetch: Callable[[tuple[str, ...]], Sequence[float]]) -> Any:
    """A `time_call` for asv whose samples are what `fetch` gives for its parameters, once."""
    loaded: dict[tuple[str, ...], Iterator[float]] = {}

    def function(self: Any, *params: str) -> None:
        _CLOCK.now += next(loaded[params])

    def load(*params: str) -> None:
        if params in loaded:  # asv calls a set-up before every sample
            return
        seconds = fetch(params)
        if not seconds:
            raise RuntimeError(f"{params}: nothing was measured")
        loaded[params] = iter(seconds)
        time_call.repeat = len(seconds)

    time_call: Any = function
    time_call.__name__ = "time_call"
    time_call.setup = load
    time_call.timer = _CLOCK
    return time_call


def _value(cls: type[Measured], name: str, params: tuple[str, ...]) -> float:
    arm = params[0]
    arms = _ask(cls, name, params)
    value = arms[arm].get(name)
    if value is None:
        raise RuntimeError(f"{cls.__name__} {params}: {name} was not measured")
    if name in RATIOS:
        unsure = doubt(arms[arm]["seconds"], arms[RATIOS[name]]["seconds"])
        if unsure > ERROR and not Settings.from_environment().quick:
            known = f"known within {unsure:.1%}" if unsure < math.inf else "of too few worlds"
            print(f"{name}: {value:.3g}, {known}, not {ERROR:.1%}: no number; --seconds gives more")
            return math.nan
        value = float(f"{value:.4g}")  # asv shows all that there is
    return float(value)
