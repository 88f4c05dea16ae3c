"""Ranks that do not issue the same collectives: who did what is said, and nobody blamed wrongly.

Sessions run the classes of two cases side by side, for their ranks mostly wait; each test here
reads one check's record.
"""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest

from faults.sessions import CASES, Outcome, Session
from report.read import read

COLLECTIVE, LIMIT = 3.0, 12.0
ALL = "of group (0, 1, 2)"

SAID = {
    "skips_one": (
        f"rank 1: issued all_gather, float32 (4, 3), as #6 {ALL}, where ranks 0 and 2 issued "
        "all_reduce, float32 (5,)"
    ),
    "issues_one_more": (
        f"rank 1: issued barrier, as #2 {ALL}, where ranks 0 and 2 issued all_gather, "
        "float32 (4, 3)"
    ),
    "another_order": (
        f"rank 1: issued all_reduce, float32 (5,), as #1 {ALL}, where ranks 0 and 2 issued "
        "all_gather, float32 (4, 3)"
    ),
    "another_root": (
        f"rank 1: issued broadcast, root 1, float32 (2,), as #2 {ALL}, where ranks 0 and 2 issued "
        "broadcast, root 2, float32 (2,)"
    ),
    "differ_long_before": (
        f"rank 1: never answered; last phase: call; never issued barrier #2 {ALL}, which ranks 0 "
        "and 2 wait in; it is in test_differ_long_before (test_it.py, line "
    ),
    "skips_the_last": (
        f"rank 1: never issued all_gather #2 {ALL}, float32 (4, 3), which ranks 0 and 2 wait in; "
        "it has passed"
    ),
    "issues_one_more_at_the_end": (
        f"rank 1: waits in barrier #2 {ALL}, which ranks 0 and 2 never issued: they have passed"
    ),
    "sleeps": (
        f"rank 1: never answered; last phase: call; never issued all_gather #2 {ALL}, "
        "float32 (4, 3), which ranks 0 and 2 wait in; it is in test_sleeps (test_it.py, line "
    ),
    "is_stopped": (
        "rank 1: never answered; last phase: call; it was stopped (SIGSTOP); never issued "
        f"all_gather #2 {ALL}, float32 (4, 3), which ranks 0 and 2 wait in"
    ),
    "another_group": (
        f"ranks 0, 1, 2: wait for each other: ranks 0 and 2 wait in all_reduce #1 {ALL}, "
        "float32 (5,), which rank 1 never issued; rank 1 waits in all_reduce #1 of group (0, 1), "
        "float32 (5,), which rank 0 never issued"
    ),
    "groups_in_another_order": (
        "ranks 0, 1: wait for each other: rank 0 waits in all_reduce #1 of group (0, 1), "
        "float32 (5,), which rank 1 never issued; rank 1 waits in all_reduce #1 of group (0, 1), "
        "float32 (5,), which rank 0 never issued"
    ),
    "sends_nothing": (
        "rank 1: never issued send to rank 0 #1, while rank 0 waits in recv from rank 1 #1 "
        f"{ALL}, float32 (3,); it has passed"
    ),
    "leaves_a_gather_of_objects": (
        f"rank 1: never issued all_gather #1 {ALL}, int64 (1,), which ranks 0 and 2 wait in; it "
        "has passed"
    ),
    "sleeps_before_a_functional_collective": (
        f"rank 1: never answered; last phase: call; never issued all_reduce #2 {ALL}, "
        "float32 (3,), which ranks 0 and 2 wait in; it is in test_sleeps_before_a_functional"
    ),
    "sleeps_before_backward_of_ddp": (
        f"rank 1: never answered; last phase: call; never issued all_reduce #4 {ALL}, "
        "float32 (12,), which ranks 0 and 2 wait in; it is in test_sleeps_before_backward"
    ),
    "calls_the_backend_itself": (
        "rank 1: never answered; last phase: call; which collectives rank 0 issued is not known: "
        "it called allreduce of a backend itself, which no record sees"
    ),
    "every_rank_issued_it": (
        "rank 1: never answered; last phase: call; it was stopped (SIGSTOP); the records show no "
        f"cause: all ranks issued all_reduce #2 {ALL}, float32 (4194304,), the last of rank 0"
    ),
    "groups_made_in_another_order": (
        f"rank 1: issued new_group, ranks (0, 1), as #1 {ALL}, where ranks 0 and 2 issued "
        "new_group, ranks (0, 2)"
    ),
}
RECORD = [
    "every_road_is_seen",
    "what_counts_collectives_counts_the_same",
    "a_refused_call_counts_for_nothing",
    "nothing_is_sent_under_fake_tensors",
    "compiling_does_not_look_at_it",
    "tensors_are_not_kept",
    "forks_of_a_rank_note_nothing",
    "more_calls_than_it_holds",
    "more_groups_than_it_holds",
]


