"""What comes from strangers: a subject's code stays out of the process that judges it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.sessions import Outcome, Session

Suite = Callable[..., Path]

CHECKS = """
import os, pathlib, pytest, re
@pytest.mark.judges("_state_dict_utils._flatten_state_dict")
@pytest.mark.world(2)
class TestFlatten:
    def test_it(self, judged): assert judged({"a": 1}) == 2
    def test_that_it_is_there(self, subject): assert subject.module().__name__ == "stranger"
@pytest.mark.judges("_state_dict_utils._gather_state_dict")
@pytest.mark.world(1)
def test_a_function_that_it_lacks(judged): pass
@pytest.mark.judges("tensor.parallel.ddp._pre_dp_module_transform")
@pytest.mark.world(1)
def test_a_module_that_it_lacks(judged): pass
"""


def judge(folder: Path, source: str, *arguments: str) -> Outcome:
    package = folder / "stranger"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '7'\n" + source)
    (package / "_state_dict_utils.py").write_text("def _flatten_state_dict(tree): return 2\n")
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[1])])
    return Session(folder, "--subject", "stranger", *arguments, env={"PYTHONPATH": path}).finish()


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_subject_never_runs_in_the_process_that_judges_it(suite: Suite, jobs: str) -> None:
    folder = suite(CHECKS)
    note = f"import os, sys\nopen({str(folder / 'pids')!r}, 'a').write(f'{{os.getpid()}} ')\n"
    spoil = "import harness.parent.blame\nharness.parent.blame.judge = None\n"
    thread = "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True)"
    outcome = judge(folder, note + spoil + thread + ".start()\n", "--jobs", jobs)
    assert outcome.exit == 0, outcome.output
    assert list(outcome.verdicts().values()) == ["pass", "pass", "precondition", "precondition"]
    lacks = outcome.check("test_a_function_that_it_lacks")["message"]
    assert lacks == "stranger._state_dict_utils has no _gather_state_dict"
    lacks = outcome.check("test_a_module_that_it_lacks")["message"]
    assert lacks == "stranger has no module tensor.parallel.ddp"
    run = outcome.results["run"]
    assert (run["subject_version"], Path(run["subject_file"]).name) == ("7", "__init__.py")
    pids = (folder / "pids").read_text().split()
    assert len(pids) == len(set(pids)) == 1 + 2 * 2  # the child that looked, and each rank


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            "process with signal SIGSEGV",
        ),
        ("import os; os._exit(0)", "its import ended the process with exit code 0"),
        ("import sys; sys.exit(0)", "its import ended the process with exit code 0"),
        ("import nosuchmodule", "ModuleNotFoundError: No module named 'nosuchmodule'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_an_import_that_fails_is_wrong_usage(suite: Suite, source: str, said: str) -> None:
    outcome = judge(suite(CHECKS), source + "\n")
    assert outcome.exit == 2
    assert "--subject stranger: cannot be imported (" in outcome.output
    assert said in outcome.output
    assert outcome.survivors == []


def test_an_import_that_fails_on_a_rank_alone_is_told(suite: Suite) -> None:
    outcome = judge(suite(CHECKS), "import os\nassert 'RANK' not in os.environ, 'not on ranks'\n")
    check = outcome.check("test_it")
    assert check["verdict"] == "error"
    assert "stranger cannot be imported on this rank, as it could before" in check["message"]
    assert "not on ranks" in check["message"]
    assert outcome.exit == 3


def test_torchs_modules_are_imported_in_an_order_that_works(suite: Suite) -> None:
    """One of them imports another that imports it: no run may begin with the wrong one."""
    folder = suite(
        "import pytest\n"
        "def test_of_no_world(): pass\n"
        "@pytest.mark.judges('tensor.parallel.fsdp._get_box')\n"
        "@pytest.mark.world(1)\n"
        "def test_it(judged): pass\n"
    )
    outcome = Session(folder, "--subject", "torch.distributed").finish()
    assert set(outcome.verdicts().values()) == {"pass"}, outcome.output
    assert outcome.exit == 0


def test_ranks_of_one_machine_listen_on_loopback_alone(suite: Suite) -> None:
    folder = suite(
        "import os, pathlib, pytest\n"
        "import torch, torch.distributed as dist\n"
        "@pytest.mark.world(2)\n"
        "def test_it(rank):\n"
        "    dist.all_reduce(torch.ones(1))\n"
        "    here = pathlib.Path('/proc/self')\n"
        "    mine = [os.readlink(f) for f in (here / 'fd').iterdir() if os.path.exists(f)]\n"
        "    rows = [r.split() for t in ('tcp', 'tcp6')\n"
        "            for r in (here / 'net' / t).read_text().splitlines()[1:]]\n"
        "    found = {r[1].partition(':')[0] for r in rows\n"
        "             if r[3] == '0A' and f'socket:[{r[9]}]' in mine}\n"
        "    assert found == {'0100007F'}\n"
        # The machine's own name may stand for loopback, too; elsewhere it does not.
        "    assert os.environ['GLOO_SOCKET_IFNAME'] == 'lo'\n"
    )
    outcome = Session(folder).finish()
    assert outcome.exit == 0, outcome.output


def test_a_subject_that_replaces_no_callers(suite: Suite) -> None:
    outcome = judge(suite(CHECKS), "", "--callers")
    assert outcome.exit == 2
    assert "--callers: stranger has no module checkpoint.state_dict" in outcome.output
