"""Each planted loss is named: the tensor, the ranks, the first differing element, the defect."""

from __future__ import annotations

from typing import Any

import pytest

import shardproof
from prove.kit.losses import LOSSES, missing

LIMIT = 45.0


def _losses(world: int) -> list[Any]:
    return [pytest.param(loss, id=loss.what) for loss in LOSSES.values() if loss.world == world]


@pytest.mark.world(2, collective=60, limit=120)
@pytest.mark.parametrize("loss", _losses(2))
def test_two_ranks(rank: int, loss: Any) -> None:
    """A planted loss is named, on every rank alike."""
    job = loss.plant(rank)
    proof = shardproof.prove(
        job.model, job.optimizer, roads=loss.roads, limit=LIMIT, progress=False
    )
    assert not missing(loss, proof)
    assert proof.whole == (loss.severity == "note")


@pytest.mark.world(4, collective=60, limit=120)
@pytest.mark.parametrize("loss", _losses(4))
def test_four_ranks(rank: int, loss: Any) -> None:
    """A planted loss is named, on every rank alike."""
    job = loss.plant(rank)
    proof = shardproof.prove(
        job.model, job.optimizer, roads=loss.roads, limit=LIMIT, progress=False
    )
    assert not missing(loss, proof)
    assert not proof.whole
