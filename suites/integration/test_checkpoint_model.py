"""The model's state dict through torch.distributed.checkpoint.state_dict, under every recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel

from conformance.kit.compare import assert_same
from integration.kit.checkpoints import (
    FLAT,
    GETS,
    HYBRID,
    SETS,
    Got,
    assert_full,
    assert_got,
    assert_loaded,
    assert_sharded,
    dress,
    dress_and_spoil,
    given,
    said,
    spoil,
    trainee,
    whole,
)
from integration.kit.models import MLP, TRANSFORMER
from integration.kit.recipes import GATHERS, gathering

FULL = StateDictOptions(full_state_dict=True)


def get(recipe: str, device: torch.device, *, full_on_cpu: bool) -> None:
    """Every combination of options of a get, twice: a second call gives the same."""
    mine = trainee(recipe, TRANSFORMER, device)
    for got in GETS:
        if (got.full and got.offload) is not full_on_cpu:
            continue
        for number in ("first", "second"):
            state = get_model_state_dict(mine.wrapped, options=got.options)
            assert_got(state, got, TRANSFORMER, device, f"{said(got.options)}, {number} call")


def load(recipe: str, device: torch.device) -> None:
    """Every combination of options of a set, into a model that holds other values."""
    same = trainee(recipe, TRANSFORMER, device)
    fresh = trainee(recipe, TRANSFORMER, device, spoilt=True)
    expected = whole(TRANSFORMER)
    sharded = get_model_state_dict(same.wrapped)
    rows, _ = TRANSFORMER.batch(3, 8)
    with torch.no_grad():
        output = same.wrapped(same.mine(rows))
    before = [(n, id(p), p.requires_grad) for n, p in fresh.wrapped.named_parameters()]
    for options in SETS:
        what = said(options)
        spoil(fresh.wrapped)
        source = given(expected, options) if options.full_state_dict else dict(sharded)
        result = set_model_state_dict(fresh.wrapped, source, options=options)
        assert not result.missing_keys, f"{what}: missing {result.missing_keys}"
        assert not result.unexpected_keys, f"{what}: unexpected {result.unexpected_keys}"
        assert_loaded(fresh, expected, what)
        after = [(n, id(p), p.requires_grad) for n, p in fresh.wrapped.named_parameters()]
        assert after == before, f"{what}: the optimizer's parameters are no longer the model's"
    with torch.no_grad():
        assert_same(fresh.wrapped(fresh.mine(rows)), output, "output after the loads")


@pytest.mark.exercises("checkpoint.model")
class TestGetModelStateDict:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", gathering(FLAT, "replicate"))
    @pytest.mark.thorough(but=["fsdp1"])
    def test_each_option(self, device: Any, recipe: str) -> None:
        """Each combination gives the oracle's keys and values, whole or this rank's part."""
        get(recipe, device, full_on_cpu=False)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", gathering(FLAT, "replicate"))
    @pytest.mark.thorough
    def test_full_on_the_cpu(self, device: Any, recipe: str) -> None:
        """With full_state_dict and cpu_offload rank 0 gets the whole state, the others {}."""
        get(recipe, device, full_on_cpu=True)

    @pytest.mark.law("isolation")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", gathering(FLAT, "replicate"))
    @pytest.mark.thorough(but=["ddp"])
    def test_what_was_got_stays(self, device: Any, recipe: str) -> None:
        """A state dict in CPU memory, or a full one, is a snapshot: training does not change it."""
        for got in (Got(False, True, False), Got(True, False, False)):
            mine = trainee(recipe, TRANSFORMER, device)
            state = get_model_state_dict(mine.wrapped, options=got.options)
            spoil(mine.wrapped)
            assert_got(state, got, TRANSFORMER, device, f"{said(got.options)}, after training")

    @pytest.mark.law("values")
    @pytest.mark.world(8)
    @pytest.mark.parametrize("recipe", HYBRID)
    @pytest.mark.thorough
    def test_each_option_hybrid(self, device: Any, recipe: str) -> None:
        """With replicas each combination must give the oracle's keys and values, too."""
        get(recipe, device, full_on_cpu=False)


@pytest.mark.exercises("checkpoint.model")
class TestSetModelStateDict:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", gathering(FLAT))
    @GATHERS
    @pytest.mark.thorough(but=["fully_shard"])
    def test_each_option(self, device: Any, recipe: str) -> None:
        """Each combination puts the given values into the parameters that the model has."""
        load(recipe, device)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("original", [True, False], ids=["original", "flat"])
    @pytest.mark.thorough(but=["flat"])
    def test_fsdp1_alone(self, device: Any, original: bool) -> None:
        """A full state dict lands in FSDP1 without tensor parallelism, too."""
        line = init_device_mesh(device.type, (2,), mesh_dim_names=("dp",))
        for options in SETS:
            if not options.full_state_dict or (not original and options.broadcast_from_rank0):
                continue
            module = MLP.build().to(device)
            dress_and_spoil(module)
            wrapped = FullyShardedDataParallel(
                module, device_mesh=line, device_id=device, use_orig_params=original
            )
            set_model_state_dict(wrapped, given(whole(MLP), options), options=options)
            found = get_model_state_dict(wrapped, options=FULL)
            assert_full(found, whole(MLP), device, said(options))

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("original", [True, False], ids=["original", "flat"])
    @pytest.mark.thorough(but=["original"])
    def test_fsdp1_in_one_stage(self, device: Any, original: bool) -> None:
        """FSDP1 in a stage of a pipeline, without tensor parallelism, saves shards and loads."""
        root = init_device_mesh(device.type, (1, 2), mesh_dim_names=("pp", "dp"))
        models = []
        for spoilt in (False, True):
            module = MLP.build().to(device)
            (dress_and_spoil if spoilt else dress)(module)
            models.append(
                FullyShardedDataParallel(
                    module, device_mesh=root["dp"], device_id=device, use_orig_params=original
                )
            )
        saved, fresh = models
        sharded = get_model_state_dict(saved)
        assert_sharded(sharded, whole(MLP), device, "saved")
        set_model_state_dict(fresh, sharded)
        assert_full(get_model_state_dict(fresh, options=FULL), whole(MLP), device, "loaded")

    @pytest.mark.law("values")
    @pytest.mark.world(8)
    @pytest.mark.parametrize("recipe", HYBRID)
    @GATHERS
    @pytest.mark.thorough
    def test_each_option_hybrid(self, device: Any, recipe: str) -> None:
        """With replicas each combination must put the values into the parameters, too."""
        load(recipe, device)
