"""What callers of upstream's functions do today, and get a right answer for.

A module that adapts a checkpoint in its own hooks, ranks that share no names, an optimizer whose
step is now a number and now a tensor: all of these work with torch, and so with any subject.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from conformance.kit.agree import assert_raises_everywhere, attempt, exchange
from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.functions import Function, each
from conformance.kit.landing import assert_landed, target
from conformance.kit.layouts import R, S, dtensor


class Printed:
    """An object that prints its text, as one without a text prints its address."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherNames:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_names_of_its_own_where_nothing_travels(
        self, judged: Any, mesh: Any, rank: int
    ) -> None:
        """Replicated and plain leaves under names that only their rank has must come back."""
        shared, mine = numbers(6, 4), numbers(3, 2, salt=rank)
        got = judged(
            {
                f"expert.{rank}": dtensor(mine, mesh(2), [R]),
                f"stage.{rank}": mine.clone(),
                "shared": dtensor(shared, mesh(2), [S(0)]),
            }
        )
        assert list(got) == [f"expert.{rank}", f"stage.{rank}", "shared"], f"keys {list(got)}"
        assert_same(got[f"expert.{rank}"], mine, "expert")
        assert_same(got[f"stage.{rank}"], mine, "stage")
        assert_same(got["shared"], shared, "shared")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_keys_whose_text_differs(self, judged: Any, mesh: Any, rank: int) -> None:
        """Keys that each rank prints otherwise, alone or in a tuple, must lead to their leaves."""
        one, other = Printed(f"one of {rank}"), Printed(f"other of {rank}")
        keys = (one, other, (other, "exp_avg"), ("state", (one, 0)))
        value = {key: dtensor(numbers(6, 4, salt=n), mesh(2), [S(0)]) for n, key in enumerate(keys)}
        got = judged(value)
        for n, key in enumerate(keys):
            assert_same(got[key], numbers(6, 4, salt=n), str(n))

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_one_name_with_other_values(self, judged: Any, mesh: Any, rank: int) -> None:
        """Replicated leaves of one name that differ between ranks must come back as they are."""
        mine = numbers(3 + rank, 2, salt=rank)
        got = judged({"expert": dtensor(mine, mesh(2), [R])})
        assert_same(got["expert"], mine, "expert")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("options", [{}, {"cpu_offload": True}], ids=str)
    def test_names_of_its_own_along_a_replicated_dimension(
        self, judged: Any, mesh: Any, options: Any
    ) -> None:
        """Leaves that one row of a mesh shards must be gathered there, whatever other rows hold.

        Experts that are split from a stack are so: replicated over the dimension that split them.
        """
        grid = mesh(2, 2)
        row = grid.get_coordinate()[0]
        mine = numbers(5, 4, salt=row)
        value = {
            f"expert.{row}": dtensor(mine, grid, [R, S(0)]),
            "shared": dtensor(numbers(4, 4), grid, [S(0), S(1)]),
        }
        got = judged(value, **options)
        assert_same(got[f"expert.{row}"], mine, "expert")
        assert_same(got["shared"], numbers(4, 4), "shared")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    def test_what_travels_has_to_be_known(self, judged: Any, mesh: Any, world: Any) -> None:
        """A sharded leaf that the other rank holds replicated must raise on both, by name."""
        placements = [R] if world.rank else [S(0)]
        value = {"layer.odd": dtensor(numbers(4, 4), mesh(2), placements)}
        assert_raises_everywhere(world, lambda: judged(value), "layer.odd")


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherTakers:
    @pytest.mark.law("isolation")
    @pytest.mark.world(4, collective=8, limit=25)
    @pytest.mark.parametrize("placement", [S(0), R], ids=str)
    @pytest.mark.thorough(but=["R"])
    def test_nobody_who_holds_a_part_is_a_taker(
        self, judged: Any, mesh: Any, world: Any, placement: Any
    ) -> None:
        """A model on ranks 2 and 3 alone, gathered for rank 0, must be refused, or have a taker."""
        half, full = mesh(2, ranks=[2, 3]), numbers(4, 4)
        got: list[Any] = []
        error = None
        if world.rank >= 2:
            value = {"w": dtensor(full, half, [placement])}
            error = attempt(lambda: got.append(judged(value, cpu_offload=True, ranks_only=(0,))))
        told = exchange(world, [None if error is None else str(error), got != [] and got != [{}]])
        taken = any(has for _, has in told)
        refused = [text is not None and "w" in text for text, _ in told[2:]]
        assert taken or all(refused), f"nobody has the weights, and nobody is told: {told}"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    def test_replicas_on_meshes_of_their_own(self, judged: Any, mesh: Any, rank: int) -> None:
        """A model that ranks 0 and 1 hold, and 2 and 3 as well, must be gathered for rank 0."""
        low, high = mesh(2, ranks=[0, 1]), mesh(2, ranks=[2, 3])
        full = numbers(4, 4)
        value = {"w": dtensor(full, low if rank < 2 else high, [S(0)]), "step": numbers()}
        got = judged(value, cpu_offload=True, ranks_only=(0,))
        if rank == 0:
            assert_same(got["w"], full, "w")
            assert_same(got["step"], numbers(), "step")
        elif rank == 1:
            assert got == {}, f"keys {list(got)}, expected none"

    @pytest.mark.law("symmetry")
    @pytest.mark.world(4, collective=8, limit=25)
    def test_a_part_that_nobody_gets(self, judged: Any, mesh: Any, world: Any) -> None:
        """A leaf on ranks that get nothing, beside one of all ranks, must raise on all, by name."""
        value: dict[str, Any] = {"fine": dtensor(numbers(4, 4), mesh(4), [S(0)])}
        half = mesh(2, ranks=[2, 3])
        if world.rank >= 2:
            value["layer.odd"] = dtensor(numbers(4, 4), half, [S(0)])
        call = lambda: judged(value, cpu_offload=True, ranks_only=(0,))  # noqa: E731
        assert_raises_everywhere(world, call, "layer.odd")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    def test_a_replica_elsewhere_is_taken(self, judged: Any, mesh: Any, rank: int) -> None:
        """A model that each row of a mesh holds must be gathered for rank 0 from its row alone."""
        grid = mesh(2, 2, names=("dp", "tp"))
        full = numbers(4, 4)
        got = judged({"w": dtensor(full, grid["tp"], [S(0)])}, cpu_offload=True, ranks_only=(0,))
        if rank:
            assert got == {}, f"keys {list(got)}, expected none"
        else:
            assert_same(got["w"], full, "w")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_ranks_that_do_not_exist(self, judged: Any, mesh: Any, rank: int) -> None:
        """A taker that is none of the world's ranks must do no harm to those that are."""
        full = numbers(4, 4)
        got = judged({"w": dtensor(full, mesh(2), [S(0)])}, ranks_only=(1, 7, 1))
        assert list(got) == (["w"] if rank == 1 else []), f"keys {list(got)}"
        if rank:
            assert_same(got["w"], full, "w")


