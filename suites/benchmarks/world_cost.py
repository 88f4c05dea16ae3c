"""What a check costs: this harness against torch's own two, one machine, one run.

It runs the same trivial case of 4 ranks, a 2-D mesh and a gathered DTensor, in interleaved rounds
under each harness, and prints the median seconds a case and the ratios. Then it runs such cases
side by side, as --jobs does, and prints what one more of them costs. Exit 1 when a fresh world
costs more than --limit.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

from harness.system import pipes

SUITES = Path(__file__).parents[1]

BODY = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

def body():
    mesh = DeviceMesh("cpu", torch.arange(4).reshape(2, 2), mesh_dim_names=("dp", "tp"))
    full = torch.arange(16.0).reshape(4, 4)
    row, column = mesh.get_coordinate()
    mine = full.chunk(2, 0)[row].chunk(2, 1)[column].contiguous()
    got = DTensor.from_local(mine, mesh, [Shard(0), Shard(1)]).full_tensor()
    assert torch.equal(got, full)
"""

FRESH = """
import pytest
from body import body

@pytest.mark.world(4)
@pytest.mark.parametrize("n", range({cases}))
def test_case(n):
    body()
"""

MULTI_PROCESS = """
import torch.distributed as dist
from torch.testing._internal.common_distributed import MultiProcessTestCase
from body import body

class TestCases(MultiProcessTestCase):
    world_size = 4
    def setUp(self):
        super().setUp()
        self._spawn_processes()
    def _case(self):
        dist.init_process_group(
            "gloo", store=dist.FileStore(self.file_name, 4), rank=self.rank, world_size=4
        )
        body()
        dist.destroy_process_group()

for n in range({cases}):
    setattr(TestCases, f"test_case_{{n}}", lambda self: self._case())
"""

CONTINUOUS = """
from torch.testing._internal.common_distributed import MultiProcContinuousTest
from body import body

class TestCases(MultiProcContinuousTest):
    world_size = 4
    @classmethod
    def backend_str(cls):
        return "gloo"
    @classmethod
    def device_type(cls):
        return "cpu"

for n in range({cases}):
    setattr(TestCases, f"test_case_{{n}}", lambda self: body())
"""

HARNESSES = {
    "shardproof, a fresh world a check": (FRESH, 8),
    "MultiProcessTestCase, fresh ranks a case": (MULTI_PROCESS, 2),
    "MultiProcContinuousTest, ranks shared by a class": (CONTINUOUS, 8),
}


SIDE_BY_SIDE = (1, 4, 8)
FEW, MANY = 8, 40
"""Cases of the two runs whose difference is what a case costs without the start of the session."""


TAKEN = ("seconds", "cpu", "started", "faulted")
"""What a world takes: see the last line that is printed."""


def main() -> int:
    """Measure, print the tables, hold the fresh world to its limit."""
    parser = argparse.ArgumentParser(prog="ci/world-cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--limit", type=float, default=0.25, metavar="S")
    options = parser.parse_args()
    cases: dict[str, list[float]] = defaultdict(list)
    totals: dict[str, list[float]] = defaultdict(list)
    for number in range(options.rounds):
        for name, (source, count) in HARNESSES.items():
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            seconds = measure(source.format(cases=count), fresh=source is FRESH)
            if len(seconds) != count:
                print(f"{name}: {len(seconds)} of {count} cases were measured", file=sys.stderr)
                return 3
            cases[name] += seconds
            totals[name].append(sum(seconds) / count)
    ours = next(iter(HARNESSES))
    fresh = statistics.median(cases[ours])
    print(f"\n{os.cpu_count()} cores, 4 Gloo ranks, {options.rounds} rounds, seconds")
    print(f"{'':<50}{'median case':>12}{'mean case':>12}{'ratio of means':>16}")
    base = statistics.median(totals[ours])
    for name, seconds in cases.items():
        mean = statistics.median(totals[name])
        print(f"{name:<50}{statistics.median(seconds):>12.3f}{mean:>12.3f}{mean / base:>15.1f}x")
    print("(the first case of a MultiProcContinuousTest class starts its ranks: see the mean)")
    tell_side_by_side(options.rounds)
    if fresh > options.limit:
        print(f"a fresh world costs {fresh:.3f} s, more than {options.limit} s", file=sys.stderr)
        return 1
    return 0


def tell_side_by_side(rounds: int) -> None:
    """Print what one more world costs where so many run at once, medians of the rounds."""
    found: dict[int, list[list[float]]] = defaultdict(list)
    for number in range(rounds):
        for jobs in SIDE_BY_SIDE:
            print(f"round {number + 1} of {rounds}: {jobs} at once", file=sys.stderr, flush=True)
            few, many = (_taken(cases, jobs) for cases in (FEW, MANY))
            found[jobs].append([(b - a) / (MANY - FEW) for a, b in zip(few, many, strict=True)])
    names = "".join(f"{name:>12}" for name in TAKEN)
    print(f"\n{'worlds at once':<16}{names}  a world")
    for jobs, costs in found.items():
        medians = map(statistics.median, zip(*costs, strict=True))
        print(f"{jobs:<16}" + "".join(f"{value:>12.3f}" for value in medians))
    print("(CPU seconds; processes and threads that the machine started; MiB that were faulted in)")


def _taken(cases: int, jobs: int) -> list[float]:
    """What a run of so many cases takes, in the order of TAKEN."""
    before = _counters()
    seconds = measure(FRESH.format(cases=cases), fresh=True, jobs=jobs)
    if len(seconds) != cases:
        raise RuntimeError(f"{len(seconds)} of {cases} cases were measured")
    return [now - then for then, now in zip(before, _counters(), strict=True)]


def _counters() -> tuple[float, ...]:
    """TAKEN until now: by the children of this process; processes by the whole machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    (started,) = re.findall(r"(?m)^processes (\d+)", Path("/proc/stat").read_text())
    faulted = used.ru_minflt * resource.getpagesize() / 2**20
    return time.monotonic(), used.ru_utime + used.ru_stime, int(started), faulted


def measure(source: str, *, fresh: bool, jobs: int = 1) -> list[float]:
    """Seconds of each case: set-up, call and tear-down, as its harness counts them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "body.py").write_text(BODY)
        (folder / "test_it.py").write_text(source)
        environment = {**os.environ, "PYTHONPATH": f"{folder}:{SUITES}", "OMP_NUM_THREADS": "1"}
        command = ["pytest", "-p", "no:timeout"]
        if fresh:
            command = ["harness", "-p", "harness.session.plugin", f"--jobs={jobs}"]
            command.append(f"--run-dir={folder / 'run'}")
        times = folder / "times.xml"
        command += [f"--rootdir={folder}", "-q", f"--junitxml={times}", "test_it.py"]
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if done.returncode:
            print(done.stdout[-4000:], done.stderr[-2000:], file=sys.stderr)
            return []
        # pytest counts the ranks' start with set-up or with the first case.
        found = ElementTree.parse(times).iter("testcase")
        return [float(case.attrib["time"]) for case in found]


if __name__ == "__main__":
    sys.exit(pipes.run(main))
