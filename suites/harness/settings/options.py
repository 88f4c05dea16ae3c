"""The command line of a run, checked once, before anything starts.

A wrong value is a `pytest.UsageError`: one line that names the value and what was expected, exit 2.
"""

from __future__ import annotations

import os
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.settings import subject_import, subjects
from harness.system import devices, torchrun_env
from harness.system.torchrun_env import TorchrunEnv

DEFAULT_SUBJECT = "torch.distributed"
DEFAULT_WORLD_SIZE = 4

COLLECTIVE_LIMIT = 10.0
CHECK_LIMIT = 30.0
SESSION_LIMIT = 3600.0
START_LIMIT = {"fork": 30.0, "spawn": 120.0}
GRACE = 2.0
"""Seconds that ranks have to answer once one of them has failed."""


SETTINGS: pytest.StashKey[Settings] = pytest.StashKey()


@dataclass(frozen=True)
class Settings:
    """What every part of the harness may ask of the run."""

    subject: str
    known: subject_import.SubjectInfo
    """What the subject's import has shown."""
    backend: str
    device: str
    world_size: int | None
    """As asked for on the command line: the largest world of the run; None sets no bound."""
    start_method: str
    order: str
    seed: int
    collective_limit: float
    check_limit: float
    session_limit: float
    run_dir: Path
    expectations: Path
    update_expectations: bool
    torchrun: TorchrunEnv | None
    """Where torchrun has put this process; None: one machine, no torchrun."""
    shared_dir: Path | None
    install_at: str = "after"
    """When the subject is put under torch, see `harness.settings.subjects.MOMENTS`."""
    callers: bool = False
    """Whether the subject takes the place of torch's callers of the set, too."""
    share_gpus: bool = False
    """Whether ranks of NCCL share the GPUs where these are fewer."""
    jobs: int = 1
    """How many checks are judged at a time."""
    certified: bool = False
    """Whether nothing may be left out or excused."""

    @property
    def room(self) -> int | None:
        """The most ranks that this machine's devices take of one world; None: no bound."""
        if self.backend != "nccl" or self.share_gpus:
            return None
        return devices.count(self.device)

    @property
    def flexible_size(self) -> int:
        """The size of worlds whose mark names none."""
        return self.world_size or DEFAULT_WORLD_SIZE


def add_options(parser: pytest.Parser) -> None:
    """The options of the group `worlds and verdicts`, for --help."""
    group = parser.getgroup("shardproof", "worlds and verdicts")
    add = group.addoption
    add(
        "--subject",
        metavar="ROOT",
        default=DEFAULT_SUBJECT,
        help="import root of the implementation to judge (default: %(default)s)",
    )
    add(
        "--install-at",
        choices=tuple(subjects.MOMENTS),
        default="after",
        help="when a subject that installs itself does so: before what uses torch.distributed is "
        "imported, after it, or at both moments (default: %(default)s)",
    )
    add(
        "--callers",
        action="store_true",
        help="integration: install the subject with callers=True, in the place of torch's code "
        "around the set, too",
    )
    add("--backend", metavar="NAME", help="process-group backend (default: the device's own)")
    add(
        "--device",
        metavar="TYPE",
        default="cpu",
        help="device type that checks put their tensors on (default: %(default)s)",
    )
    add(
        "--share-gpus",
        action="store_true",
        help="NCCL: let ranks share GPUs where there are fewer than ranks. Each passes for a "
        "machine of its own (NCCL_HOSTID): bytes travel over the network, and calls are slow",
    )
    add(
        "--world-size",
        metavar="N",
        type=int,
        help="largest world to start; checks that need a larger one are reported as "
        f"precondition, checks of any size take N ranks (default: no bound, {DEFAULT_WORLD_SIZE})",
    )
    add(
        "--start-method",
        choices=("fork", "spawn"),
        default="fork",
        help="how ranks start: forked from this process, or as new interpreters "
        "(default: %(default)s)",
    )
    add(
        "--jobs",
        metavar="N",
        help="checks to judge side by side, each in its own world; 1: one at a time (default: "
        "three for two cores, and at most one for each 2 GiB of memory)",
    )
    add(
        "--no-warm-up",
        action="store_true",
        help="fork ranks without importing ahead what they may need: for a few checks that need "
        "little of torch",
    )
    add(
        "--thorough",
        action="store_true",
        help="also the checks that are marked thorough: more variants of a clause that the others "
        "judge, too dear where a subject hangs in each",
    )
    add(
        "--certified",
        action="store_true",
        help="judge all there is, thorough variants included, without expectations, and refuse "
        "what would leave any of it out; say in the results whether every MUST holds",
    )
    add(
        "--order",
        metavar="ORDER",
        default="normal",
        help="normal, reverse or random:SEED (default: %(default)s)",
    )
    add(
        "--seed",
        metavar="N",
        default="0",
        help="seed of generated data, a number or 'random' (default: %(default)s)",
    )
    for name, seconds, what in (
        ("--collective-limit", COLLECTIVE_LIMIT, "one collective"),
        ("--check-limit", CHECK_LIMIT, "one check"),
        ("--session-limit", SESSION_LIMIT, "the whole run"),
    ):
        said = f"seconds for {what} (default: %(default)s)"
        add(name, metavar="S", type=float, default=seconds, help=said)
    add(
        "--shared-dir",
        metavar="DIR",
        help="folder that all nodes of a run under torchrun see, for checks that write checkpoints",
    )
    add("--run-dir", metavar="DIR", help="folder for the results (default: out/<date>-<pid>)")
    add(
        "--expectations",
        metavar="DIR",
        help="folder of <subject>.toml files (default: suites/expectations)",
    )
    add(
        "--update-expectations",
        action="store_true",
        help="write an entry, its reason left empty, for each cause of checks that failed "
        "unexpectedly; until it has its reason, runs of these checks are refused",
    )


