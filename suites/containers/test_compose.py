"""compose.yaml, as compose reads it: what every service must have, and must not."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from containers.engine import ROOT, build_environment

pytestmark = pytest.mark.needs("docker")


def composition(**env: str) -> dict[str, Any]:
    done = subprocess.run(
        ["docker", "compose", "--profile", "*", "config", "--format", "json"],
        cwd=ROOT,
        env={**build_environment(), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = composition()["services"]
    return found


def test_the_services_are_those_of_the_readme() -> None:
    names = set(services())
    assert {"tests", "tests-cpu", "bench", "preflight", "shell"} <= names


def test_no_service_has_more_rights_than_it_needs() -> None:
    for name, service in services().items():
        assert not service.get("privileged"), name
        for namespace in ("ipc", "pid", "network_mode", "userns_mode"):
            assert namespace not in service, f"{name}: {namespace}"
        assert service["read_only"] is True, name
        assert service["init"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["user"] == "0:0", f"{name}: root, until it knows the owner of ./out"
        assert int(service["shm_size"]) >= 1 << 30, name
        assert set(service["cap_add"]) == {
            *("SETUID", "SETGID", "SETPCAP", "KILL"),
            *(["SYS_PTRACE"] if name.startswith("shell") else []),
        }, name


def test_who_names_a_user_starts_no_root() -> None:
    named = composition(RUN_AS="4321:4322")["services"]
    assert {service["user"] for service in named.values()} == {"4321:4322"}


def test_no_service_reaches_the_network_outside() -> None:
    networks = composition()["networks"]
    assert all(network["internal"] for network in networks.values())
    for name, service in services().items():
        assert set(service["networks"]) <= set(networks), name


def test_gpus_are_asked_for_where_they_are_used_and_nowhere_else() -> None:
    for name, service in services().items():
        devices = (
            service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices")
        )
        if name.endswith("-cpu") or name.startswith("node"):
            assert not devices, name
        else:
            assert devices, name
            assert devices[0]["capabilities"] == ["gpu"], name
            assert devices[0]["driver"] == "nvidia", name


def test_every_command_is_there() -> None:
    for name, service in services().items():
        words = service["entrypoint"]
        if words[0] == "/app/docker/until-gone":  # the node that follows; its command comes after
            words = words[2:]
        entry, program = words[:2]
        assert entry == "/app/docker/entrypoint", name
        if program.startswith("ci/"):
            assert (ROOT / program).exists(), f"{name}: {program}"
