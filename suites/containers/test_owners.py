"""Whoever owns ./out: README's commands run as that user, and leave the results to them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docker import DockerClient
from docker.errors import ContainerError

from containers.engine import FEW, ROOT, Outcome, Project

pytestmark = [pytest.mark.needs("docker"), pytest.mark.timeout(900)]

# Python imports it wherever it starts: of every process of the container, as whom it runs.
WITNESS = """
import json, os
seen = {}
for number in filter(str.isdecimal, os.listdir("/proc")):
    try:
        with open(f"/proc/{number}/status") as status:
            seen[number] = dict(line.rstrip().split(":\\t", 1) for line in status if ":\\t" in line)
    except OSError:
        pass  # it has ended
with open(f"/app/out/witness-{os.getpid()}", "w") as out:
    json.dump(seen, out)
"""

# compose takes it beside compose.yaml: no GPU is asked of the engine, and a group is a device's.
OVERRIDE = """
services:
  tests: &witnessed
    deploy: !reset {}
    group_add: ["44"]
    volumes: ["./witness:/subject:ro"]
  tests-cpu: *witnessed
"""

NUMBERS = "Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"


@pytest.fixture(params=[(0, 0), (1000, 1000), (4321, 4322)], ids=["root", "1000", "4321"])
def owned(image: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Project]:
    """A project of this owner, with a witness in its containers."""
    made = Project(tmp_path / "project", *request.param)
    (made.folder / "compose.override.yaml").write_text(OVERRIDE)
    witness = made.folder / "witness"
    witness.mkdir()
    (witness / "sitecustomize.py").write_text(WITNESS)
    yield made
    made.down()


def as_the_readme_says(project: Project, service: str, *arguments: str) -> Outcome:
    """The command for this service that stands in README, with these arguments after it."""
    (line,) = re.findall(
        rf"^docker (compose .* {service})$", (ROOT / "README.md").read_text(), re.M
    )
    return project.compose(*shlex.split(line)[1:], *arguments)


def assert_runs_as_its_owner(project: Project) -> None:
    """Every process but the engine's init, in every moment that was witnessed."""
    owner, group = project.owner, project.group
    wanted = ["\t".join([str(owner)] * 4), "\t".join([str(group)] * 4), "44", *["0" * 16] * 5, "1"]
    names = set()
    for path in project.out.glob("witness-*"):
        processes: dict[str, dict[str, Any]] = json.loads(path.read_text())
        assert processes.pop("1")["Name"] == "docker-init"
        for process in processes.values():
            names.add(process["Name"])
            found = [process[number].strip() for number in NUMBERS]
            assert found == wanted, f"{process['Name']}: {dict(zip(NUMBERS, found, strict=True))}"
    assert {"bash", "python"} <= names, "the entrypoint and the preflight at least"


def test_results_belong_to_the_owner_of_the_folder(owned: Project) -> None:
    done = as_the_readme_says(owned, "tests-cpu", "-k", FEW)
    assert done.exit == 0
    assert done.results()["run"]["selected"] > 0
    assert_runs_as_its_owner(owned)
    owned.assert_owns_its_results()


def test_on_gpus_likewise(owned: Project) -> None:
    done = as_the_readme_says(owned, "tests", "-k", FEW)
    assert f"user {owned.user} writes it" in done.output
    assert "preflight: not fit for a run: torch, GPUs" in done.output, "the only thing missing"
    assert done.exit == 3
    assert_runs_as_its_owner(owned)
    owned.assert_owns_its_results()


def test_a_named_user_is_that_user_from_the_start(project: Project) -> None:
    ask = "id -u; id -g; grep -h CapEff /proc/[0-9]*/status | sort -u"
    done = project.run("shell-cpu", "-c", ask, RUN_AS="1000:1001")
    assert done.output.split()[-4:] == ["1000", "1001", "CapEff:", "0" * 16]


def test_a_named_user_who_does_not_own_the_folder_is_told(project: Project) -> None:
    done = project.run("tests-cpu", "-k", FEW, RUN_AS="1000:1000")
    assert done.exit == 3
    assert "user 1000:1000 cannot write it" in done.output
    assert f"it belongs to {project.user}" in done.output
    assert (
        f"docker compose run without RUN_AS, docker run with --user {project.user}" in done.output
    )
    assert done.left_nothing()


def test_what_is_root_s_can_be_opened_by_name(project: Project) -> None:
    """The engine's pipes behind /dev/stdout and /dev/stderr."""
    done = project.run("shell-cpu", "-c", "id -u > /dev/stdout; echo by name > /dev/stderr")
    assert done.exit == 0
    assert done.output.split()[-3:] == [str(project.owner), "by", "name"]


def test_root_that_may_not_become_the_owner_is_told(
    project: Project, client: DockerClient, image: str
) -> None:
    with pytest.raises(ContainerError) as caught:
        client.containers.run(
            *(image, ["ci/conformance", "-k", FEW]),
            user="0:0",
            cap_drop=["ALL"],
            volumes={str(project.out): {"bind": "/app/out", "mode": "rw"}},
            remove=True,
            stderr=True,
        )
    assert caught.value.exit_status == 3
    assert f"/app/out belongs to {project.user}" in str(caught.value)
    assert f"start the container as --user {project.user}" in str(caught.value)
    assert not list(project.out.iterdir())
