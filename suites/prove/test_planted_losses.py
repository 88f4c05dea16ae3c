"""Each planted loss is named: the tensor, the ranks, the first differing element, the defect."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import shardproof
from prove.kit.loss import Loss, missing
from prove.kit.losses import LOSSES


def _losses(world: int) -> list[Any]:
    here = tuple(map(int, torch.__version__.split(".")[:2]))
    return [
        pytest.param(loss, id=loss.what)
        for loss in LOSSES.values()
        if loss.world == world and (loss.before is None or here < loss.before)
    ]


def _named(loss: Loss, rank: int) -> None:
    job = loss.plant(rank)
    proof = shardproof.prove(
        job.model, job.optimizer, roads=loss.roads, limit=loss.limit, progress=False
    )
    assert not missing(loss, proof)
    assert proof.whole == (loss.severity == "note")


@pytest.mark.world(2, collective=60, limit=120)
@pytest.mark.parametrize("loss", _losses(2))
def test_two_ranks(rank: int, loss: Any) -> None:
    """A planted loss is named, on every rank alike."""
    _named(loss, rank)


@pytest.mark.world(4, collective=60, limit=120)
@pytest.mark.parametrize("loss", _losses(4))
def test_four_ranks(rank: int, loss: Any) -> None:
    """A planted loss is named, on every rank alike."""
    _named(loss, rank)


@pytest.mark.world(8, collective=60, limit=120)
@pytest.mark.parametrize("loss", _losses(8))
@pytest.mark.thorough
def test_eight_ranks(rank: int, loss: Any) -> None:
    """A planted loss is named, on every rank alike."""
    _named(loss, rank)
