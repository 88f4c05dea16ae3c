"""The subject under torch's public API: real training, real checkpoints.

A class of checks says with `exercises("training.ddp")` which area of the API it runs the subject
in; its checks use torch's public names only. On each rank the subject is put in place first: the
installed torch is there already, any other puts itself there with its `installed()`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness.settings.subjects import Subject


@pytest.fixture(autouse=True)
def in_place(request: pytest.FixtureRequest, subject: Subject) -> Iterator[None]:
    """Put the subject in place for the check, and take it out again."""
    if request.node.get_closest_marker("exercises") is None:
        subject.take_out()  # what judges install() itself begins without it
        yield
        return
    with subject.in_place():
        yield
