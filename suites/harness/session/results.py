"""results.json: what a run leaves for machines; its schema is `report/results.schema.json`."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.records.verdicts import Judgement, Verdict
from harness.settings.options import Settings
from harness.settings.requirements import level_of
from harness.system import devices

SCHEMA_VERSION = 1
_REPEATED = {
    "device": "cpu",
    "backend": "gloo",
    "share_gpus": False,
    "install_at": "after",
    "callers": False,
    "world_size": None,
    "start_method": "fork",
    "seed": 0,
}
"""Options that a check's verdict may depend on, to the values that a command need not name."""


def environment(settings: Settings, root: Path) -> dict[str, Any]:
    """What the run ran with: enough to tell why another run may differ."""
    import torch

    return {
        "schema": SCHEMA_VERSION,
        "subject": settings.subject,
        "subject_version": settings.known.version,
        "subject_file": _relative(settings.known.file, root),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "nccl": _nccl(),
        "driver": _driver(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "backend": settings.backend,
        "device": settings.device,
        "world": settings.world_size,
        "start_method": settings.start_method,
        "callers": settings.callers,
        "order": settings.order,
        "jobs": settings.jobs,
        "seed": settings.seed,
        "limits": {
            "collective": settings.collective_limit,
            "check": settings.check_limit,
            "session": settings.session_limit,
        },
        "commit": commit_of(root),
        "packages": packages(),
        "command": command(settings, []),
    }


def packages() -> dict[str, str]:
    """Every distribution of the environment, with its version."""
    found = {d.name: d.version for d in importlib.metadata.distributions() if d.name}
    return dict(sorted(found.items(), key=lambda one: one[0].casefold()))


def inventory(collected: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(the ids of what was collected, a line each; how many there are, and their digest)."""
    text = "".join(f"{identity}\n" for identity in sorted(collected))
    return text, {"collected": len(collected), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def command(settings: Settings, more: list[str]) -> str:
    """The command that repeats this run, or with a node id one check of it."""
    words = shlex.split(os.environ.get("SHARDPROOF_COMMAND", "python -m pytest"))
    words += ["--certified"] if settings.certified and not more else []
    words += ["--subject", settings.subject]
    for name, default in _REPEATED.items():
        value = getattr(settings, name)
        if value != default:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return shlex.join(words + more)


def check(
    item: pytest.Item, judgement: Judgement, settings: Settings, expected: dict[str, str] | None
) -> dict[str, Any]:
    """One check for results.json."""
    judged, area, law = map(item.get_closest_marker, ("judges", "exercises", "law"))
    module, _, function = (judged.args[0] if judged else "").rpartition(".")
    if area and not judged:
        module, function = area.kwargs.get("suite", "integration"), area.args[0]
    level, reason = level_of(item)
    clause = (getattr(getattr(item, "function", None), "__doc__", None) or "").strip()
    return {
        "id": item.nodeid,
        "module": module,
        "function": function,
        "law": law.args[0] if law else "",
        "level": level,
        "level_reason": reason,
        "clause": " ".join(clause.split()),
        "verdict": str(judgement.verdict),
        "seconds": round(judgement.seconds, 4),
        "message": judgement.message,
        "world": getattr(item, "callspec", None) and item.callspec.params.get("_world_size"),  # type: ignore[attr-defined]
        "mesh": next((m for r in judgement.ranks if (m := r.extra.get("mesh", ""))), ""),
        "ranks": [r.as_json() for r in judgement.ranks],
        "expected": expected,
        "warnings": sorted({w for r in judgement.ranks for w in r.extra.get("warnings", ())}),
        "command": command(settings, [*judgement.repeat, item.nodeid]),
    }


def write(
    settings: Settings,
    run: dict[str, Any],
    checks: list[dict[str, Any]],
    started: float,
    ended: float,
) -> Path:
    """Write results.json in one step: who reads it sees the last whole one, never half of one."""
    run |= {
        "start": _time(started),
        "end": _time(ended),
        "counts": {v.value: sum(c["verdict"] == v for c in checks) for v in Verdict},
    }
    path = settings.run_dir / "results.json"
    step = settings.run_dir / f".results-{os.getpid()}.json"
    try:
        step.write_text(json.dumps({"run": run, "checks": checks}, indent=1) + "\n")
        step.replace(path)
    finally:
        step.unlink(missing_ok=True)
    return path


def point_latest_at(run_dir: Path) -> None:
    """Make out/latest a link to the run, in one step: two sessions may end at once."""
    step = run_dir.parent / f".latest-{os.getpid()}"
    step.unlink(missing_ok=True)
    step.symlink_to(run_dir.name)
    step.replace(run_dir.parent / "latest")


def _time(stamp: float) -> str:
    return datetime.datetime.fromtimestamp(stamp, datetime.UTC).isoformat(timespec="milliseconds")


def _relative(file: str, root: Path) -> str:
    path = Path(file)
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def commit_of(root: Path) -> str:
    """The commit of the suites, with -dirty where the tree differs; empty where nobody knows."""
    if given := os.environ.get("SHARDPROOF_COMMIT"):  # an image has the source, not its history
        return given
    words = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return git(root, *words, limit=10) or ""


def git(root: Path, *words: str, limit: float | None = None) -> str | None:
    """What git says; None where there is no git, no history, or no answer within the limit."""
    try:
        done = subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, timeout=limit, check=True
        )
    except (FileNotFoundError, subprocess.SubprocessError):
        return None
    return done.stdout.rstrip("\n")


def _nccl() -> str | None:
    import torch

    if torch.version.cuda is None or not devices.count("cuda"):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().partition("\n")[0] if path.exists() else None
