"""What the sweeps over the functions of `tensor.parallel` are given besides the usual fixtures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conformance.kit.tp_kinds import Seat


@pytest.fixture
def seat(mesh: Any, world: Any, subject: Any) -> Seat:
    """Where the calls of a sweep are made."""
    # Here: pytest reads this file before the harness keeps torch's libraries from starting threads.
    from conformance.kit.tp_kinds import Seat

    return Seat(mesh, world, subject)
