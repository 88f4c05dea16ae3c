"""What a check asks for in its marks, and whether this run can give it.

Decided in the parent, before any rank starts: a rank may never skip.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import inspect
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.settings.options import Settings
from harness.system import devices

SIZE_PARAMETER = "_world_size"

MARKS = (
    (
        "world(*sizes, backend=None, collective=None, limit=None, nodes=1, reuse=False): run the "
        "body on every rank of a fresh world of each size (none: the run's size). backend: needs "
        "this one; collective, limit: seconds, instead of --collective-limit and --check-limit; "
        "nodes: needs a world over so many machines; reuse: share the world with the checks of the "
        "same class that follow"
    ),
    (
        "needs(*features): features of the machine or of torch, see "
        "FEATURES in suites/harness/settings/requirements.py, or 'package NAME': a distribution "
        "that is installed"
    ),
    "judges(name): the function of the subject that a class of checks judges, module.function",
    (
        "exercises(area, suite='integration'): the area of torch's public API, or the library "
        "above it, that a class of checks runs the subject in"
    ),
    "law(name): the law of the contract that a check holds the function to",
    (
        "should(reason): the clause is our choice of quality, not what upstream documents "
        "or what corrupts, loses, hangs or lies when it goes wrong; without the mark it is a MUST"
    ),
    (
        "thorough(but=()): one more variant of a clause; runs with --thorough, or when it is asked "
        "for by its id; variants whose parameters' id is one of `but` run each time"
    ),
    "alone: needs the machine for itself: nothing is judged beside it, whatever --jobs says",
    (
        "warns_of_nothing: judged by the warnings that the subject issued in this run's checks of "
        "the function that `judges` names, or of torch's public API (`exercises`); with neither, "
        "while it was imported"
    ),
)


@dataclass(frozen=True)
class WorldSpec:
    """One world, as a check asks for it."""

    size: int
    backend: str
    device: str
    collective: float
    limit: float
    reuse: bool
    nodes: int = 1
    """The fewest machines that it is to span."""
    share_gpus: bool = False
    """Whether ranks of NCCL may share GPUs."""


def _accelerator() -> str:
    return "" if devices.accelerator() else "an accelerator"


@functools.cache
def _docker() -> str:
    if not shutil.which("docker"):
        return "Docker: there is no docker command on this machine"
    for words, what in (
        (["docker", "version", "--format", "{{.Server.Version}}"], "an engine that answers"),
        (["docker", "compose", "version"], "Docker's compose plugin"),
        (["docker", "buildx", "version"], "Docker's buildx plugin"),
    ):
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
        except subprocess.TimeoutExpired:
            return f"{what}: '{' '.join(words)}' did not end within 30 s"
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it said nothing"]
            return f"{what} (DOCKER_HOST names one): {said[0]}"
    return ""


def _unsorted_groups() -> str:
    import torch.distributed as dist

    can = "sort_ranks" in inspect.signature(dist.new_group).parameters
    return "" if can else "a torch whose new_group() can leave ranks in the order given"


def _cuda_image() -> str:
    named = os.environ.get("SHARDPROOF_CUDA_IMAGE")
    return "" if named else "an image built with CUDA, named in SHARDPROOF_CUDA_IMAGE"


def _resident_memory() -> str:
    """Whether a peak can be told from what was resident before: containers may hide it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        ctypes.CDLL(None).mallopt  # noqa: B018
    except (OSError, AttributeError) as error:
        return f"Linux, /proc/self/clear_refs and glibc, to measure resident memory: {error}"
    return ""


def _functional_gathers(settings: Settings) -> str:
    """Whether torch's own all-gathers of DTensors, which some checks compare with, can run."""
    if settings.backend == "gloo" and settings.device != "cpu":
        return (
            "a backend that gathers DTensors: Gloo ends the process when it is given tensors of a "
            "device (https://github.com/pytorch/pytorch/issues/152645)"
        )
    return ""


FEATURES: dict[str, Callable[[Settings], str]] = {
    "accelerator": lambda _: _accelerator(),
    "docker": lambda _: _docker(),
    "cuda image": lambda _: _cuda_image(),
    "unsorted groups": lambda _: _unsorted_groups(),
    "resident memory": lambda _: _resident_memory(),
    "functional gathers": _functional_gathers,
}
"""Name to a probe that says in words what is missing, or nothing."""


_PACKAGE = "package "


