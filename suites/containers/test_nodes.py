"""Two nodes as two containers of one network: worlds that span them, and a node that goes away."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from docker import DockerClient
from docker.models.containers import Container

from containers import witness
from containers.engine import Project

pytestmark = [pytest.mark.needs("docker"), pytest.mark.timeout(900)]

UP = ("--profile", "multinode", "up", "--no-color")


def test_worlds_span_two_containers(project: Project) -> None:
    witness.place(project)
    done = project.compose(
        *(*UP, "--abort-on-container-exit", "--exit-code-from", "node0"),
        NODE_ARGUMENTS="-k TestBroadcastTensors",
    )
    assert done.exit == 0
    results = json.loads((project.out / "latest" / "results.json").read_text())
    assert [node["host"] for node in results["run"]["nodes"]] == ["node0", "node1"]
    of_four = [c for c in results["checks"] if c["world"] == 4]
    assert of_four
    for check in of_four:
        assert check["verdict"] in {"pass", "xfail"}
        assert [r["host"] for r in check["ranks"]] == ["node0", "node0", "node1", "node1"]
        assert [r["local_rank"] for r in check["ranks"]] == [0, 1, 0, 1]
    witness.assert_owner(project)
    project.assert_owns_its_results()


def lose(project: Project, client: DockerClient, how: Callable[[Container], None]) -> str:
    """Start a long run, take node1 away in its middle; all that node0 said."""
    started = project.compose(*UP, "--detach", NODE_ARGUMENTS="-k StateDict")
    assert started.exit == 0
    first, second = (client.containers.get(f"{project.name}-node{n}-1") for n in (0, 1))
    deadline = time.monotonic() + 240
    while b".." not in first.logs():  # some checks have been judged
        first.reload()
        assert first.status == "running", first.logs().decode()
        assert time.monotonic() < deadline, first.logs().decode()
        time.sleep(0.5)
    how(second)
    began = time.monotonic()
    state = first.wait(timeout=120)
    said = first.logs().decode(errors="replace")
    print(said)
    assert state["StatusCode"] == 3, said
    assert time.monotonic() - began < 60, said
    return said


def assert_named(project: Project, said: str) -> None:
    """What was judged before stands; the node is named, and nothing that did not run passes."""
    results = json.loads((project.out / "latest" / "results.json").read_text())
    *before, last = results["checks"]
    assert before
    assert {check["verdict"] for check in before} <= {"pass", "xfail"}
    assert last["verdict"] in {"error", "pass", "xfail"}
    if last["verdict"] == "error":
        assert "node 1 (node1) is lost" in last["message"]
    assert len(results["checks"]) < results["run"]["selected"]
    assert "selected checks did not run: node 1 (node1) is lost" in said


def test_a_killed_node_is_named(project: Project, client: DockerClient) -> None:
    said = lose(project, client, lambda node: node.kill())
    assert_named(project, said)


def test_a_node_that_is_cut_off_is_named(project: Project, client: DockerClient) -> None:
    def cut(node: Container) -> None:
        client.networks.get(f"{project.name}_default").disconnect(node, force=True)

    said = lose(project, client, cut)
    assert_named(project, said)
    assert "no sign of life for 1" in said
