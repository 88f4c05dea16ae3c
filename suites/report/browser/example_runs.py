"""Results of runs of every kind, as the schema has them: what pages have to be right for."""

from __future__ import annotations

from typing import Any

VERDICTS = ("pass", "fail", "error", "timeout", "crash", "precondition", "xfail", "xpass")
HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"> <b>&amp; 'quoted'"
"""A text that is HTML, and would run as a script where it is not escaped."""
HANG = "rank 0: waits in all_gather #7 of group (0, 1), float32 (4, 2), which rank 1 never issued"
STACK = "\n".join(f'  File "suites/x.py", line {n}, in f{n}' for n in range(40)) + "\nE   boom"
FORMS = "_state_dict_utils", "_gather_state_dict"
LOCALIZE = "tensor.parallel.ddp", "_localize_dtensor"


def rank(number: int = 0, fate: str = "passed", **more: Any) -> dict[str, Any]:
    """What is known of one rank."""
    return {
        "rank": number,
        "node": 0,
        "host": "node0",
        "local_rank": number,
        "fate": fate,
        "phase": "call",
        "seconds": 0.25,
        "message": "",
        "details": "",
        "waiting_in": "",
        "exitcode": 0,
        "log": "" if fate == "passed" else f"logs/check/rank-{number}.log",
    } | more


def check(name: str, verdict: str = "pass", of: tuple[str, str] = FORMS, **more: Any) -> Any:
    """A check; its clause is its name in words."""
    identity = f"suites/conformance/state_dict_utils/test_x.py::TestX::test_{name}[w2]"
    return {
        "id": identity,
        "module": of[0],
        "function": of[1],
        "law": "values",
        "level": "MUST",
        "level_reason": "",
        "clause": f"What is {name.replace('_', ' ')} must hold.",
        "verdict": verdict,
        "seconds": 0.3,
        "message": "",
        "world": 2,
        "mesh": "2(x)",
        "ranks": [rank(0), rank(1)],
        "expected": None,
        "warnings": [],
        "command": f"ci/conformance '{identity}'",
    } | more


def known(name: str, *defects: str, reason: str = "", **more: Any) -> Any:
    """A known failure."""
    expected = {"reason": reason, "link": "", "pattern": "*", "file": "torch.distributed.toml"}
    if defects:
        expected["defects"] = list(defects)  # type: ignore[assignment]
    bad = "AssertionError: differs"
    raised = [rank(n, "raised", message=bad, details=f"E   {bad}") for n in (0, 1)]
    told = {"message": f"rank 0: {bad}", "ranks": raised, "expected": expected} | more
    return check(name, "xfail", **told)


def results(*checks: Any, **run: Any) -> dict[str, Any]:
    """The results of a run of these checks."""
    return {
        "run": {
            "schema": 1,
            "subject": "torch.distributed",
            "subject_version": "2.13.0+cpu",
            "torch": "2.13.0+cpu",
            "python": "3.11.7",
            "cpus": 2,
            "backend": "gloo",
            "device": "cpu",
            "world": None,
            "commit": "1234567890abcdef",
            "seed": 0,
            "order": "normal",
            "start": "2026-01-01T10:00:00.000+00:00",
            "end": "2026-01-01T10:01:05.000+00:00",
            "counts": {v: sum(one["verdict"] == v for one in checks) for v in VERDICTS},
            "selected": len(checks),
            "exit": 0,
            "command": "ci/conformance --subject torch.distributed",
        }
        | run,
        "checks": list(checks),
    }


def everything() -> dict[str, Any]:
    """A run on GPUs of two machines, in which all that can happen has happened."""
    calls = [
        {
            "op": "all_gather",
            "number": n,
            "group": [0, 1],
            "arguments": "float32 (4, 2)",
            "state": "issued",
            "seconds_before_the_end": 10.2 - n / 10,
        }
        for n in (6, 7)
    ]
    waits = rank(
        0,
        "collective timeout",
        waiting_in="all_gather",
        collectives=calls,
        details=STACK,
        exitcode=None,
    )
    gone = rank(
        1, "silent", collectives=calls[:1], host="node1", node=1, details=STACK, exitcode=None
    )
    choice = {"level": "SHOULD", "level_reason": "a quality of ours"}
    versions = {"torch": "2.13.0+cu130"}
    said = [rank(0, "raised", message=HOSTILE, details=HOSTILE)]
    died = [
        rank(0, "peer lost", details="E   RuntimeError: Connection closed by peer"),
        rank(1, "died", exitcode=-6, details="Fatal Python error: Aborted"),
    ]
    unfit = [rank(0, "broken"), rank(1)]
    mended = known("mended", "SP-002") | {"verdict": "xpass", "message": "passes", "ranks": []}
    return results(
        check("plain"),
        check("localized", of=LOCALIZE, law="group"),
        check("hostile", "fail", message=HOSTILE, clause=HOSTILE, ranks=said),
        check("hanging", "timeout", law="symmetry", message=HANG, ranks=[waits, gone]),
        check("dying", "crash", message="rank 1: killed by SIGABRT", ranks=died),
        check("harness", "error", message="the fixture 'mesh' raised", ranks=unfit),
        mended,
        check("gpu", "precondition", message="needs 8 GPUs; this machine has 2", ranks=[]),
        check("area", of=("integration", "DDP"), law=""),
        check("bare", of=("", ""), law="", clause="", world=None, ranks=[]),
        known("lost", "SP-001", "SP-033"),
        known("shards", "SP-002", of=LOCALIZE, law="structure"),
        known("graph", "SP-030", law="cost", **choice),
        known("later", "SP-999"),
        known("callers", reason=f"torch's own loader {HOSTILE}"),
        backend="nccl",
        device="cuda",
        cuda="13.0",
        nccl="2.29.3",
        driver="NVRM version: 580.1",
        exit=1,
        left_out=3,
        nodes=[{"node": n, "host": f"node{n}", "ranks": 4, "versions": versions} for n in (0, 1)],
    )


def reference() -> dict[str, Any]:
    """A run in which all holds."""
    return results(
        *(check(f"case_{n}") for n in range(30)), subject="shardproof", subject_version="0.1.0"
    )


def empty() -> dict[str, Any]:
    """A run that ended before its first check."""
    return results(exit=3)


def interrupted() -> dict[str, Any]:
    """A run that was ended early."""
    return results(check("a"), known("b", "SP-001"), selected=40, exit=3)


def large(count: int = 3000) -> dict[str, Any]:
    """A run of many checks, half of them known failures with stacks."""
    some = ("SP-001", "SP-002", "SP-003", "SP-004")
    stack = [rank(n, "raised", message="E", details=STACK + str(n)) for n in (0, 1)]
    return results(
        *(
            known(f"case_{n}", some[n % 4], ranks=stack) if n % 2 else check(f"case_{n}")
            for n in range(count)
        )
    )


def compared() -> tuple[dict[str, Any], dict[str, Any]]:
    """Two runs: a defect appears and another goes, one check fails anew, one hangs now."""
    before = results(
        check("a"),
        check("b"),
        known("c", "SP-001"),
        known("d", "SP-030"),
        check("only_before"),
        torch="2.13.0",
    )
    stuck = [rank(0, "silent"), rank(1, "collective timeout")]
    now = results(
        known("a", "SP-002"),
        check("b", "fail", message=f"rank 0: {HOSTILE}", ranks=[rank(0, "raised")]),
        check("c"),
        known("d", "SP-030", ranks=stuck, message=HANG),
        check("only_now"),
        torch="2.15.0",
    )
    return before, now
