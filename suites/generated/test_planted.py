"""Planted faults of each dimension are found within two minutes, and made small.

The searches are for nothing in particular: all functions, all dimensions, one seed.
"""

from __future__ import annotations

import pytest

from generated import planted

DIMENSIONS = (
    *("claims", "effects", "errors", "groups", "keys", "scale", "sequence", "ties", "time"),
    "values",
)
FAULTS = planted.faults()
PAIRS = 4
"""Tensors that show that one of two was copied before the other was looked at."""


def test_each_dimension_has_a_fault() -> None:
    """No dimension is left out."""
    assert sorted({fault.dimension for fault in FAULTS}) == sorted(DIMENSIONS)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found(fault: planted.Fault) -> None:
    """It is found within two minutes, and shrunk to two ranks and two tensors where these do."""
    found = planted.search(fault)
    assert found.difference, f"{fault.fault}: not found in {found.seconds:.0f} s"
    assert found.ranks <= 2, found
    assert found.tensors <= (PAIRS if fault.name == "half_copied" else 2), found
