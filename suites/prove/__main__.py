"""The table of docs/prove.md: what a run of the suite found of right jobs and of planted losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from prove.kit.losses import LOSSES

PAGE = Path(__file__).parents[2] / "docs" / "prove.md"
BEGIN = "<!-- written by ci/prove-losses --write -->\n"
END = "<!-- end -->\n"
_FOUND = {"pass": "yes"}
_RANKS = {2: "two", 4: "four", 8: "eight"}


def table(results: dict[str, Any]) -> str:
    """Two tables, in Markdown."""
    verdicts = {check["id"].rpartition("::")[2]: check["verdict"] for check in results["checks"]}
    lines = ["| planted | named | on | where |", "| --- | --- | --- | --- |"]
    for loss in LOSSES.values():
        key = f"test_{_RANKS[loss.world]}_ranks[w{loss.world}-{loss.what}]"
        named = f"`{loss.names}`" if loss.names else "all"
        if loss.defect:
            named += f" {loss.defect}"
        ranks = "all" if loss.ranks is None else ", ".join(map(str, loss.ranks))
        found = _FOUND.get(verdicts.get(key, "not run"), "**no**")
        where = ", ".join(loss.where)
        lines.append(f"| {loss.what} | {found}: {named} | {ranks} | {where} |")
    lines += ["", "| right job | ranks | whole |", "| --- | ---: | --- |"]
    for check in results["checks"]:
        test = check["id"].partition("::")[2]
        if "test_right_jobs" in check["id"] and "[" in test:
            what = test.partition("[")[2].removesuffix("]").partition("-")[2] or test
            passes = "yes, but for torch's defects" if "test_fsdp1" in test else "yes"
            found = passes if check["verdict"] == "pass" else f"**{check['verdict']}**"
            if "test_under_the_subject" in test:
                what += ", after `install()`"
            if what and not what.startswith("test_"):
                lines.append(f"| {what} | {check['world']} | {found} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Print the table of a run, or write it; 1 where a check of it failed."""
    write = "--write" in arguments
    (folder,) = [one for one in arguments if one != "--write"]
    results = json.loads((Path(folder) / "results.json").read_text())
    made = table(results)
    if write:
        text = PAGE.read_text()
        before, _, rest = text.partition(BEGIN)
        PAGE.write_text(before + BEGIN + made + END + rest.partition(END)[2])
    else:
        print(made)
    return int(any(check["verdict"] != "pass" for check in results["checks"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