def _package(name: str) -> str:
    """What is missing for a distribution that is not installed."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"the package {name}, which this environment lacks"
    return ""


def leave_out_thorough(config: pytest.Config, items: list[pytest.Item]) -> int:
    """Deselect the checks marked thorough, in place, unless they were asked for; how many."""
    if (
        config.option.thorough
        or config.option.certified
        or any("::" in argument for argument in config.args)
    ):
        return 0
    left = [item for item in items if _is_thorough(item)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not _is_thorough(item)]
    return len(left)


def _is_thorough(item: pytest.Item) -> bool:
    marks = item.iter_markers("thorough")
    return any(not any(_is_of(item, usual) for usual in m.kwargs.get("but", ())) for m in marks)


def _is_of(item: pytest.Item, usual: str) -> bool:
    # The world's size is a parameter, too, and stands in front.
    return item.name.endswith((f"[{usual}]", f"-{usual}]"))


def validate_thorough(items: list[pytest.Item]) -> None:
    """Refuse a variant in `thorough(but=...)` that no item is: its clause would lose a check."""
    missing: dict[tuple[str, str], bool] = {}
    for item in items:
        for mark in item.iter_markers("thorough"):
            for usual in mark.kwargs.get("but", ()):
                key = item.nodeid.partition("[")[0], usual
                missing[key] = missing.get(key, True) and not _is_of(item, usual)
    for (check, usual), lost in missing.items():
        if lost:
            raise pytest.UsageError(f"{check}: thorough(but={usual!r}) is no variant of it")


def needs_the_machine(item: pytest.Item) -> bool:
    """Whether nothing may be judged beside the item."""
    return item.get_closest_marker("alone") is not None


def is_check(item: pytest.Item) -> bool:
    """Whether the item's body runs on the ranks of a world."""
    return item.get_closest_marker("world") is not None


def parametrize_world(metafunc: pytest.Metafunc) -> None:
    """Make one item of each world size that the mark names; the id shows it as w4."""
    mark = metafunc.definition.get_closest_marker("world")
    if mark is None or not mark.args:
        return
    if not all(isinstance(n, int) and n > 0 for n in mark.args):
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid}: world{mark.args}: sizes are whole numbers from 1 up"
        )
    metafunc.fixturenames.append(SIZE_PARAMETER)
    metafunc.parametrize(SIZE_PARAMETER, mark.args, ids=[f"w{n}" for n in mark.args])


def spec_of(item: pytest.Item, settings: Settings) -> WorldSpec:
    """The world that a check asks for; UsageError when its marks contradict the house."""
    mark = item.get_closest_marker("world")
    assert mark is not None
    known = {"backend", "collective", "limit", "nodes", "reuse"}
    if unknown := set(mark.kwargs) - known:
        raise pytest.UsageError(
            f"{item.nodeid}: world() has no {', '.join(sorted(unknown))}; it takes "
            + ", ".join(sorted(known))
        )
    for name in ("skip", "skipif", "xfail"):
        if item.get_closest_marker(name):
            raise pytest.UsageError(
                f"{item.nodeid}: a check takes no {name} mark: state what it needs with "
                "needs(), and known failures in suites/expectations"
            )
    params: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    spec = WorldSpec(
        size=params.get(SIZE_PARAMETER, settings.flexible_size),
        backend=mark.kwargs.get("backend") or settings.backend,
        device=settings.device,
        collective=mark.kwargs.get("collective") or settings.collective_limit,
        limit=mark.kwargs.get("limit") or settings.check_limit,
        reuse=bool(mark.kwargs.get("reuse", False)),
        nodes=int(mark.kwargs.get("nodes", 1)),
        share_gpus=settings.share_gpus,
    )
    if not 0 < spec.collective < spec.limit < settings.session_limit:
        raise pytest.UsageError(
            f"{item.nodeid}: the clocks must grow: collective {spec.collective} s < check "
            f"{spec.limit} s < session {settings.session_limit} s"
        )
    return spec


def level_of(item: pytest.Item) -> tuple[str, str]:
    """MUST, or SHOULD with its reason; UsageError for a mark that gives none."""
    mark = item.get_closest_marker("should")
    if mark is None:
        return "MUST", ""
    if len(mark.args) != 1 or mark.kwargs or not str(mark.args[0]).strip():
        raise pytest.UsageError(f"{item.nodeid}: should() needs its reason, one sentence")
    return "SHOULD", str(mark.args[0])


def unmet(item: pytest.Item, spec: WorldSpec | None, settings: Settings) -> str:
    """What this run cannot give the item, in words; empty when it can run."""
    if spec is not None:
        if settings.world_size is not None and spec.size > settings.world_size:
            return f"needs a world of {spec.size}; --world-size is {settings.world_size}"
        if spec.backend != settings.backend:
            return f"needs backend {spec.backend}; this run has {settings.backend}"
        if settings.torchrun is not None:
            if settings.shared_dir is None and "shared" in getattr(item, "fixturenames", ()):
                return "needs a folder that all nodes see: --shared-dir"
        elif settings.room is not None and spec.size > settings.room:
            return (
                f"needs {spec.size} GPUs; this machine has {settings.room} "
                "(--share-gpus lets ranks share them)"
            )
    for mark in item.iter_markers("needs"):
        for name in mark.args:
            if name.startswith(_PACKAGE):
                missing = _package(name.removeprefix(_PACKAGE))
            elif name in FEATURES:
                missing = FEATURES[name](settings)
            else:
                raise pytest.UsageError(
                    f"{item.nodeid}: needs({name!r}): expected one of {', '.join(FEATURES)}, or "
                    f"'{_PACKAGE}NAME'"
                )
            if missing:
                return f"needs {missing}"
    if (judged := item.get_closest_marker("judges")) and (
        missing := settings.known.missing(judged.args[0])
    ):
        return missing
    return settings.known.not_installable if item.get_closest_marker("exercises") else ""
