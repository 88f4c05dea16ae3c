"""What pages show of defects, from the catalogue and the reproducers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from defects.catalogue import Defect
from defects.listing import mender
from defects.reproduce import files
from defects.words import ROADS, SEVERITIES


def values(found: Iterable[Defect]) -> dict[str, Any]:
    """What defect.html reads, beside the count of checks in `seen`."""
    scripts = files()
    return {
        "severities": SEVERITIES,
        "roads": ROADS,
        "mender": mender,
        "scripts_of": {d.id: scripts[d.id].read_text() for d in found if d.id in scripts},
    }


def for_scripts(catalogue: dict[str, Defect], wanted: Iterable[str]) -> dict[str, Any]:
    """What filters and links ask of the defects."""
    return {
        identity: {
            "title": catalogue[identity].title,
            "severity": catalogue[identity].severity,
            "roads": catalogue[identity].roads,
        }
        for identity in wanted
        if identity in catalogue
    }


def severities(several: Iterable[Defect]) -> list[str]:
    """The words that these defects have, worst first."""
    met = {word for defect in several for word in defect.severity}
    return [word for word in SEVERITIES if word in met]


def by_severity(several: Iterable[Defect]) -> dict[str, list[Defect]]:
    """The defects by their worst word."""
    groups: dict[str, list[Defect]] = defaultdict(list)
    for defect in several:
        groups[defect.worst].append(defect)
    return dict(groups)
