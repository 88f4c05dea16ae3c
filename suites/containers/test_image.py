"""The image: whom it runs as, what it may write, and a machine that is not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from docker import DockerClient
from docker.errors import ContainerError

from containers.engine import FEW, REVISION, ROOT, Project

pytestmark = [pytest.mark.needs("docker"), pytest.mark.timeout(1800)]

ASK = """
import errno, json, os, subprocess
said = {"user": [os.getuid(), os.getgid()], "written": []}
for folder in ("/", "/app", "/app/suites", "/app/.venv", "/etc", "/subject", "/tmp", "/app/out"):
    try:
        open(os.path.join(folder, "probe"), "w").close()
        said["written"].append(folder)
    except OSError as error:
        assert error.errno in (errno.EROFS, errno.EACCES), error
done = subprocess.run(["ci/setup"], capture_output=True, text=True)
said["setup"] = [done.returncode, done.stdout + done.stderr]
with open("/proc/self/status") as status:
    said["capabilities"] = [line.split()[1] for line in status if line.startswith("CapEff")]
print("SAID " + json.dumps(said))
"""


def said(output: str) -> dict[str, Any]:
    (line,) = [part for part in output.splitlines() if part.startswith("SAID ")]
    found: dict[str, Any] = json.loads(line.removeprefix("SAID "))
    return found


def test_a_service_writes_its_results_and_nothing_else(project: Project) -> None:
    python = ".venv/bin/python"
    done = project.run(
        "tests-cpu", "-c", ASK, options=("--entrypoint", f"/app/docker/entrypoint /app/{python}")
    )
    assert done.exit == 0
    found = said(done.output)
    assert found["written"] == ["/tmp", "/app/out"]
    assert found["user"] == [project.owner, project.group]
    assert found["setup"] == [0, ""], "nothing is left to be set up"
    assert found["capabilities"] == ["0" * 16]


def test_the_image_says_what_it_is(image: str, client: DockerClient) -> None:
    config = client.images.get(image).attrs["Config"]
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["/app/docker/entrypoint"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == "shardproof"
    assert labels["org.opencontainers.image.revision"] == REVISION
    assert labels["org.opencontainers.image.base.name"]


def test_the_image_holds_what_the_source_holds(image: str, client: DockerClient) -> None:
    command = ["bash", "-c", "find . -path ./.venv -prune -o -type f -print | sort"]
    listed = client.containers.run(image, command, remove=True).decode().split()
    inside = {Path(name) for name in listed if "__pycache__" not in name}
    for name in (
        "pyproject.toml",
        "ci/conformance",
        "suites/harness/parent/world.py",
        "docker/probe",
    ):
        assert Path(name) in inside
    allowed = ("ci", "docker", "reference", "suites")
    top = {"pyproject.toml", "README.md", "LICENSE", "asv.conf.json", ".venv.lock"}
    for path in inside:
        assert path.parts[0] in allowed or str(path) in top, f"{path} has no place in the image"


def test_without_compose_small_shared_memory_is_named(
    image: str, client: DockerClient, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o777)
    out.chmod(0o777)
    with pytest.raises(ContainerError) as caught:
        client.containers.run(
            image,
            ["ci/conformance", "-k", FEW],
            init=True,
            remove=True,
            shm_size="16m",
            volumes={str(out): {"bind": "/app/out", "mode": "rw"}},
            stdout=True,
            stderr=True,
        )
    assert caught.value.exit_status == 3
    assert "not fit for a run: /dev/shm" in str(caught.value)
    assert not list(out.iterdir())


def test_every_file_of_the_dockerfile_is_there() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name in ("pyproject.toml", "ci", "docker", "reference", "suites"):
        assert f"!{name}" in ignored
        assert (ROOT / name).exists()
