"""The command `ci/nightly`: run a night, hold it against the one before, say so."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from harness.system import pipes
from nightly import chain, speed, verdicts
from nightly.issue import Tracker, TrackerError
from nightly.report import Found
from nightly.state import BadStateError, State
from report.read import BadResultsError, read


def main(arguments: list[str] | None = None) -> int:
    """One night; 0 nothing to say, 1 a finding, 2 wrong usage, 3 the environment failed."""
    options = _options(arguments)
    try:
        return _night(options)
    except (chain.EnvironmentFailedError, BadStateError, TrackerError) as error:
        print(f"ci/nightly: {error}", file=sys.stderr)
        return 3


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ci/nightly", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--backend", default="nccl", metavar="NAME", help="default: %(default)s")
    add("--device", metavar="TYPE", help="default: cuda for nccl, else cpu")
    add("--share-gpus", action="store_true", help="NCCL: ranks may share GPUs; slow")
    add("--subject", default="torch.distributed", metavar="ROOT", help="default: %(default)s")
    add("--torch", metavar="VERSION", help="judge this torch instead of the pinned one")
    add(
        "--state",
        type=Path,
        default=chain.ROOT / "out" / "nightly",
        metavar="DIR",
        help="what is remembered from night to night (default: out/nightly)",
    )
    add("--issue", metavar="OWNER/NAME", help="repository whose issue is opened and closed")
    add("--site", type=Path, metavar="DIR", help="make the site of all nights in --state there")
    add("-k", metavar="EXPRESSION", help="only checks that match, as pytest takes it")
    add("--expectations", metavar="DIR", help="folder of known failures, as the suites take it")
    add(
        "--accept",
        action="store_true",
        help="take tonight as the measure: what changed, is gone or is slower is meant",
    )
    add("--no-benchmarks", action="store_true", help="verdicts only")
    add("--no-mutation", action="store_true", help="judge no automatic mutants of the reference")
    add("--dry-run", action="store_true", help="small benchmarks, no mutants; touch no issue")
    options = parser.parse_args(arguments)
    if options.share_gpus and options.backend != "nccl":
        parser.error("--share-gpus: expected --backend nccl")
    options.device = options.device or ("cuda" if options.backend == "nccl" else "cpu")
    return options


def _night(options: argparse.Namespace) -> int:
    torch = options.torch or _installed()
    what = (options.subject, torch, options.backend, options.device)
    state = State.of(options.state, *what)
    folder = state.folder / time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    folder.mkdir()
    chain.room(folder)
    selection = ["-k", options.k] if options.k else []
    selection += ["--expectations", options.expectations] if options.expectations else []
    night = chain.Night(
        folder,
        options.device,
        options.backend,
        options.subject,
        options.torch,
        options.dry_run,
        selection,
        options.share_gpus,
    )
    last, green = state.read("last"), state.read("green")
    night.preflight()
    results = night.judge()
    now, split = verdicts.merged([verdicts.of(r) for r in results])
    before = now if last is None or options.accept else last["verdicts"]
    # They are of torch, whatever its backend.
    of_torch = options.subject == "torch.distributed" and not options.k
    reproduced = night.reproduce() if of_torch else []
    generated = night.generate() if options.torch is None else []
    fast: speed.Speed | None = None
    ratios: dict[str, float] = {}
    if not options.no_benchmarks:
        one, two = (speed.ratios(journal) for journal in night.measure())
        known = {} if green is None or options.accept else green["ratios"]
        fast, ratios = speed.judge(one, two, known)
    weak = False
    if not (options.no_mutation or options.dry_run or options.k):
        # They are the reference's, and of the checks: alike, whatever is judged, on any machine.
        memory = options.state / "mutation"
        shard = (state.read("mutation") or {"shard": 0})["shard"] % chain.SHARDS + 1
        weak = not night.mutate(shard, memory)
        state.write("mutation", {"shard": shard})
    title = "Nightly: {}, torch {}, {} on {}".format(*what)
    compared = verdicts.compare(before, now)
    found = Found(
        title,
        results,
        now,
        compared,
        split,
        fast,
        night.steps,
        weak,
        generated,
        _last(state, last),
        reproduced,
    )
    findings = list(found.findings())
    body = found.markdown()
    (folder / "report.md").write_text(body + "\n")
    (folder / "night.json").write_text(json.dumps(found.as_json(), indent=1) + "\n")
    print(body)
    # Before the tracker, which may be out of reach: the next night compares with this one.
    state.write("last", {"night": folder.name, "verdicts": compared.remembered(now)})
    if ratios and not findings:
        state.write("green", {"night": folder.name, "ratios": ratios})
    if options.issue:
        tracker = Tracker(options.issue, options.dry_run)
        print("issue: " + tracker.settle(title, body, wrong=found.wrong, news=found.news))
    if options.site:
        night.show(options.state, options.site)
    print(f"night: {folder}")
    return 1 if findings else 0


def _last(state: State, last: dict[str, Any] | None) -> dict[str, Any] | None:
    """The results of the last night in the first order; None where they are gone."""
    name = (last or {}).get("night", "")
    try:
        return read(state.folder / Path(name).name / chain.ORDERS[0]) if name else None
    except BadResultsError:
        return None  # of an older form, or cleared away: verdicts are compared all the same


def _installed() -> str:
    """The torch of this environment; nights of PyTorch's own nightlies compare with each other."""
    import torch

    version = str(torch.__version__).partition("+")[0]
    return "nightly" if "dev" in version else version


if __name__ == "__main__":
    sys.exit(pipes.run(main))
