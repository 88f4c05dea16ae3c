"""What a user types, `docker compose run`, and what comes back: verdicts, files, exit codes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from docker import DockerClient

from containers import forks
from containers.engine import FEW, Project

pytestmark = [pytest.mark.needs("docker"), pytest.mark.timeout(1800)]


def test_a_mounted_fork_is_judged_and_its_failure_is_the_exit_code(
    project: Project, tmp_path: Path
) -> None:
    folder = forks.source(tmp_path / "fork", "their_fork")
    selection = "TestGetSubmoduleNParams or TestUpdateModuleParam"
    done = project.run(
        *("tests-cpu", "--subject", "their_fork", "-k", selection),
        options=("--volume", f"{folder}:/subject:ro"),
    )
    assert done.exit == 1
    results = done.results()
    assert results["run"]["subject"] == "their_fork"
    assert results["run"]["subject_version"] == "1.2.3+fork"
    assert results["run"]["exit"] == 1
    broken = [c for c in results["checks"] if c["function"] == "_get_submodule_n_params"]
    assert broken
    assert all("the fork is broken here" in json.dumps(c) for c in broken)
    assert any(c["verdict"] == "pass" for c in results["checks"])
    assert "the fork is broken here" in done.output


def test_a_fork_in_a_wheel_is_judged(project: Project, tmp_path: Path) -> None:
    folder = forks.wheel(tmp_path, "wheel_fork")
    done = project.run(
        *("tests-cpu", "--subject", "wheel_fork", "--collect-only", "-k", FEW),
        options=("--volume", f"{folder}:/subject:ro"),
    )
    assert done.exit == 0
    assert "test_update_module_param.py" in done.output


def test_wrong_usage_is_named(project: Project) -> None:
    done = project.run("tests-cpu", "--subject", "no.such.fork", "--collect-only")
    assert done.exit == 2
    assert "--subject no.such.fork: cannot be imported" in done.output


def test_a_run_that_is_stopped_leaves_what_was_done(project: Project, client: DockerClient) -> None:
    name = f"{project.name}-stopped"
    started = project.compose("run", "--detach", "--name", name, "tests-cpu", "-k", "StateDict")
    assert started.exit == 0
    container = client.containers.get(name)
    try:
        logs = project.out
        deadline = time.monotonic() + 150
        while not list(logs.glob("*/logs/*")):  # the first check that writes has been judged
            assert time.monotonic() < deadline, container.logs().decode()
            container.reload()
            assert container.status == "running", container.logs().decode()
            time.sleep(1)
        began = time.monotonic()
        container.stop(timeout=60)
        took = time.monotonic() - began
        said = container.logs().decode(errors="replace")
        state = container.wait()
    finally:
        container.remove(force=True)
    assert state["StatusCode"] == 3, said
    assert took < 45, f"{took:.0f} s: it was killed, not ended"
    results = json.loads((project.out / "latest" / "results.json").read_text())
    assert 0 < len(results["checks"]) < results["run"]["selected"], said
    assert {check["verdict"] for check in results["checks"]} <= {"pass", "xfail"}
    assert "selected checks did not run" in said


def test_a_run_without_gpus_is_not_a_failed_check(project: Project) -> None:
    done = project.run("tests-cpu", "--device", "cuda", "--backend", "nccl", "-k", FEW)
    assert done.exit == 3
    assert "preflight: not fit for a run: torch" in done.output
    assert done.left_nothing()


def test_a_missing_results_folder_is_named(project: Project) -> None:
    project.out.rmdir()
    done = project.run("tests-cpu", "-k", FEW)
    assert done.exit != 0
    assert str(project.out) in done.output
    assert not project.out.exists(), "the engine must not make it: it would be root's"


def test_benchmarks_leave_their_numbers_to_the_caller(project: Project) -> None:
    done = project.run("bench-cpu", "--quick", "--bench", "GatherAtScale.track_collectives")
    assert done.exit == 0
    assert (project.out / "asv" / "results" / "benchmarks.json").exists()
    assert "bench_scale.GatherAtScale.track_collectives" in done.output
    project.assert_owns_its_results()


def test_the_shell_hands_on_its_exit_code(project: Project) -> None:
    assert project.run("shell-cpu", "-c", "exit 7").exit == 7
