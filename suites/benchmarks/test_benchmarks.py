"""Each benchmark can fail, and a run that measured nothing does."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from asv._stats import is_different

from benchmarks import base, bench_broadcast, bench_harness, command, environment
from benchmarks.journal import read
from benchmarks.listing import HERE, benchmarks
from benchmarks.results import baseline, goals, table
from benchmarks.run.parent import Parent
from benchmarks.settings import FLOOR, PREFIX, REFERENCE, TORCH, Settings

SUITES = HERE.parent
QUICK = Settings(quick=True)


@pytest.mark.parametrize("benchmark", benchmarks(), ids=lambda b: type(b).__name__)
def test_where_torch_has_no_number_no_ratio_to_it_is_asked_for(benchmark: Any) -> None:
    """Where a benchmark would fail, and the run with it, asv shows n/a."""
    track = benchmark.track_ratio_to_torch
    if track is None:
        return
    reason = benchmark.missing(TORCH, Settings.from_environment())
    if not reason:
        track.setup("shardproof", "many", "2 ranks, gloo on cpu")
        return
    with pytest.raises(NotImplementedError) as caught:
        track.setup("shardproof", "many", "2 ranks, gloo on cpu")
    assert reason in str(caught.value)


def test_a_count_that_differs_from_call_to_call_is_not_told() -> None:
    """It is torch's alone, and n/a in that regime only."""
    benchmark: Any = bench_broadcast.DistributeStateDict()
    peak = benchmark.track_peak
    for arm, regime in ((TORCH, "many"), (REFERENCE, "model"), (FLOOR, "model")):
        peak.setup(arm, regime, "4 ranks, gloo on cpu")
    with pytest.raises(NotImplementedError, match=r"from 21\.9 to 24\.4 MiB"):
        peak.setup(TORCH, "quick model", "4 ranks, gloo on cpu")


def test_a_count_that_differs_from_call_to_call_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others are."""
    counts = {"wrong": "", "seconds": [], "collectives": 147, "peak": 5}

    world = Mock()
    world.ended = contextlib.nullcontext
    world.measured.return_value = [{REFERENCE: counts, TORCH: counts}]
    monkeypatch.setattr("benchmarks.run.world.MeasuredWorld", lambda *_: world)
    monkeypatch.setattr("harness.system.warm.unfit", lambda: "")
    one = object.__new__(Parent)
    one.settings, one._data = Settings(), {"model": {}}
    (found,) = one.measure_all(
        [(bench_broadcast.DistributeStateDict(), "model", 4)], arms=(TORCH, REFERENCE)
    )
    assert found[TORCH] == {"wrong": "", "seconds": [], "collectives": 147}
    assert found[REFERENCE] == counts


def test_worlds_of_more_ranks_than_gpus_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NCCL takes a GPU a rank: asv shows n/a for larger worlds, where each would fail."""
    one = Settings(device="cuda", backend="nccl", room=2)
    for name, value in one.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings.from_environment() == one
    benchmark = bench_broadcast.DistributeStateDict()
    benchmark.setup(REFERENCE, "many", "2 ranks, nccl on cuda")
    with pytest.raises(NotImplementedError, match="needs 4 GPUs; this machine has 2"):
        benchmark.setup(REFERENCE, "many", "4 ranks, nccl on cuda")
    with pytest.raises(NotImplementedError, match="needs 4 GPUs"):
        bench_harness.FreshWorld.time_call.setup(4)
    assert goals.main(one, "GatherStateDictToFirst", 4, None) == 3
    assert "GatherStateDictToFirst many x4: needs 4 GPUs" in capsys.readouterr().err
    assert table.main(replace(one, room=0, share_gpus=True), Path("no-such-journal")) == 2


