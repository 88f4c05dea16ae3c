"""What the driver and torch say of the GPUs: there, free, and able to reach each other."""

from __future__ import annotations

import csv
import os
import subprocess
from typing import NamedTuple

from preflight.findings import Finding, Need, failed, mebibytes, ok, warning

FREE_SHARE = 0.95
"""Of a GPU's memory; the driver itself holds a few percent at most."""


class Gpu(NamedTuple):
    """One GPU, as nvidia-smi shows it; bytes."""

    number: str
    uuid: str
    name: str
    total: int
    used: int
    mode: str


def nvidia_smi(*arguments: str) -> str:
    """What nvidia-smi prints; an OSError where there is none, or it answers with a failure."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except FileNotFoundError as error:
        raise OSError("there is no nvidia-smi here: no driver, or none for containers") from error
    except subprocess.TimeoutExpired as error:
        raise OSError("nvidia-smi did not answer within 60 s") from error
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise OSError(f"nvidia-smi ended with {done.returncode}: {said[-1] if said else ''}")
    return done.stdout


def listed() -> list[Gpu]:
    """Every GPU that the driver shows here, and CUDA_VISIBLE_DEVICES does not hide."""
    text = nvidia_smi(
        "--query-gpu=index,uuid,name,memory.total,memory.used,compute_mode",
        "--format=csv,noheader,nounits",
    )
    rows = csv.reader(text.splitlines(), skipinitialspace=True)
    there = [Gpu(r[0], r[1], r[2], int(r[3]) << 20, int(r[4]) << 20, r[5]) for r in rows if r]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return there
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    return [g for g in there if any(n == g.number or g.uuid.startswith(n) for n in names)]


def torch_sees(need: Need) -> Finding:
    """This torch can use the device and the backend of the run, and enough GPUs for its ranks."""
    facts = need.torch
    if "error" in facts:
        return failed("torch", facts["error"], "mend the environment: python -c 'import torch'")
    seen = f"{facts['version']}, CUDA {facts['cuda']}, NCCL {facts['nccl']}"
    if need.backend not in facts["backends"]:
        return failed(
            "torch",
            f"{seen}: built without the backend {need.backend}; it has "
            + ", ".join(facts["backends"]),
            "choose one of these with --backend, or another build of torch with TORCH",
        )
    if not need.gpus:
        return ok("torch", seen)
    if facts["cuda"] is None:
        return failed(
            "torch",
            f"{seen}: built without CUDA",
            "name a build of torch with CUDA in TORCH, or run with --device cpu",
        )
    count = len(facts["gpus"])
    if count == 0:
        return failed("torch", f"{seen}: sees no GPU", _why_none(facts["cuda"]))
    if need.backend == "nccl" and count < need.ranks and not need.share_gpus:
        return failed(
            "torch",
            f"{seen}: sees {count} GPUs, {need.ranks} needed, for NCCL takes a GPU a rank",
            f"give the container more GPUs, or run with --world-size {count} or --share-gpus",
        )
    if need.backend == "nccl" and count == 1 and not need.share_gpus:
        return warning(
            "torch",
            f"{seen}: sees 1 GPU: checks of larger worlds will be preconditions, not run",
            "give the run 2 GPUs or more, or let ranks share this one with --share-gpus",
        )
    return ok("torch", f"{seen}, {count} GPUs")


def _why_none(cuda: str) -> str:
    try:
        there = listed()
    except OSError:
        return (
            "install NVIDIA's driver and container toolkit on the host, and ask for GPUs: "
            "compose's service tests does, docker run needs --gpus all"
        )
    if not there:
        return (
            "the driver shows none, or CUDA_VISIBLE_DEVICES hides all: see nvidia-smi on the host"
        )
    return f"the driver shows {len(there)} GPUs, so it is older than CUDA {cuda} needs: renew it"


def driver(need: Need) -> Finding:
    """GPUs that nobody else computes on."""
    if not need.gpus:
        return ok("GPUs", "not used by this run")
    try:
        there = listed()
    except OSError as error:
        return failed(
            "GPUs",
            str(error),
            "ask for GPUs (compose's service tests, docker run --gpus all); "
            "NVIDIA_DRIVER_CAPABILITIES must hold utility",
        )
    refusing = [g.number for g in there if g.mode == "Prohibited"]
    if refusing:
        return failed(
            "GPUs",
            f"compute mode Prohibited on {', '.join(refusing)}",
            "nvidia-smi --compute-mode=DEFAULT on the host",
        )
    busy = [g for g in there if g.used > g.total * (1 - FREE_SHARE)]
    if busy:
        return failed(
            "GPUs",
            "in use: "
            + ", ".join(f"{g.number} ({mebibytes(g.used)} of {mebibytes(g.total)})" for g in busy),
            "end what runs there (nvidia-smi on the host names it; a container that was removed "
            "may have left processes), or choose free ones with CUDA_VISIBLE_DEVICES=0,1",
        )
    return ok("GPUs", f"{len(there)} free: " + ", ".join(sorted({g.name for g in there})))


def peers(need: Need) -> Finding:
    """GPUs that read each other's memory directly; else NCCL goes through shared memory."""
    reach = need.torch.get("peers", [])
    if not need.gpus or len(reach) < 2:
        return ok("peer access", "one GPU or none: not needed")
    missing = [f"{i}-{j}" for i in range(len(reach)) for j in range(i) if j not in reach[i]]
    if missing:
        return warning(
            "peer access",
            f"none between {', '.join(missing)}: NCCL goes through shared memory there",
            "verdicts hold, times are not those of NVLink; ACS and IOMMU settings of the host, or "
            "its virtual machine, prevent it",
        )
    return ok("peer access", "between all pairs")