_AS_GIVEN = (
    *("subject", "world_size", "start_method", "collective_limit", "check_limit", "session_limit"),
    *("update_expectations", "install_at", "callers", "share_gpus", "certified"),
)
"""Options that are settings as they stand on the command line."""


def read_settings(config: pytest.Config) -> Settings:
    """The run's settings; raises UsageError for the first value that cannot hold."""
    # Ask the driver's management library, not the runtime: the parent must hold no CUDA context.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    option = config.option
    known = _subject(option.subject)
    device = _device(option.device)
    backend = _backend(option.backend, device)
    here = torchrun_env.of(os.environ)
    if option.share_gpus and backend != "nccl":
        raise pytest.UsageError(
            f"--share-gpus: expected --backend nccl; over {backend} ranks share devices as it is"
        )
    if here is None:
        _world_size(option.world_size, backend, device, option.share_gpus)
    if option.install_at != "after":
        _install_at(option.install_at, known, option.start_method)
    if option.callers and (why := known.replaces_no_callers):
        raise pytest.UsageError(f"--callers: {why}")
    order, seed = _order(option.order), _seed(option.seed)
    clocks = (option.collective_limit, option.check_limit, option.session_limit)
    if not 0 < clocks[0] < clocks[1] < clocks[2]:
        raise pytest.UsageError(
            "the clocks must be positive and grow: --collective-limit {} < --check-limit {} "
            "< --session-limit {}".format(*clocks)
        )
    run_dir = option.run_dir or config.rootpath / "out" / (
        time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}"
    )
    expectations = option.expectations or config.rootpath / "suites" / "expectations"
    return Settings(
        **{name: getattr(option, name) for name in _AS_GIVEN},
        known=known,
        backend=backend,
        device=device,
        order=order,
        seed=seed,
        run_dir=Path(run_dir).absolute(),
        expectations=Path(expectations).absolute(),
        torchrun=here,
        shared_dir=_shared_dir(option.shared_dir, here),
        jobs=_jobs(option.jobs, backend, here),
    )


def _subject(root: str) -> subject_import.SubjectInfo:
    if os.sep in root or root.startswith((".", "~")) or root.endswith(".py"):
        raise pytest.UsageError(
            f"--subject {root}: expected an import root, not a path: a dotted name such as "
            "my.fork, from .venv or a folder on PYTHONPATH"
        )
    if not all(part.isidentifier() for part in root.split(".")):
        raise pytest.UsageError(
            f"--subject {root!r} is not an import root: expected a dotted name such as my.fork"
        )
    known = subject_import.look(root)
    if known.error:
        raise pytest.UsageError(
            f"--subject {root}: cannot be imported ({known.error}). "
            "Install it into .venv, or put its folder on PYTHONPATH"
        )
    if known.is_no_subject:
        raise pytest.UsageError(
            f"--subject {root}: has none of the modules {', '.join(subjects.MODULES)}. "
            f"Expected the import root that holds them, as {subjects.INSTALLED_TORCH} does"
        )
    return known


