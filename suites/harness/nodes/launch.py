"""Start this machine's part of a run over several: torchrun with the house's exit codes.

    ci/conformance --nnodes 2 --nproc-per-node 4 --rendezvous node0   # the same on each node

Plain torchrun does as well (`torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d
--rdzv-endpoint node0 -m harness ...`), but ends with 1 whatever went wrong.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

from harness.system import pipes, processes, torchrun_env

PORT = 29400
JOIN_LIMIT = 300
_JOIN_GRACE = 30.0
"""Seconds that torch's agent has, beyond the limit, to say itself that a node is missing."""
_PROBES, _PROBE = 3, 4.0
"""How often a rendezvous may not answer, and the seconds that it has each time."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m harness` on this node; the run's exit code, the same on every node."""
    options, rest = _parser().parse_known_args(arguments)
    # Slow to import, and --help needs none of it.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    endpoint = options.rendezvous if ":" in options.rendezvous else f"{options.rendezvous}:{PORT}"
    # What went wrong is in the results, or in the lines below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[torchrun_env.RENDEZVOUS_PORT] = endpoint.rpartition(":")[2]
    logs = tempfile.mkdtemp(prefix="shardproof-launch-")  # torch would leave its own behind
    config = LaunchConfig(
        min_nodes=options.nnodes,
        max_nodes=options.nnodes,
        nproc_per_node=options.nproc_per_node,
        run_id="shardproof",
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        rdzv_configs={
            "join_timeout": options.join_limit,
            "last_call_timeout": 1,
            "read_timeout": 15,
        },
        max_restarts=0,
        monitor_interval=0.2,
        local_addr=options.local_address,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
    )
    print(f"waiting for {options.nnodes} nodes at {endpoint}", file=sys.stderr, flush=True)
    watched = (endpoint, options.join_limit, logs)
    threading.Thread(target=_leave_when_cut_off, args=watched, daemon=True).start()
    try:
        elastic_launch(config, sys.executable)("-m", "harness", *rest)
    except ChildFailedError as error:
        code = next((f.exitcode for r, f in error.failures.items() if f.local_rank == 0), 3)
        return code if code in {1, 2, 3} else 3
    except RendezvousTimeoutError:
        return _fail(
            f"not all {options.nnodes} nodes came to {endpoint} within {options.join_limit} s: "
            "start the same command on each of them, or raise --join-limit"
        )
    except RendezvousError as error:
        return _fail(
            f"no rendezvous at {endpoint} ({error}): --rendezvous names a node of the run that "
            "the others reach, and that has started"
        )
    except SignalException as error:
        return _fail(f"ended by {error.sigval.name}")
    finally:
        shutil.rmtree(logs, ignore_errors=True)
    return 0


def _leave_when_cut_off(endpoint: str, join_limit: float, logs: str) -> None:
    """End this agent where torch's would wait for minutes and say nothing.

    That is before its workers have begun, for a store that is another program, and after they have
    ended, for one that is cut off the network.
    """
    host, _, port = endpoint.rpartition(":")
    deadline = time.monotonic() + join_limit + _JOIN_GRACE
    began, silent, why = False, 0, ""
    while not why:
        time.sleep(_PROBE)
        # A worker that has ended is a zombie as long as the agent waits.
        working = any(processes.state(p) != "Z" for p in processes.children(os.getpid()))
        began = began or working
        if not began:
            if time.monotonic() > deadline:
                why = f"no rendezvous at {endpoint}: what listens there is not a node of this run"
            continue
        silent = 0 if working or _answers(host, int(port)) else silent + 1
        if silent == _PROBES:
            why = f"cut off from {endpoint}, which does not answer"
    shutil.rmtree(logs, ignore_errors=True)
    os._exit(_fail(why))


def _answers(host: str, port: int) -> bool:
    """Whether a machine answers, with a refusal even: an agent that has ended is no cut."""
    try:
        socket.create_connection((host, port), timeout=_PROBE).close()
    except TimeoutError:
        return False
    except OSError as error:
        return error.errno not in {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN}
    return True


def _fail(message: str) -> int:
    print(f"harness.nodes.launch: {message}", file=sys.stderr)
    return 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ci/conformance", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--nnodes", type=int, required=True, metavar="N", help="machines of the run")
    add(
        "--nproc-per-node",
        type=int,
        default=4,
        metavar="K",
        help="the most ranks that each machine gives to a world (default: %(default)s)",
    )
    add(
        "--rendezvous",
        default=f"localhost:{PORT}",
        metavar="HOST[:PORT]",
        help="one of the machines, the same for all (default: %(default)s)",
    )
    add(
        "--join-limit",
        type=int,
        default=JOIN_LIMIT,
        metavar="S",
        help="seconds to wait for all machines (default: %(default)s)",
    )
    add(
        "--local-address", metavar="NAME", help="this machine's name for the others, if not its own"
    )
    return parser


if __name__ == "__main__":
    sys.exit(pipes.run(main))
