"""The command: `ci/preflight [--device TYPE] [--backend NAME] [--world-size N]`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.system import pipes
from preflight import facts, gpus, machine, trial
from preflight.findings import Finding, Grade, Need

PARTS: tuple[Callable[[Need], Finding], ...] = (
    gpus.torch_sees,
    gpus.driver,
    gpus.peers,
    machine.shared_memory,
    machine.locked_memory,
    machine.open_files,
    machine.loopback,
    machine.hostname,
    machine.clock,
    machine.results_folder,
)
DEFAULT_RANKS = 4
PROBE_LIMIT = 120


def main(arguments: list[str]) -> int:
    """Ask, print, and say 0 (fit), 2 (wrong usage) or 3 (not fit)."""
    options = _options(arguments)
    torch = _probe()
    need = _need(options, torch)
    print(f"environment, for {need.backend} on {need.device}")
    for name, value in facts.facts(torch):
        print(f"  {name:<14} {value}".replace("\n", "\n    "))
    print("preflight", flush=True)
    findings = [_show(part(need)) for part in PARTS]
    if any(f.grade is Grade.FAILED for f in findings):
        print("  world          not started: what failed above comes first")
    else:
        findings.append(_show(trial.world(need)))
    bad = [f.part for f in findings if f.grade is Grade.FAILED]
    if bad:
        print(f"preflight: not fit for a run: {', '.join(bad)}", file=sys.stderr)
        return 3
    return 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ci/preflight",
        description="Is this machine fit for a run? Ends with 0: yes; 2: wrong usage; 3: no, and "
        "each line says what to change.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--device", metavar="TYPE", default="cpu", help="default: %(default)s")
    add("--backend", metavar="NAME", help="default: the device's own")
    add(
        "--world-size",
        type=int,
        metavar="N",
        help=f"ranks of the trial world (default: {DEFAULT_RANKS}, for NCCL every GPU)",
    )
    add("--share-gpus", action="store_true", help="NCCL: ranks of the trial world may share GPUs")
    add("--out", type=Path, default=trial.ROOT / "out", help="results folder (default: out)")
    add(
        "--for",
        dest="command",
        nargs=argparse.REMAINDER,
        help="ask for this command: takes its --device, --backend, --world-size and --share-gpus",
    )
    options = parser.parse_args(arguments)
    if options.command:
        # The command has options of its own; its other words are not for this parser.
        options, _ = parser.parse_known_args(options.command[1:], options)
    if options.world_size is not None and options.world_size < 1:
        parser.error(f"--world-size {options.world_size}: expected a number from 1 up")
    return options


def _need(options: argparse.Namespace, torch: dict[str, Any]) -> Need:
    known = torch.get("default_backend", {})
    backend = options.backend or known.get(options.device, "gloo")
    alone = backend == "nccl" and not options.share_gpus
    ranks = options.world_size or (max(1, len(torch.get("gpus", []))) if alone else DEFAULT_RANKS)
    folder = options.out.absolute()
    return Need(options.device, backend, ranks, folder, torch, options.share_gpus)


def _probe() -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "preflight.probe"],
            capture_output=True,
            text=True,
            timeout=PROBE_LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"torch did not say within {PROBE_LIMIT} s what it sees"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"ended with {done.returncode}"]
        return {"error": f"torch could not be asked what it sees: {last[0]}"}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _show(finding: Finding) -> Finding:
    seen = finding.seen.replace("\n", "\n" + " " * 25)
    print(f"  {finding.grade:<8} {finding.part:<13} {seen}", flush=True)
    if finding.change:
        print(f"{'':<25}-> {finding.change}", flush=True)
    return finding


if __name__ == "__main__":
    sys.exit(pipes.run(lambda: main(sys.argv[1:])))
