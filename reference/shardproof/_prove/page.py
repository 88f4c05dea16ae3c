"""A proof as one page of HTML, which needs nothing else and runs no script."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import jinja2

from shardproof._prove.findings import LOSS, NOTE, UNSAFE, ranks_text
from shardproof._prove.placements import Part
from shardproof._prove.roads import ROADS
from shardproof._prove.room import size_text


def page(proof: Any) -> str:
    """The page of a Proof, whose module imports this one; texts of the user's are escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "ranks": ranks_text,
        "size": size_text,
        "part": lambda told: str(Part.of(told)),
    }
    source = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        proof=proof,
        roads=[ROADS[name] for name in dict.fromkeys(cell.road for cell in proof.cells)],
        groups=[
            (title, [finding for finding in proof.findings if finding.severity == severity])
            for severity, title in ((UNSAFE, "Unsafe"), (LOSS, "Lost"), (NOTE, "To know"))
        ],
        left=[cell for cell in proof.cells if cell.why],
    )