def test_what_is_left_out_cannot_be_measured() -> None:
    """An arm that is declared absent really fails: else it must be measured."""
    absent = [
        (type(b).__module__, type(b).__name__, arm)
        for b in benchmarks()
        if not b.device_only
        for arm in b.absent
    ]
    assert absent
    found = in_a_process(
        "found = {}\n"
        f"for module, name, arm in {absent!r}:\n"
        "    b = named(module, name)\n"
        "    type(b).absent = {}\n"
        "    regime, size = b.grid(s)[0]\n"
        "    got = p.measure(b, regime, size, arms=(arm,), timed=False, counted=False)\n"
        "    found[name] = got[arm]['wrong']\n"
        "print(json.dumps(found))"
    )
    assert all(json.loads(found).values()), found


def in_a_process(code: str, *, status: int = 0) -> str:
    """Run with `p`, a Parent with quick settings `s`; what it prints."""
    head = (
        "import json, sys\nfrom harness.system import warm\nwarm.limit_threads()\n"
        "from benchmarks.results import baseline\n"
        "from benchmarks.run.parent import Parent, named\n"
        "from benchmarks.settings import Settings\n"
        "s = Settings(quick=True)\n"
    )
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{head}p = Parent(s)\n{code}" if "baseline." not in code else head + code,
        ],
        env=os.environ | {"PYTHONPATH": str(SUITES)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == status, ran.stdout
    return ran.stdout


def test_check_fails_on_a_rise(tmp_path: Path) -> None:
    """One collective more than the baseline has: exit 1 and its name; equal counts: exit 0."""
    files = [str(tmp_path / name) for name in ("same.json", "lower.json")]
    said = in_a_process(
        "b = named('benchmarks.bench_gather', 'GatherStateDictToFirst')\n"
        "baseline.benchmarks = lambda: [b]\n"
        "from pathlib import Path\n"
        f"same, lower = map(Path, {files!r})\n"
        "assert baseline.update(s, same) == 0\n"
        "assert baseline.check(s, same) == 0\n"
        "data = json.loads(same.read_text())\n"
        "data['counts']['GatherStateDictToFirst model x4']['collectives'] -= 1\n"
        "lower.write_text(json.dumps(data))\n"
        "assert baseline.check(s, lower) == 1\n"
    )
    assert "GatherStateDictToFirst model x4: collectives rose from" in said


def counts(**changes: int) -> baseline.Counts:
    return {"one": {"collectives": 2, "received": 10, "peak": 10, "calls": 100} | changes}


def test_a_rise_of_each_count_is_seen() -> None:
    assert baseline.rises(counts(), counts()) == []
    for name in ("collectives", "received", "peak"):
        assert baseline.rises(counts(**{name: 11}), counts()), name
        assert baseline.falls(counts(**{name: 1}), counts()) == 1, name
    assert baseline.rises(counts(calls=110), counts()) == []
    assert baseline.rises(counts(calls=111), counts())


def test_a_measurement_that_appears_or_vanishes_is_seen() -> None:
    assert "not in the baseline" in baseline.rises(counts(), {})[0]
    assert "was not measured" in baseline.rises({}, counts())[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"about": {}', "not JSON"),
        ('{"about": {}}', "'counts' is a required property"),
        ('{"about": {}, "counts": {"one": {"calls": -1}}}', "counts.one.calls"),
    ],
)
def test_a_baseline_that_is_none_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "baseline.json"
    file.write_text(text)
    with pytest.raises(baseline.BadBaselineError, match=re.escape(said)) as caught:
        baseline.read(file)
    assert str(file) in str(caught.value)


def test_growth_beyond_the_stated_is_seen() -> None:
    wanted = [b for b in benchmarks() if type(b).__name__ == "BoxesAtScale"]
    low, high = counts()["one"], counts(collectives=3)["one"]
    now = {"BoxesAtScale scale x8": low, "BoxesAtScale scale x512": low}
    assert baseline.growths(now, wanted, QUICK) == []
    now["BoxesAtScale scale x512"] = high
    assert "collectives is stated as constant" in baseline.growths(now, wanted, QUICK)[0]


def one(**arm: Any) -> list[dict[str, Any]]:
    found = {"seconds": [1.0], "wrong": ""} | arm
    return [{"benchmark": "B", "regime": "model", "size": 2, "arms": {"shardproof": found}}]


