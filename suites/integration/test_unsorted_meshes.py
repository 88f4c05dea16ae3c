"""Training and full checkpoints over a mesh that lists its ranks out of order.

Sites order ranks by the network's topology. torch sorts the ranks of a mesh's groups, and what it
trains with goes by the number in the group, not by the mesh's coordinate.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from integration.kit.checkpoints import assert_full, dress, given, spoil, whole
from integration.kit.models import MLP
from integration.kit.oracle import PLAIN, Pair
from integration.kit.recipes import RECIPES

FULL = StateDictOptions(full_state_dict=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def _trained(recipe: str, ranks: list[list[int]], device: torch.device) -> Pair:
    grid = DeviceMesh(device.type, ranks, mesh_dim_names=("dp", "tp"))
    made = RECIPES[recipe].make(MLP, device, grid=grid, change=dress)
    pair = Pair(made, change=dress)
    pair.train(PLAIN, f"{recipe} on {ranks}")
    return pair


def _saved(pair: Pair, what: str) -> None:
    expected = {name: t.detach() for name, t in pair.oracle.state_dict().items()}
    state = get_model_state_dict(pair.trainee.wrapped, options=FULL)
    assert_full(state, expected, pair.trainee.device, what)


def _loaded(pair: Pair, options: StateDictOptions, what: str) -> None:
    expected = whole(MLP)
    spoil(pair.trainee.wrapped)
    set_model_state_dict(pair.trainee.wrapped, given(expected, options), options=options)
    pair.oracle.load_state_dict(expected)
    pair.evaluate(what)
    _saved(pair, f"{what}, and saved")


@pytest.mark.exercises("checkpoint.model")
class TestUnsortedMeshes:
    @pytest.mark.world(2)
    def test_fully_shard(self, device: torch.device) -> None:
        """A model over ranks [1, 0] trains, saves and loads as the unsharded one does."""
        pair = _trained("fully_shard", [[1], [0]], device)
        _saved(pair, "trained")
        _loaded(pair, FULL, "loaded by all")
        _loaded(pair, BROADCAST, "loaded by rank 0")

    @pytest.mark.world(2)
    @pytest.mark.parametrize("rows", [4, 3], ids=["even", "uneven"])
    @pytest.mark.thorough(but=["uneven"])
    def test_a_checkpoint_on_no_mesh(self, device: torch.device, shared: Path, rows: int) -> None:
        """What it has saved in shards must be the same model for who loads it whole."""
        model = torch.nn.Linear(2, rows, bias=False, device=device)
        with torch.no_grad():
            model.weight.copy_(numbers(rows, 2))
        fully_shard(model, mesh=DeviceMesh(device.type, [1, 0]))
        state_dict_saver.save(get_model_state_dict(model), checkpoint_id=shared)
        found = {"weight": torch.zeros(rows, 2, device=device)}
        state_dict_loader.load(found, checkpoint_id=shared)
        assert_same(found["weight"], numbers(rows, 2))

    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", ["ddp", "fully_shard", "fsdp1"])
    @pytest.mark.thorough(but=["fsdp1"])
    def test_over_tensor_parallelism(self, recipe: str, device: torch.device) -> None:
        """So it does where tensor parallelism is another dimension of such a mesh."""
        pair = _trained(recipe, [[3, 1], [2, 0]], device)
        _saved(pair, "trained")
        _loaded(pair, FULL, "loaded by all")
        _loaded(pair, BROADCAST, "loaded by rank 0")
