"""Asserts in the kit explain themselves as in a check; what torch says of itself is quiet."""

import pytest

pytest.register_assert_rewrite("conformance.kit")

# Torch warns of its own parts that will go; the contract is silent about them, and a subject
# cannot read a ShardedTensor's shards without the first.
_QUIET = pytest.mark.filterwarnings(
    "ignore:Please use DTensor instead:FutureWarning",
    "ignore:`_get_pg_default_device` will be deprecated:UserWarning",
    "ignore:Multiple backends are registered with this ProcessGroup:UserWarning",
)


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(_QUIET)
