"""What one rank does wrong: the right verdict, the right rank first, in time, nothing left.

One session runs all of cases/rank_faults.py; each test here reads one check's record.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from faults.sessions import CASES, Outcome, Session

COLLECTIVE, LIMIT = 2.0, 5.0

DIED = [
    ("exits_0_without_an_answer", "exited with 0 in call"),
    ("segfaults", "killed by SIGSEGV in call"),
    ("is_ended_by_its_backend", "killed by SIGABRT in call"),
    ("closes_every_descriptor", ""),
    ("writes_into_every_descriptor", ""),
]
RAISED = [
    ("raises_while_its_peer_waits", "ValueError: the cause"),
    ("raises_and_takes_forever_to_report", "ValueError: the cause"),
    ("raises_5_megabytes", "ValueError: beginxxx"),
    ("leaves_by_sys_exit_0", "SystemExit: 0"),
    ("raises_what_cannot_be_shown", "Sly"),
    ("ends_pytest", "Exit"),
    ("assert_explains_itself", "assert 4 == 3"),
    ("skips_on_rank_0_and_fails_on_rank_1", "ValueError: the cause"),
    ("thread_raises", "IndexError"),
    ("prints_and_fails", "assert 1 != 1"),
]
HUNG = [
    ("hangs_in_python", "hangs_in_python"),
    ("hangs_in_c_with_the_lock_held", "hangs_in_c_with_the_lock_held"),
    ("ignores_terminate", "ignores_terminate"),
]
LEAKED = [
    ("leaks_a_child", "child process"),
    ("leaks_a_thread", "thread 'forgotten'"),
    ("leaks_a_variable", "environment variable FORGOTTEN"),
    ("leaks_a_descriptor", "/dev/null"),
    ("leaks_a_pipe", "pipe:"),
    ("leaks_shared_memory", "shared-memory segment /dev/shm/"),
    ("leaks_a_temporary_file", "forgotten"),
    ("forks_and_both_go_on", "child process"),
]


# For the whole session: in random order the tests of this file do not follow each other.
@pytest.fixture(scope="session")
def session(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("rank_faults")
    shutil.copy(CASES / "rank_faults.py", folder / "test_it.py")
    return Session(
        folder,
        "--collective-limit",
        str(COLLECTIVE),
        "--check-limit",
        str(LIMIT),
        env={"SHARDPROOF_FAULTS_SHM": str(folder / "segment")},
        fresh=True,
    ).finish()


def ranks(check: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {r["rank"]: r for r in check["ranks"]}


def assert_blames(check: dict[str, Any], verdict: str, rank: int, cause: str) -> None:
    assert check["verdict"] == verdict, check["message"]
    assert check["message"].startswith(f"rank {rank}: "), check["message"]
    text = check["message"] + ranks(check)[rank]["message"] + ranks(check)[rank]["details"]
    assert cause in text, text[:2000]
    assert check["seconds"] < LIMIT + 5


def test_an_assert_without_words_is_told_by_its_source(session: Outcome) -> None:
    message = session.check("test_assert_explains_itself")["message"]
    assert message.startswith("rank 1: assert 4 == 3, asserted 'shape[\"rows\"] == 3'"), message


@pytest.mark.parametrize(("name", "cause"), DIED)
def test_a_rank_that_ends_without_an_answer_is_a_crash(
    session: Outcome, name: str, cause: str
) -> None:
    check = session.check(f"test_{name}")
    assert_blames(check, "crash", 1, cause)
    assert ranks(check)[0]["fate"] in {"passed", "peer lost"}


def test_a_segfault_shows_the_python_stack(session: Outcome) -> None:
    assert "test_segfaults" in ranks(session.check("test_segfaults"))[1]["details"]


@pytest.mark.parametrize("name", ["segfaults", "is_ended_by_its_backend"])
def test_a_crash_shows_no_frame_of_the_harness(session: Outcome, name: str) -> None:
    details = ranks(session.check(f"test_{name}"))[1]["details"]
    assert details.startswith("Fatal Python error: "), details
    for stranger in ("/harness/", "_pytest", "pluggy", "Extension modules", "no Python frame"):
        assert stranger not in details, details
    assert len(details.splitlines()) < 20, details


def test_a_crash_shows_the_last_words_of_the_backend(session: Outcome) -> None:
    check = session.check("test_is_ended_by_its_backend")
    cause = "what():  [enforce fail at pair.cc:7] this tensor is on no CPU"
    assert check["message"].endswith(cause), check["message"]
    details = ranks(check)[1]["details"]
    assert "in call_of_a_backend" in details
    assert details.endswith(cause), details


@pytest.mark.parametrize(("name", "cause"), RAISED)
def test_an_exception_is_the_failure_of_its_rank(session: Outcome, name: str, cause: str) -> None:
    assert_blames(session.check(f"test_{name}"), "fail", 1, cause)


def test_the_peers_of_a_failed_rank_are_its_victims(session: Outcome) -> None:
    for name in ("raises_while_its_peer_waits", "raises_5_megabytes", "fixture_raises"):
        victim = ranks(session.check(f"test_{name}"))[0]
        assert victim["fate"] == "peer lost"
        assert victim["waiting_in"] == "barrier"
    assert "rank 0: victim, peer lost, in barrier" in session.output


def test_a_long_message_is_kept_whole_in_the_log_and_cut_in_the_results(session: Outcome) -> None:
    record = ranks(session.check("test_raises_5_megabytes"))[1]
    assert len(record["details"]) < 20_000
    assert "characters cut here" in record["details"]
    assert "x" * 5_000_000 in (session.run_dir / record["log"]).read_text()


def test_a_rank_that_skips_is_an_error(session: Outcome) -> None:
    check = session.check("test_skips_on_every_rank")
    assert check["verdict"] == "error"
    assert "skipped itself on a rank" in check["message"]


def test_a_fixture_that_raises_on_a_rank_is_an_error(session: Outcome) -> None:
    assert_blames(session.check("test_fixture_raises"), "error", 1, "ValueError: the fixture")


@pytest.mark.parametrize(("name", "cause"), HUNG)
def test_a_rank_that_never_answers_is_a_timeout_with_its_stack(
    session: Outcome, name: str, cause: str
) -> None:
    check = session.check(f"test_{name}")
    assert_blames(check, "timeout", 1, cause)
    assert f"test_{name}" in ranks(check)[1]["details"], "no Python stack"


def test_a_collective_that_a_peer_passed_by_is_a_timeout_of_the_rank_in_it(
    session: Outcome,
) -> None:
    check = session.check("test_hangs_in_a_collective")
    assert_blames(check, "timeout", 1, "which rank 0 never issued: it has passed")


def test_ranks_that_disagree_on_a_collective_are_told_apart(session: Outcome) -> None:
    check = session.check("test_disagree_on_the_next_collective")
    assert check["verdict"] == "timeout"
    assert check["message"] == (
        "ranks 0, 1: disagree on #1 of group (0, 1): rank 0 issued all_reduce, float32 (1,); "
        "rank 1 issued broadcast, root 1, float32 (1,)"
    )


@pytest.mark.parametrize(("name", "cause"), LEAKED)
def test_what_outlives_a_check_fails_it(session: Outcome, name: str, cause: str) -> None:
    check = session.check(f"test_{name}")
    assert_blames(check, "fail", 1, cause)
    assert ranks(check)[0]["fate"] == "passed"


def test_a_detached_grandchild_is_found_and_ended(session: Outcome) -> None:
    check = session.check("test_leaks_a_detached_grandchild")
    assert check["verdict"] == "fail"
    assert "left behind by the world" in check["message"]
    assert "setsid" in check["message"]


def test_a_leaked_segment_is_removed(session: Outcome) -> None:
    name = (session.folder / "segment").read_text()
    assert not os.path.exists(f"/dev/shm/{name}")


def test_checks_in_order_pass_beside_the_faults(session: Outcome) -> None:
    check = session.check("test_in_order")
    assert check["verdict"] == "pass", check["message"]
    assert {r["fate"] for r in check["ranks"]} == {"passed"}


def test_output_is_kept_apart_by_rank(session: Outcome) -> None:
    records = ranks(session.check("test_prints_and_fails"))
    for rank, record in records.items():
        text = Path(session.run_dir, record["log"]).read_text()
        assert f"said by rank {rank}" in text
        assert f"written by rank {rank}" in text
        assert f"rank {1 - rank}" not in text.replace(f"said by rank {rank}", "")
    assert "said by rank 1" in session.output
    assert "said by rank 0" not in session.output


def test_a_function_that_the_subject_lacks_is_a_precondition(session: Outcome) -> None:
    check = session.check("test_of_a_function_that_is_not_there")
    assert check["verdict"] == "precondition"
    assert "torch.distributed._state_dict_utils has no _no_such_function" in check["message"]
    assert check["message"] in session.output


def test_nothing_of_the_session_is_alive(session: Outcome) -> None:
    assert session.survivors == []


def test_the_session_ends_with_the_exit_code_of_its_errors(session: Outcome) -> None:
    assert session.exit == 3
    assert session.results["run"]["exit"] == 3
    assert session.results["run"]["selected"] == len(session.results["checks"])