def test_a_run_that_measured_nothing_fails() -> None:
    assert command._outcome(0, one(), saved=True) == 0
    assert command._outcome(0, [], saved=True) == 3
    assert command._outcome(0, one(seconds=[], wrong="no"), saved=True) == 3
    assert command._outcome(0, one() + one(seconds=[], wrong="no"), saved=True) == 1
    assert command._outcome(2, one(), saved=True) == 1


def test_a_run_that_is_told_to_end_leaves_what_it_has(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    words = ["--goals", "--bench", "SetElement", "--journal", str(journal)]
    command = [sys.executable, "-m", "benchmarks.command", *words]
    with subprocess.Popen(command, cwd=SUITES, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if line.startswith("world 2"):
                break
        run.terminate()
        said = run.stderr.read()
    assert run.returncode == 130, said
    assert "interrupted; the file of --journal" in said
    (arms,) = read(journal)[1].values()
    assert arms[REFERENCE]["seconds"]


def test_no_samples_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="nothing was measured"):
        base.sampled(lambda _: []).setup("a")


def test_points_of_a_graph_are_counted() -> None:
    assert command._points([[1, 2.0], [2, None], [3, float("nan")]]) == 1
    assert command._points([[1, [2.0, None, 3.0]]]) == 2
    assert command._points([]) == 0


def test_a_comparison_has_worlds_enough_to_find_a_difference() -> None:
    """Asv's test of the samples says yes from some number of them on, also where one is odd."""
    before = [1 + n / 100 for n in range(command.ROUNDS)]
    after = [2 * s for s in before]
    assert is_different(before, after, None, None)
    assert is_different([*before[1:], 10.0], after, None, None)
    assert is_different(before, [*after[1:], 0.1], None, None)
    assert not is_different(before, before[::-1], None, None)


@pytest.mark.parametrize(
    ("arguments", "environment", "budget"),
    [
        ([], "", 80),
        ([], "2.5", 2.5),
        (["--goals"], "2.5", 2.5),
        (["--goals", "--seconds", "5"], "2.5", 5),
        (["--quick"], "", 0.3),
        (["--compare", "HEAD~1"], "", 4),
        (["--compare", "HEAD~1", "--quick"], "", 0.3),
        (["--compare", "HEAD~1"], "2.5", 2.5),
    ],
)
def test_the_time_for_rounds_is_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], environment: str, budget: float
) -> None:
    """The command line goes before the environment, that before what is usual."""
    if environment:
        monkeypatch.setenv(f"{PREFIX}SECONDS", environment)
    monkeypatch.setattr(sys, "argv", ["ci/bench", *arguments])
    assert command._settings(command._options()).budget == budget


@pytest.mark.parametrize(
    ("command_line", "quick"),
    [
        ("/venv/bin/asv run --quick", True),
        ("/site-packages/asv/__main__.py continuous -q HEAD~1 HEAD", True),
        ("/venv/bin/asv run --bench quick", False),
        ("/venv/bin/pytest -q", False),
        ("/venv/bin/python", False),
    ],
)
def test_asv_that_is_to_be_quick_is_noticed(command_line: str, quick: bool) -> None:
    """From its command line, since it tells the benchmarks nothing."""
    assert environment.told_quick(command_line.split()) is quick


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "nosuch"], "--device 'nosuch' is not a device type"),
        (["--backend", "nosuch"], "--backend nosuch: this torch build lacks it"),
        (["--check", "--publish"], "not allowed with argument"),
        (["--seconds", "-1"], "--seconds -1: expected more than 0"),
        (["--goals", "--world", "0"], "--world 0: expected a number of ranks"),
        (["--bench", "("], "'(' is no regular expression: missing )"),
    ],
    ids=["device", "backend", "both", "seconds", "world", "bench"],
)
def test_wrong_usage_is_told(arguments: list[str], said: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.command", *arguments],
        env=os.environ | {"PYTHONPATH": str(SUITES)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 2
    assert said in ran.stderr
