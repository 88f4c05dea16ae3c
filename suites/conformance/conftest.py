"""Asserts in the kit explain themselves as those in a check do; what torch says of itself is quiet."""

import pytest

pytest.register_assert_rewrite("conformance.kit")

# Reading a ShardedTensor's shards warns that the class will go: no subject can do its work without.
_QUIET = pytest.mark.filterwarnings("ignore:Please use DTensor instead:FutureWarning")


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(_QUIET)
