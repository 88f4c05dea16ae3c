"""Runs over several nodes: worlds that span them; nodes that die, stop, differ or never come."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import nodes
from faults.nodes import NodeProcess
from harness.system import processes

SPANNING = """
import os, pytest, time, torch
import torch.distributed as dist

@pytest.mark.world(1, 2, 3, 4)
def test_sum(world, rank):
    '''The ranks of all nodes add up.'''
    total = torch.tensor([rank])
    dist.all_reduce(total)
    assert total.item() == sum(range(world.size))
    assert os.environ["LOCAL_RANK"] == str(rank - rank // 2 * 2 if world.size == 4 else 0) or (
        world.size == 3
    )
    world.post("node", str(world.node))
    dist.barrier()
    assert world.read("node", world.size - 1) == str(min(world.size - 1, 1))

@pytest.mark.world(4, nodes=2)
def test_the_other_nodes_rank_fails(rank):
    '''A rank of the second node is wrong.'''
    dist.barrier()
    assert rank != 3

@pytest.mark.world(4, nodes=2, collective=3)
def test_the_other_nodes_rank_sleeps(rank):
    '''A rank of the second node never comes.'''
    dist.barrier()
    if rank == 3:
        time.sleep(1000)
    dist.all_reduce(torch.ones(4, 3))

@pytest.mark.world(4, nodes=2, collective=3)
def test_the_other_nodes_rank_is_late(rank):
    '''A rank of the second node comes too late; the clocks of the nodes need not agree.'''
    dist.barrier()
    if rank == 3:
        time.sleep(4.5)
    dist.all_reduce(torch.ones(4, 3))

@pytest.mark.world(2, nodes=3)
def test_three_nodes():
    '''More nodes than there are.'''

@pytest.mark.world(8)
def test_eight():
    '''More ranks than there is room for.'''
"""

WAITING = """
import os, pathlib, pytest, time
import torch.distributed as dist

@pytest.mark.world(2)
@pytest.mark.parametrize("n", range(3))
def test_it(rank, n):
    '''Waits in the second check.'''
    dist.barrier()
    if n == 1:
        pathlib.Path(__file__).with_name(f"waiting-{rank}").touch()
        time.sleep(25)
"""


def verdicts(results: dict[str, Any]) -> dict[str, str]:
    return {c["id"].rpartition("::")[2]: c["verdict"] for c in results["checks"]}


def test_worlds_span_the_nodes(suite: Callable[..., Path]) -> None:
    first, other = nodes.run(suite(SPANNING))
    assert first.finish() == other.finish() == 1, first.text + other.text
    assert other.results is None
    results = first.results
    assert results is not None, first.text
    assert verdicts(results) == {
        "test_sum[w1]": "pass",
        "test_sum[w2]": "pass",
        "test_sum[w3]": "pass",
        "test_sum[w4]": "pass",
        "test_the_other_nodes_rank_fails[w4]": "fail",
        "test_the_other_nodes_rank_sleeps[w4]": "timeout",
        "test_the_other_nodes_rank_is_late[w4]": "timeout",
        "test_three_nodes[w2]": "precondition",
        "test_eight[w8]": "precondition",
    }
    by_name = {c["id"].rpartition("::")[2]: c for c in results["checks"]}
    places = [(r["node"], r["local_rank"]) for r in by_name["test_sum[w4]"]["ranks"]]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [n["node"] for n in results["run"]["nodes"]] == [0, 1]
    message = by_name["test_the_other_nodes_rank_fails[w4]"]["message"]
    assert message.startswith("rank 3 on node 1 ("), message
    message = by_name["test_the_other_nodes_rank_sleeps[w4]"]["message"]
    assert message.startswith("rank 3 on node 1 ("), message
    call = "all_reduce #2 of group (0, 1, 2, 3), float32 (4, 3)"
    assert f"; never issued {call}, which ranks 0, 1 and 2 wait in; it is in " in message
    message = by_name["test_the_other_nodes_rank_is_late[w4]"]["message"]
    assert message.startswith("rank 3 on node 1 ("), message
    assert f": issued {call} only 4." in message
    assert "needs a world over 3 nodes" in by_name["test_three_nodes[w2]"]["message"]
    assert "--nproc-per-node is 2" in by_name["test_eight[w8]"]["message"]


def lose_a_node(folder: Path, number: signal.Signals) -> tuple[dict[str, Any], str, int, float]:
    """Signal the second node in the second check: (results, output, exit code, seconds)."""
    port = nodes.free_port()
    pair = [NodeProcess(folder, port, 2) for _ in range(2)]
    deadline = time.monotonic() + nodes.LIMIT
    while not all((folder / f"waiting-{r}").exists() for r in range(2)):
        assert time.monotonic() < deadline, pair[0].text + pair[1].text
        time.sleep(0.05)
    first, other = nodes.first_of(pair)
    began = time.monotonic()
    gone = other.signal_all(number)
    try:
        code = first.finish()
        seconds = time.monotonic() - began
    finally:
        for pid in gone:
            processes.signal_quietly(pid, signal.SIGKILL)
    other.finish()
    assert first.results is not None, first.text
    assert not [pid for pid in first.family() if processes.state(pid) not in {"", "Z"}]
    return first.results, first.text, code, seconds


def assert_lost(results: dict[str, Any], output: str, code: int) -> None:
    """The node is named, nothing passes that did not run, and the run ends as the environment's."""
    assert code == 3, output
    assert verdicts(results) == {"test_it[w2-0]": "pass", "test_it[w2-1]": "error"}, output
    assert "rank 1 on node 1" in results["checks"][1]["message"]
    assert "is lost" in results["checks"][1]["message"]
    assert "1 of 3 selected checks did not run: node 1" in output


def test_a_node_that_dies_is_named(suite: Callable[..., Path]) -> None:
    results, output, code, seconds = lose_a_node(suite(WAITING), signal.SIGKILL)
    assert_lost(results, output, code)
    assert "its connection closed" in results["checks"][1]["message"]
    assert seconds < 10, output


def test_a_node_that_stops_is_named(suite: Callable[..., Path]) -> None:
    """As one that is cut off the network: its connections stand, and nothing comes."""
    results, output, code, seconds = lose_a_node(suite(WAITING), signal.SIGSTOP)
    assert_lost(results, output, code)
    assert "no sign of life for 1" in results["checks"][1]["message"]
    assert seconds < 25, output


def test_another_version_is_named(suite: Callable[..., Path], tmp_path: Path) -> None:
    folder = suite(SPANNING)
    twin = tmp_path / "twin"
    twin.mkdir()
    shutil.copy(folder / "test_it.py", twin)
    with (twin / "test_it.py").open("a") as file:
        file.write("\n@pytest.mark.world(2)\ndef test_more():\n    '''More.'''\n")
    port = nodes.free_port()
    pair = [NodeProcess(f, port, 2) for f in (folder / "test_it.py", twin / "test_it.py")]
    assert [n.finish() for n in pair] == [3, 3]
    first = next(n for n in pair if "the nodes differ" in n.text)
    assert "node 1 (" in first.text
    assert "has checks " in first.text


def test_a_node_that_never_comes(suite: Callable[..., Path]) -> None:
    node = NodeProcess(suite(SPANNING), nodes.free_port(), 2, "--join-limit", "3")
    assert node.finish() == 3
    assert "not all 2 nodes came" in node.text
    assert "within 3 s" in node.text
