"""What the container tests share: the image, built once a session, and a project in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from docker import DockerClient

from containers import engine
from containers.engine import Project


@pytest.fixture(scope="session")
def image() -> str:
    """The image of the working tree."""
    engine.build()
    return engine.IMAGE


@pytest.fixture
def project(image: str, tmp_path: Path) -> Iterator[Project]:
    """A compose project whose results belong to an arbitrary user."""
    made = Project(tmp_path / "project")
    yield made
    made.down()


@pytest.fixture
def client() -> Iterator[DockerClient]:
    """The engine itself."""
    made = docker.from_env(timeout=60)
    yield made
    made.close()