class Padding(nn.Module):
    """A module that pads what it loads, in one of the ways that modules have."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers(6, 2, salt=1), requires_grad=False)
        self.way = way
        if way == "hook":
            self.register_load_state_dict_pre_hook(self.pad)

    @staticmethod
    def pad(_module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        weight = state_dict[prefix + "weight"]
        state_dict[prefix + "weight"] = torch.cat([weight, weight.new_zeros(1, 2)])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        if self.way == "override":
            self.pad(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *others)


def loaded(way: str, load: Any) -> Padding:
    """A module whose own means adapt what `load(full, local)` puts into its state dict."""
    module = Padding(way)
    local = dict(module.state_dict())
    load({"weight": numbers(5, 2)}, local)
    module.load_state_dict(local)
    return module


ADAPTING = pytest.mark.parametrize("way", ["hook", "override"])


def bits_of(full: torch.Tensor) -> torch.Tensor:
    return full.to(torch.float8_e4m3fn).view(torch.uint8)


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeAdapting:
    @ADAPTING
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_the_module_adapts_the_shape(self, judged: Any, device: torch.device, way: str) -> None:
        """A full tensor of another shape must reach the module, which may adapt it."""
        module = loaded(way, lambda full, local: judged(full, local, device))
        expected = torch.cat([numbers(5, 2), numbers(5, 2).new_zeros(1, 2)])
        assert_same(module.weight.detach(), expected, "weight")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_the_module_sees_the_checkpoint_s_dtype(
        self, judged: Any, device: torch.device
    ) -> None:
        """A plain target must be given the full tensor's bits: its module may read them so."""
        packed = bits_of(numbers(4, 2))
        local = {"w": numbers(4, 2, salt=1, dtype=torch.bfloat16), "usual": numbers(2)}
        judged({"w": packed, "usual": numbers(2, salt=1)}, local, device)
        assert_same(local["w"], packed, "w")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_one_element_for_a_scalar(self, judged: Any, mesh: Any, device: torch.device) -> None:
        """One element must land where a scalar is, as torch's modules take it."""
        one = numbers(1, salt=1)
        local = {"plain": numbers(), "sharded": dtensor(numbers(), mesh(1), [R])}
        judged({"plain": one, "sharded": one}, local, device)
        for name, value in local.items():
            held = value.to_local() if isinstance(value, DTensor) else value
            assert_same(held.reshape(()), one.reshape(()), name)

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_what_is_placed_already(self, judged: Any, mesh: Any, device: torch.device) -> None:
        """A DTensor in the full state dict, placed as its target is, must land as it is."""
        full = numbers(6, 4)
        given = dtensor(full, mesh(2), [S(0)])
        cast, longer = numbers(6, 4, dtype=torch.float64), numbers(7, 4)
        local = {
            "w": target(full, mesh(2), [S(0)]),
            "cast": target(full, mesh(2), [S(0)]),
            "longer": target(full, mesh(2), [S(0)]),
            "usual": numbers(2),
        }
        placed = {"w": given, "cast": dtensor(cast, mesh(2), [S(0)])}
        placed["longer"] = dtensor(longer, mesh(2), [S(0)])
        judged({**placed, "usual": numbers(2, salt=1)}, local, device)
        assert_landed(local["w"], full, mesh(2), [S(0)], "w")
        assert_landed(local["cast"], cast, mesh(2), [S(0)], "cast")
        assert_landed(local["longer"], longer, mesh(2), [S(0)], "longer")
        assert_same(local["usual"], numbers(2, salt=1), "usual")

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("held", ["tensor", "number"])
    def test_a_number_is_no_tensor(self, judged: Any, device: torch.device, held: str) -> None:
        """A number for a tensor with dimensions must be refused by name, and the reverse."""
        pair = (numbers(4), 7) if held == "tensor" else (7, numbers(4))
        local = {"layer.odd": pair[0], "fine": numbers(2)}
        with pytest.raises((TypeError, ValueError), match=r"layer\.odd"):
            judged({"fine": numbers(2, salt=1), "layer.odd": pair[1]}, local, device)
        assert_same(local["fine"], numbers(2), "what was written before the error")


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastAdapting:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_a_dtensor_with_attributes_of_a_parameter(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """A DTensor that was given a local Parameter's attributes must be taken for itself."""
        full = numbers(6, 4)
        held: dict[str, Any] = {str(p): target(full, mesh(2), [p]) for p in (S(0), R)}
        for leaf in held.values():
            leaf._local_tensor = leaf._local_tensor.t().contiguous().t()  # looked at one by one
            leaf._st_info = leaf._spec
        local = dict(held)
        judged(dict.fromkeys(local, full) if rank == 0 else {}, local, device)
        for placement in (S(0), R):
            assert local[str(placement)] is held[str(placement)], f"{placement}: another object"
            assert_landed(held[str(placement)], full, mesh(2), [placement], str(placement))

    @ADAPTING
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_the_module_adapts_the_shape(
        self, judged: Any, rank: int, device: torch.device, way: str
    ) -> None:
        """A full tensor of another shape must reach the module, which may adapt it."""
        module = loaded(way, lambda full, local: judged(full if rank == 0 else {}, local, device))
        expected = torch.cat([numbers(5, 2), numbers(5, 2).new_zeros(1, 2)])
        assert_same(module.weight.detach(), expected, "weight")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_the_module_sees_the_checkpoint_s_dtype(
        self, judged: Any, rank: int, device: torch.device
    ) -> None:
        """A plain target must be given the full tensor's bits: its module may read them so."""
        packed = bits_of(numbers(4, 2))
        local = {"w": numbers(4, 2, salt=1, dtype=torch.bfloat16)}
        judged({"w": packed} if rank == 0 else {}, local, device)
        assert_same(local["w"], packed, "w")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    def test_another_shape_on_one_rank(self, judged: Any, world: Any, device: torch.device) -> None:
        """A plain target that one rank alone has in another shape must raise on all, by name."""
        local = {"layer.odd": numbers(4 + world.rank, 2, salt=1)}
        full = {"layer.odd": numbers(4, 2)} if world.rank == 0 else {}
        assert_raises_everywhere(world, lambda: judged(full, local, device), "layer.odd")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_one_element_for_a_scalar(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """One element must land where a scalar is, as torch's modules take it."""
        one = numbers(1, salt=1)
        local = {"plain": numbers(), "sharded": dtensor(numbers(), mesh(2), [R])}
        judged({"plain": one, "sharded": one} if rank == 0 else {}, local, device)
        for name, value in local.items():
            held = value.to_local() if isinstance(value, DTensor) else value
            assert_same(held.reshape(()), one.reshape(()), name)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    @pytest.mark.parametrize("held", ["tensor", "DTensor", "number"])
    def test_a_number_is_no_tensor(
        self, judged: Any, mesh: Any, world: Any, device: torch.device, held: str
    ) -> None:
        """A number for a tensor with dimensions, or such a tensor for a number, raises on all."""
        have: Any = 7
        if held != "number":
            have = target(numbers(4), mesh(2), [S(0)]) if held == "DTensor" else numbers(4)
        local = {"fine": numbers(2), "layer.odd": have}
        offered: Any = numbers(4) if held == "number" else 7
        full = {"fine": numbers(2, salt=1), "layer.odd": offered} if world.rank == 0 else {}
        assert_raises_everywhere(world, lambda: judged(full, local, device), "layer.odd")
        assert_same(local["fine"], numbers(2), "what was written before the error")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_a_step_is_a_number_or_a_scalar(
        self, judged: Any, rank: int, device: torch.device
    ) -> None:
        """A number for a 0-dim tensor must land, and the reverse: optimizers hold either."""
        local: dict[str, Any] = {"a.step": numbers(), "b.step": 0, "lr": 0.5, "none": numbers(3)}
        full = {"a.step": 3, "b.step": torch.tensor(4.0), "lr": torch.tensor(0.25), "none": None}
        judged(full if rank == 0 else {}, local, device)
        got = {key: None if value is None else float(value) for key, value in local.items()}
        assert got == {"a.step": 3.0, "b.step": 4.0, "lr": 0.25, "none": None}, f"got {got}"


@pytest.mark.law("compatibility")
@pytest.mark.world(2)
@each(lambda function: function.name in ("_broadcast_state_dict", "_distribute_state_dict"))
def test_extra_state_is_the_module_s_own(
    function: Function, subject: Any, rank: int, device: torch.device
) -> None:
    """Extra state must land whatever it is and was, a submodule's and that of the model itself."""
    judged = subject.function(f"_state_dict_utils.{function.name}")
    for prefix in ("", "a.", "module.a.0."):
        key = f"{prefix}_extra_state"
        for held, offered in ((numbers(3), 2), (1, numbers(5)), (numbers(3), True)):
            local, full = {key: held}, {key: offered}
            judged(full if rank == 0 or not function.talks else {}, local, device)
            if isinstance(offered, torch.Tensor):
                assert_same(local[key], offered, key)
            else:
                assert local[key] == offered, f"{key}: got {local[key]!r}, expected {offered!r}"
