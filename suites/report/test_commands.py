"""Every command that README, docs and CONTRIBUTING show is run, on a part that is small.

The first rule whose pattern is the whole command says how. A page with a command that no rule knows
fails. What takes more than a moment is marked thorough: `ci/test --everything` runs it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from report.test_docs import DOCS, ROOT, _commands

_FILE = "suites/conformance/state_dict_utils/test_tables.py"
_INTEGRATION = "suites/integration/test_install.py -k test_a_second_install"
_LIMIT = 240

AT_ONCE = [
    (r"ci/conformance --(help|laws|pytest-help)", ""),
    (r"ci/defects( SP-001| --road tp-ddp| --words)?", ""),
    (r"ci/reproduce SP-001", ""),
    (r"ci/(compare|reproduce)", "--help"),
    (r"ci/(compare (out/A out/B --html changes\.html|BEFORE AFTER)|report)", "--help"),
    (r"ci/mutants NAME( --write)?", "--list"),
]
"""(pattern, words that are added) of what ends in a moment."""

SMALL = [
    (r"ci/conformance --subject my\.fork --expectations DIR --update-expectations", _FILE),
    (r"ci/conformance --update-expectations", f"--expectations DIR {_FILE} -k no_such_check"),
    (r"(PYTHONPATH=/path/to/fork )?ci/conformance( --subject (my\.fork|shardproof))?", _FILE),
    (r"ci/conformance( --subject (my\.fork|shardproof))? -k gather( -x)?", _FILE),
    (r"ci/conformance --(jobs 4|known|seed random|start-method spawn|thorough)", _FILE),
    (r"ci/conformance --order (random:7|reverse)", _FILE),
    (r"ci/integration( --subject (my\.fork|shardproof))?( --callers)?", _INTEGRATION),
    (r"ci/bench( --(quick|table))?", "--quick --bench FlattenStateDict"),
    (r"ci/bench --bench Gather", "--quick"),
    (r"ci/bench --journal FILE", "--quick --bench FlattenStateDict"),
    (r"ci/bench --check( --bench Gather)?", "--bench FlattenStateDict"),
    (r"ci/bench --goals --from FILE", ""),
    (r"ci/bench --agree FIRST SECOND", ""),
    (r"ci/fuzz( --subject my\.fork)?", "--minutes 0.1"),
    (r"ci/mutants( --patches suites/mutants/patches NAME| --callers)?", "--list"),
    (r"ci/mutation", "--report"),
    (r"ci/preflight", ""),
    (r"ci/lint", ""),
    (r"ci/world-cost", "--rounds 2"),
    (r"ci/on-gpus --dry-run", "--subject shardproof"),
    (r"ci/setup", ""),
    (r"ci/conformance --torch 2\.15\.0", _FILE),
    (r"ci/verdicts( 2\.12\.0 2\.14\.0)?", "--help"),
    (r"TORCH='torch==2\.12\.1' SHARDPROOF_VENV=.venvs/mine ci/setup", "--help"),
    (r"ci/compare torch==2\.13\.0 torch==2\.15\.0", "--help"),
]
"""(pattern, words that are added) of what takes seconds to minutes."""

ELSEWHERE = [
    (r"ci/test( --everything)?", "ci/test"),
    (r"ci/quick", "suites/quick/test_quick.py"),
    (r"ci/conformance( --subject my\.fork)? --certified", "suites/bundle/test_certified.py"),
    (r"ci/bundle( .*)?", "suites/bundle/test_bundle.py"),
    (r"ci/site( .*)?", "suites/website/test_website.py"),
    (r"ci/(nightly|nightly-in-image|nightly-issue)( .*)?", "suites/nightly/test_nightly.py"),
    (r"ci/conformance .*--nnodes.*", "suites/faults/test_nodes.py"),
    (r"ci/conformance --backend nccl --device cuda.*", "suites/benchmarks/GPU.md"),
    (r"ci/bench --device cuda", "suites/benchmarks/GPU.md"),
    (r"ci/on-gpus", "suites/benchmarks/GPU.md"),
    (r"ci/bench --(goals|publish|update-baseline|compare REV --bench Copy)", "suites/benchmarks"),
    (r"ci/defects --write", "suites/defects/test_defects.py"),
    (r"ci/reproduce (--all .*|ID --check --write)", "ci/test"),
    (r"ci/fuzz --planted", "suites/generated/test_planted.py"),
    (r"ci/soak", "suites/soak/test_soak.py"),
    (r"ci/faults", "suites/faults/test_fault_table.py"),
    (r"ci/prove-losses( --write)?", "suites/prove"),
    (r"ci/readme", "suites/report/test_readme.py"),
    (r"ci/ecosystem", "ci/test"),
    (r"ci/report (out/latest|--screenshot .*)", "suites/report/test_pages.py"),
    (r"ci/bench --quick --journal out/latest/benchmarks\.jsonl", "suites/benchmarks"),
]
"""(pattern, what runs it) of what is too large for a part, or needs what is not here."""


def _rule(command: str, rules: list[tuple[str, str]]) -> str | None:
    return next((words for pattern, words in rules if re.fullmatch(pattern, command)), None)


_SHOWN = sorted({command for page in DOCS for command in _commands(page)})


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fork, a folder of expectations, and a journal: what placeholders stand for."""
    folder = tmp_path_factory.mktemp("room")
    (folder / "fork" / "my").mkdir(parents=True)
    (folder / "fork" / "my" / "fork").symlink_to(ROOT / "reference" / "shardproof")
    (folder / "expectations").mkdir()
    return folder


def _run(command: str, more: str, room: Path) -> None:
    journal = ROOT / "suites" / "benchmarks" / "goals.jsonl"
    stands = {
        "DIR": str(room / "expectations"),
        "PYTHONPATH=/path/to/fork": f"PYTHONPATH={room / 'fork'}",
        "FIRST": str(journal),
        "SECOND": str(journal),
        "NAME": "027-large-strided-chunk" if "--patches" in command else "uneven_chunks",
        "FILE": str(journal if "--from" in command else room / "journal.jsonl"),
    }
    line = re.sub("|".join(stands), lambda found: stands[found[0]], f"{command} {more}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if "my.fork" in command:
        environment["PYTHONPATH"] = str(room / "fork")
    with subprocess.Popen(
        ["bash", "-c", line],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as running:
        try:
            output, _ = running.communicate(timeout=_LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            output, _ = running.communicate()
    # 5: pytest's own, where a part selects no check.
    assert running.returncode in {0, 5}, f"{line}: exit {running.returncode}\n{output[-4000:]}"
    assert output.strip() or command in {"ci/setup"}, f"{line}: said nothing"


@pytest.mark.parametrize("command", _SHOWN)
def test_every_command_has_a_rule(command: str) -> None:
    places = [ELSEWHERE, AT_ONCE, SMALL]
    assert any(_rule(command, rules) is not None for rules in places), (
        f"{command}: say in {Path(__file__).name} how it is run"
    )


@pytest.mark.parametrize("command", [c for c in _SHOWN if _rule(c, AT_ONCE) is not None])
def test_a_command_of_a_moment(command: str, room: Path) -> None:
    _run(command, _rule(command, AT_ONCE) or "", room)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "command",
    [c for c in _SHOWN if all(_rule(c, r) is None for r in (AT_ONCE, ELSEWHERE))],
)
def test_a_command_on_a_small_part(command: str, room: Path) -> None:
    _run(command, _rule(command, SMALL) or "", room)


def test_what_runs_the_others_exists() -> None:
    for _, place in ELSEWHERE:
        assert (ROOT / place).exists(), place
