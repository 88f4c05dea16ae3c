"""Groups that are not the whole world: some of the ranks, or all of them in another order."""

from __future__ import annotations

import pytest
import torch.distributed as dist

UNSORTED = pytest.mark.needs("unsorted groups")
"""The mark of a check, or of a parameter, whose groups are numbered otherwise than the world."""


def group(*ranks: int) -> dist.ProcessGroup:
    """A group of these global ranks, numbered in the order given; all ranks of the world call it.

    Where that is not their own order, the check is marked UNSORTED, for not every torch can.
    A rank outside gets torch's mark for that and must not use it.
    """
    if list(ranks) == sorted(ranks):
        made = dist.new_group(list(ranks))
    else:
        # DeviceMesh and new_group sort by default; only this makes number and global rank differ.
        made = dist.new_group(list(ranks), sort_ranks=False)
    assert made is not None
    return made
