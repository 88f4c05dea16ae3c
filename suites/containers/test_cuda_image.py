"""An image built with CUDA, started where there is no GPU: its versions, and its verdict on that.

    SHARDPROOF_CUDA_IMAGE=shardproof ci/test suites/containers/test_cuda_image.py

No engine here needs a GPU; with GPUs `docker compose run tests` is the test.
"""

from __future__ import annotations

import json
import os
import re

import pytest
from docker import DockerClient
from docker.errors import ContainerError

from containers.engine import FEW, ROOT

pytestmark = [pytest.mark.needs("docker", "cuda image"), pytest.mark.timeout(900)]

ASK = """
import json, torch
from importlib.metadata import version
import torch.distributed as dist
major = torch.version.cuda.partition(".")[0]
print("SAID " + json.dumps({
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    "nccl package": version(f"nvidia-nccl-cu{major}"),
    "backends": [dist.is_nccl_available(), dist.is_gloo_available()],
}))
"""


def run(client: DockerClient, *command: str) -> str:
    """What the image says to this command, started as compose does."""
    told: bytes = client.containers.run(
        os.environ["SHARDPROOF_CUDA_IMAGE"],
        list(command),
        init=True,
        remove=True,
        read_only=True,
        cap_drop=["ALL"],
        shm_size="2g",
        tmpfs={"/tmp": "exec,mode=1777", "/app/out": "mode=1777"},
        stdout=True,
        stderr=True,
    )
    return told.decode(errors="replace")


def test_its_versions(client: DockerClient) -> None:
    text = run(client, ".venv/bin/python", "-c", ASK)
    found = json.loads(re.findall(r"^SAID (.*)$", text, re.MULTILINE)[0])
    (pinned,) = re.findall(r'^ *"torch==([^"]+)",', (ROOT / "pyproject.toml").read_text(), re.M)
    assert found["torch"].partition("+")[0] == pinned
    assert int(found["cuda"].partition(".")[0]) >= 12
    assert found["nccl"] == found["nccl package"], "torch loads the NCCL of its own wheels"
    assert found["backends"] == [True, True]


def test_without_gpus_it_is_not_fit(client: DockerClient) -> None:
    with pytest.raises(ContainerError) as caught:
        run(client, "ci/conformance", "--device", "cuda", "--backend", "nccl", "-k", FEW)
    assert caught.value.exit_status == 3
    assert "preflight: not fit for a run: torch, GPUs" in str(caught.value)


def test_on_the_cpu_it_judges(client: DockerClient) -> None:
    text = run(client, "ci/conformance", "-k", FEW)
    assert "moved exact data" in text
    assert re.search(r"torch\.distributed .*: \d+ pass, \d+ xfail", text), text