def _install_at(moment: str, known: subject_import.SubjectInfo, start_method: str) -> None:
    if why := known.not_installable or subjects.needs_no_install(known.root):
        raise pytest.UsageError(f"--install-at {moment}: {why}")
    if start_method != "fork":
        raise pytest.UsageError(
            f"--install-at {moment}: a rank that starts as a new interpreter has imported torch's "
            "modules before the subject is known: expected --start-method fork"
        )


def _device(name: str) -> str:
    import torch

    if name == "cpu":
        return name
    try:
        kind = torch.device(name)
    except RuntimeError as error:
        raise pytest.UsageError(
            f"--device {name!r} is not a device type that torch knows"
        ) from error
    if kind.index is not None:
        raise pytest.UsageError(f"--device {name}: give a type such as {kind.type}, not one device")
    if not devices.count(kind.type):
        raise pytest.UsageError(
            f"--device {name}: torch {torch.__version__} sees no such device here"
        )
    return name


def _backend(name: str | None, device: str) -> str:
    import torch.distributed as dist

    if not dist.is_available():
        raise pytest.UsageError("this torch is built without torch.distributed: nothing to judge")
    chosen = name or str(dist.get_default_backend_for_device(device))
    if not dist.is_backend_available(chosen):
        known = [
            b
            for b in dist.Backend.backend_list
            if b != "undefined" and dist.is_backend_available(b)
        ]
        raise pytest.UsageError(
            f"--backend {chosen}: this torch build lacks it; it has {', '.join(sorted(known))}"
        )
    return chosen


def _world_size(size: int | None, backend: str, device: str, share: bool) -> None:
    if size is None:
        return
    if size < 1:
        raise pytest.UsageError(f"--world-size {size}: expected a number from 1 up")
    if backend == "nccl" and not share and size > (available := devices.count(device)):
        raise pytest.UsageError(
            f"--world-size {size}: NCCL needs a GPU a rank, and this machine has {available}; "
            "--share-gpus lets ranks share them"
        )


def _shared_dir(name: str | None, here: TorchrunEnv | None) -> Path | None:
    if name is None:
        return None
    if here is None:
        raise pytest.UsageError("--shared-dir is for runs under torchrun; one machine needs none")
    if not (folder := Path(name).absolute()).is_dir():
        raise pytest.UsageError(f"--shared-dir {name}: expected a folder that exists on each node")
    return folder


def _order(text: str) -> str:
    if text not in {"normal", "reverse"} and not re.fullmatch(r"random:\d+", text):
        raise pytest.UsageError(f"--order {text!r}: expected normal, reverse or random:SEED")
    return text


def _jobs(text: str | None, backend: str, here: TorchrunEnv | None) -> int:
    one = ""
    if here is not None:
        one = "a run over several machines judges one check at a time"
    elif backend == "nccl":
        one = "worlds over NCCL take the GPUs for themselves"
    if text is None:
        # Three for two cores: a third of a run's time worlds wait, for ranks that hang or are late.
        cores = len(os.sched_getaffinity(0))
        return 1 if one else max(1, min(cores * 3 // 2, _memory() >> 31))
    if not text.isdecimal() or int(text) < 1:
        raise pytest.UsageError(f"--jobs {text!r}: expected a number from 1 up")
    if one and int(text) > 1:
        raise pytest.UsageError(f"--jobs {text}: expected 1, for {one}")
    return int(text)


def _memory() -> int:
    """Bytes that new processes can have."""
    text = Path("/proc/meminfo").read_text()
    return int(text.partition("MemAvailable:")[2].split()[0]) << 10


def _seed(text: str) -> int:
    if text == "random":
        return random.SystemRandom().randrange(2**32)
    if not text.isdecimal():
        raise pytest.UsageError(f"--seed {text!r}: expected a number or 'random'")
    return int(text)


def arrange(items: list[pytest.Item], order: str) -> None:
    """Put the items into the order asked for, in place; what judges the run comes last."""
    if order == "reverse":
        items.reverse()
    elif order.startswith("random:"):
        random.Random(int(order.partition(":")[2])).shuffle(items)
    items.sort(key=lambda item: item.get_closest_marker("warns_of_nothing") is not None)
