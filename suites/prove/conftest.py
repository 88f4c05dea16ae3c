"""prove() as its users call it: torch as it is, unless a check puts the subject in its place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness.settings.subjects import Subject

pytest.register_assert_rewrite("prove.kit")


def pytest_itemcollected(item: pytest.Item) -> None:
    """What torch warns of while a job is made is not prove's."""
    item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(autouse=True)
def in_place(request: pytest.FixtureRequest) -> Iterator[None]:
    """Torch as it is, or with the reference where the check is marked `exercises`."""
    if request.node.get_closest_marker("world") is None:
        yield
        return
    subject: Subject = request.getfixturevalue("subject")
    if request.node.get_closest_marker("exercises") is None:
        subject.take_out()
        yield
        return
    with subject.in_place():
        yield
