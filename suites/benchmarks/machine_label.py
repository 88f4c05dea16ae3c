"""The machine and the settings of a measurement, for the head of a table."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from benchmarks.settings import Settings
from harness.system import devices


def machine_label(settings: Settings) -> str:
    """The machine, torch and the settings, for a table's head."""
    import torch

    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    device = (
        f"{os.cpu_count()} cores" if settings.device == "cpu" else devices.name(settings.device)
    )
    small = ", small models (--quick)" if settings.quick else ""
    return f"{device}, {cpu}, torch {torch.__version__}, {settings.where()}{small}"
