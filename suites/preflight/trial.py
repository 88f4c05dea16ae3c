"""A world on this machine, started as a run's are: the harness on `preflight/worlds.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from preflight.findings import Finding, Need, failed, ok

ROOT = Path(__file__).parents[2]
CHECKS = Path(__file__).with_name("worlds.py")
COLLECTIVE_LIMIT, CHECK_LIMIT, LIMIT = 60, 120, 300
"""Seconds. NCCL's first communicator on 8 GPUs takes tens of them."""


def world(need: Need) -> Finding:
    """The backend starts a world, and its ranks move exact data."""
    part = "world"
    with tempfile.TemporaryDirectory(prefix="preflight-") as folder:
        run = Path(folder, "run")
        command = [
            *(sys.executable, "-m", "harness", str(CHECKS)),
            *("--device", need.device, "--backend", need.backend),
            *("--world-size", str(need.ranks), "--run-dir", str(run)),
            *("--collective-limit", str(COLLECTIVE_LIMIT), "--check-limit", str(CHECK_LIMIT)),
            *(("--share-gpus",) if need.share_gpus else ()),
            *("--expectations", folder, "--no-warm-up", "-q", "--tb=no", "-p", "no:cacheprovider"),
        ]
        # The user's own options are for the run, not for this.
        env = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return failed(part, f"{_named(need)}: no answer within {LIMIT} s", _change(need))
        path = run / "results.json"
        if not path.exists():
            tail = done.stdout.strip().splitlines()[-15:]
            return failed(
                part,
                f"{_named(need)}: the harness ended with {done.returncode}\n" + "\n".join(tail),
                _change(need),
            )
        return judge(need, done.returncode, json.loads(path.read_text()))


def judge(need: Need, status: int, results: dict[str, Any]) -> Finding:
    """The finding that a run's results stand for: only two passes are well."""
    checks = results["checks"]
    bad = [c for c in checks if c["verdict"] != "pass"]
    if not bad and status == 0 and len(checks) == 2:
        seconds = sum(c["seconds"] for c in checks)
        return ok("world", f"{_named(need)} moved exact data, {seconds:.1f} s")
    lines = [f"{_named(need)}: ended with {status}, {len(checks)} of 2 checks ran"]
    for check in bad:
        lines.append(f"{check['verdict']}: {check['message']}")
        lines += [f"rank {r['rank']} {r['fate']}: {r['message']}" for r in check["ranks"]]
    return failed("world", "\n".join(line[:400] for line in lines), _change(need))


def _named(need: Need) -> str:
    return f"{need.ranks} ranks, {need.backend} on {need.device}"


def _change(need: Need) -> str:
    if need.backend == "nccl":
        return (
            "NCCL_DEBUG=INFO ci/conformance --device cuda --backend nccl suites/preflight/worlds.py"
            " leaves NCCL's own account in the logs of its run"
        )
    return (
        "see that the host's name stands for an interface that the ranks share; "
        "GLOO_SOCKET_IFNAME=lo takes the loopback interface"
    )
