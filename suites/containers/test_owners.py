"""Whoever owns ./out: the commands of docs/containers.md leave the results to that user."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker import DockerClient
from docker.errors import ContainerError

from containers import witness
from containers.engine import FEW, REVISION, ROOT, Outcome, Project

pytestmark = [pytest.mark.needs("docker"), pytest.mark.timeout(900)]


@pytest.fixture(params=[(0, 0), (1000, 1000), (4321, 4322)], ids=["root", "1000", "4321"])
def owned(image: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Project]:
    """A project of this owner, with a witness in its containers."""
    made = Project(tmp_path / "project", *request.param)
    witness.place(made)
    yield made
    made.down()


def as_the_page_says(project: Project, service: str, *arguments: str) -> Outcome:
    """The command for this service that stands on the page, with these arguments after it."""
    (line,) = re.findall(
        rf"^docker (compose .* {service})$", (ROOT / "docs/containers.md").read_text(), re.M
    )
    return project.compose(*shlex.split(line)[1:], *arguments)


def test_results_belong_to_the_owner_of_the_folder(owned: Project) -> None:
    done = as_the_page_says(owned, "tests-cpu", "-k", FEW)
    assert done.exit == 0
    assert "moved exact data" in done.output, "the preflight comes first"
    results = done.results()
    run, checks = results["run"], results["checks"]
    assert run["selected"] == len(checks) > 0
    assert all(FEW in check["id"] for check in checks)
    assert {check["verdict"] for check in checks} <= {"pass", "xfail"}
    assert run["commit"] == REVISION
    assert run["command"].startswith("docker compose run --rm tests-cpu --subject")
    assert (owned.out / "latest" / "junit.xml").exists()
    witness.assert_owner(owned)
    owned.assert_owns_its_results()


def test_on_gpus_likewise(owned: Project) -> None:
    done = as_the_page_says(owned, "tests", "-k", FEW)
    assert f"user {owned.user} writes it" in done.output
    assert "preflight: not fit for a run: torch, GPUs" in done.output, "the only thing missing"
    assert done.exit == 3
    witness.assert_owner(owned)
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
