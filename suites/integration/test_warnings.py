"""What the subject warns of under torch's public API; see suites/conformance/test_warnings.py."""

from __future__ import annotations

import pytest


@pytest.mark.warns_of_nothing
@pytest.mark.law("isolation")
@pytest.mark.should("a warning tells the user something; only a run with -W error ends by it")
class TestWarnings:
    @pytest.mark.exercises("warnings")
    def test_training_and_checkpoints_warn_of_nothing(self) -> None:
        """No warning comes out of the set while torch's public API uses it."""
