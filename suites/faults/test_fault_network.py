"""The rows of the table of faults in which a node is: its network is cut, or loses packets."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import network, nodes
from faults.network import ADDRESSES, EIGHTH, NAMES, Network
from faults.nodes import NodeProcess
from faults.sessions import CASES
from faults.table import CELLS, NODE, PHASES
from harness.system import processes
from report.read import read

PORT = 29400
IN_NODES = [cell for cell in CELLS if cell.where == NODE]
pytestmark = pytest.mark.thorough


@pytest.fixture
def cable(tmp_path: Path) -> Iterator[Network]:
    if why := network.why_not(tmp_path):
        pytest.skip(why)
    made = Network(tmp_path)
    yield made
    made.close()


@contextlib.contextmanager
def started(
    cable: Network, folder: Path, phase: str, *arguments: str
) -> Iterator[list[NodeProcess]]:
    """Both nodes, ended whatever happens."""
    shutil.copy(CASES / "table_node.py", folder / "test_it.py")
    (folder / "tmp").mkdir()
    env = {"GLOO_SOCKET_IFNAME": "cable", "FAULT_PHASE": phase, "TMPDIR": str(folder / "tmp")}
    pair = [
        NodeProcess(
            folder / "test_it.py",
            PORT,
            2,
            *("--world-size", "2", *arguments),
            prefix=cable.prefix(node),
            env=env,
            hosts=(NAMES[0], ADDRESSES[node]),
        )
        for node in range(2)
    ]
    try:
        yield pair
    finally:
        for node in pair:
            node.end()


def wait_for(file: Path, pair: list[NodeProcess]) -> None:
    deadline = time.monotonic() + nodes.LIMIT
    while not file.exists():
        assert time.monotonic() < deadline, pair[0].text + pair[1].text
        time.sleep(0.05)


def assert_nothing_is_left(pair: list[NodeProcess], families: list[list[int]], tmp: Path) -> None:
    for node, family in zip(pair, families, strict=True):
        alive = [pid for pid in family if processes.state(pid) not in {"", "Z"}]
        assert alive == [], (node.text, [processes.command(pid) for pid in alive])
    assert [p for p in tmp.iterdir() if not p.name.startswith("torchinductor_")] == []  # a cache


def test_a_network_that_loses_packets(cable: Network, tmp_path: Path) -> None:
    """In all phases at once: what is lost is sent again, and no verdict differs."""
    cable.drop(*EIGHTH)
    with started(cable, tmp_path, "") as pair:
        families = [node.family() for node in pair]
        assert [node.finish() for node in pair] == [0, 0], pair[0].text + pair[1].text
        assert [c["verdict"] for c in read(pair[0].run_dir)["checks"]] == ["pass"] * 3
        assert_nothing_is_left(pair, families, tmp_path / "tmp")


def test_a_network_that_is_cut_from_the_beginning(cable: Network, tmp_path: Path) -> None:
    cable.drop()
    with started(cable, tmp_path, "", "--join-limit", "10") as pair:
        families = [node.family() for node in pair]
        assert [node.finish() for node in pair] == [3, 3]
        assert "not all 2 nodes came to node-a:29400 within 10 s" in pair[0].text
        assert "node-a:29400" in pair[1].text.splitlines()[-1], pair[1].text
        assert_nothing_is_left(pair, families, tmp_path / "tmp")


def test_a_rendezvous_whose_port_is_taken(cable: Network, tmp_path: Path) -> None:
    taker = subprocess.Popen([*cable.prefix(0), sys.executable, "-m", "http.server", str(PORT)])
    try:
        with started(cable, tmp_path, "", "--join-limit", "5") as pair:
            families = [node.family() for node in pair]
            assert [node.finish() for node in pair] == [3, 3]
            for node in pair:
                assert "no rendezvous at node-a:29400" in node.text, node.text
            assert_nothing_is_left(pair, families, tmp_path / "tmp")
    finally:
        taker.kill()
        taker.wait()


@pytest.mark.parametrize("phase", [p for p in PHASES if p != "start"])
def test_a_network_that_is_cut(phase: str, cable: Network, tmp_path: Path) -> None:
    (cell,) = (c for c in IN_NODES if (c.kind, c.phase) == ("network cut", phase))
    with started(cable, tmp_path, phase) as pair:
        wait_for(tmp_path / "waiting", pair)
        families = [node.family() for node in pair]
        began = time.monotonic()
        cable.drop()
        assert pair[0].finish() == 3, pair[0].text
        assert time.monotonic() - began < cell.within + 5, pair[0].text
        assert pair[1].finish() == 3, pair[1].text
        checks = read(pair[0].run_dir)["checks"]
        assert [c["verdict"] for c in checks] == ["pass", cell.verdict]
        assert cell.said in checks[1]["message"], checks[1]["message"]
        assert "rank 1 on node 1 (node-b)" in checks[1]["message"]
        assert_nothing_is_left(pair, families, tmp_path / "tmp")