PARTS = [
    *(("collective_faults", part) for part in ("TestDiffering", "TestMissing", "TestElse")),
    ("collective_roads", "Test"),
]


class Outcomes:
    """The sessions' outcomes, as one."""

    def __init__(self, parts: list[Outcome]) -> None:
        self.parts = parts
        self.output = "".join(part.output for part in parts)

    def check(self, name: str) -> dict[str, Any]:
        found = [p for p in self.parts for c in p.results["checks"] if f"::test_{name}[" in c["id"]]
        assert len(found) == 1, self.output
        return found[0].check(f"test_{name}")


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    running = []
    for case, part in PARTS:
        folder = tmp_path_factory.mktemp(part)
        shutil.copy(CASES / f"{case}.py", folder / "test_it.py")
        limits = ["--collective-limit", str(COLLECTIVE), "--check-limit", str(LIMIT)]
        env = {"TORCH_FR_BUFFER_SIZE": "1000"}  # torch's own recorder, to compare with
        running.append(Session(folder, *limits, "-k", part, env=env))
    return Outcomes([session.finish() for session in running])


@pytest.mark.parametrize(("name", "said"), SAID.items())
def test_what_the_ranks_did_is_said(outcomes: Outcomes, name: str, said: str) -> None:
    check = outcomes.check(name)
    assert check["message"].startswith(said), check["message"]
    assert check["verdict"] == "timeout"


@pytest.mark.parametrize(
    ("name", "odd"),
    [("another_shape", "float32 (5, 3)"), ("another_dtype", "float64 (4, 3)")],
)
def test_who_differs_is_told_where_gloo_ends_another(
    outcomes: Outcomes, name: str, odd: str
) -> None:
    """Gloo aborts the rank that receives too much, which need not be the one that differs."""
    message = outcomes.check(name)["message"]
    assert re.match(r"ranks? [012, ]+: ", message), message
    ending = f"; rank 1 issued all_gather, {odd}, as #2 {ALL}, where ranks 0 and 2 issued "
    assert message.endswith(ending + "all_gather, float32 (4, 3)"), message


def test_a_late_rank_is_told_with_its_lateness(outcomes: Outcomes) -> None:
    message = outcomes.check("is_late")["message"]
    expected = rf"rank 1: issued all_gather #2 {re.escape(ALL)}, float32 \(4, 3\) only (\d\.\d) s "
    found = re.match(expected + r"after ranks 0 and 2, when rank \d had given up on it$", message)
    assert found is not None, message
    assert 4 < float(found[1]) < 8


def test_the_last_collective_of_a_rank_that_died_is_named(outcomes: Outcomes) -> None:
    message = outcomes.check("is_killed")["message"]
    assert message.startswith("rank 1: killed by SIGKILL in call"), message
    assert message.endswith(f"; its last collective was all_gather #1 {ALL}, float32 (4, 3)")


def test_the_rank_that_all_wait_for_is_named(outcomes: Outcomes) -> None:
    """Not the one between, which waits itself."""
    message = outcomes.check("stands_behind_one_that_sleeps")["message"]
    assert message.startswith("rank 2: never answered; last phase: call; never issued "), message
    assert "#1 of group (1, 2), float32 (5,), which rank 1 waits in" in message or (
        "barrier" in message
    )


@pytest.mark.parametrize("name", RECORD)
def test_the_record_holds(outcomes: Outcomes, name: str) -> None:
    check = outcomes.check(name)
    assert check["verdict"] == "pass", check["message"]


def test_the_record_is_in_the_results_of_failed_checks_alone(outcomes: Outcomes) -> None:
    for part in outcomes.parts:
        read(part.run_dir)  # by the schema
    calls = [r["collectives"] for r in outcomes.check("skips_one")["ranks"]]
    assert [c["op"] for c in calls[1]] == [*["all_gather", "all_reduce"] * 2, *["all_gather"] * 2]
    assert calls[1][-1]["group"] == [0, 1, 2]
    assert calls[1][-1]["number"] == 6
    assert calls[1][-1]["arguments"] == "float32 (4, 3)"
    assert all("collectives" not in r for r in outcomes.check("in_order")["ranks"])


def test_the_terminal_shows_the_last_collectives(outcomes: Outcomes) -> None:
    assert "--- last collectives ---" in outcomes.output
    assert re.search(
        rf"\d s before the end: all_gather #6 {re.escape(ALL)}, float32 \(4, 3\)",
        outcomes.output,
    )
