"""Tensors that hold more than elements at strides: sparse, quantized, wrappers of other tensors.

No part of them can be cut out, or sent as bytes. So they travel by their own operations, land
whole, or are refused by name on every rank; a source that finds out while the others wait for its
bytes leaves them waiting, and one that sends the elements alone loses the rest in silence.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from conformance.kit.agree import assert_raises_everywhere
from conformance.kit.cases import each
from conformance.kit.compare import assert_same, assert_type, fingerprint
from conformance.kit.data import numbers
from conformance.kit.landing import assert_landed, blank, target
from conformance.kit.layouts import R, S, dtensor, part, placement_id
from conformance.kit.levels import OPAQUE
from conformance.kit.refusals import refused

# Sharing memory goes through a storage class that torch announces the end of.
quiet = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
CPU = torch.device("cpu")
INDIVISIBLE = ["coo", "csr", "quantized"]
KINDS = [*INDIVISIBLE, "wrapper"]


def beyond(*kinds: str) -> Any:
    """All kinds as parameters; of `kinds` the clause asks more than upstream does right."""
    should = pytest.mark.should(OPAQUE)
    return pytest.mark.parametrize(
        "kind", [pytest.param(k, marks=should) if k in kinds else k for k in KINDS]
    )


def wrapper(full: torch.Tensor) -> TwoTensor:
    """A wrapper around `full` and another tensor of its shape."""
    return TwoTensor(full, full.neg())


def opaque(kind: str, device: torch.device, salt: int = 0) -> torch.Tensor:
    """A (5, 3) tensor with some zeros, as one of these kinds."""
    full = numbers(5, 3, salt=salt, device=device)
    full[1] = 0
    if kind == "wrapper":
        return wrapper(full)
    with warnings.catch_warnings():
        # CSR tensors are announced as beta, quantized ones as deprecated.
        warnings.simplefilter("ignore")
        if kind == "quantized":
            return torch.quantize_per_tensor(full, 0.5, 3, torch.qint8)
        return full.to_sparse_csr() if kind == "csr" else full.to_sparse().coalesce()


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The strided tensors that hold it."""
    if isinstance(tensor, TwoTensor):
        return [tensor.a, tensor.b]
    if tensor.is_quantized:
        return [tensor.int_repr()]
    if tensor.layout is torch.sparse_csr:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor.coalesce().indices(), tensor.coalesce().values()]


def overwrite(tensor: torch.Tensor, kind: str) -> None:
    """Change all that it holds, in place; the parts of a quantized tensor are copies."""
    if kind == "quantized":
        tensor.copy_(opaque(kind, tensor.device, salt=1))
    else:
        for mine in parts(tensor):
            mine.zero_()


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherWrapped:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("placements", [[S(0)], [S(1)], [R]], ids=placement_id)
    @pytest.mark.parametrize("only", [(), (1,)], ids=["all", "one"])
    @pytest.mark.thorough(but=["all-S0", "all-R", "one-S1"])
    def test_all_that_it_holds_is_gathered(
        self, judged: Any, mesh: Any, world: Any, placements: Any, only: tuple[int, ...]
    ) -> None:
        """A DTensor around a wrapper comes back as that, whole, beside a plain one like it.

        Over Gloo on a device, where its own gather would end the process
        (https://github.com/pytorch/pytorch/issues/152645), it is refused by name.
        """
        line, full, rank = mesh(2), numbers(6, 4), world.rank
        mine = part(full, line, placements).clone()
        given = {
            "plain": dtensor(full, line, placements),
            "wrapped": dtensor(full, line, placements, local=wrapper(mine)),
        }
        if world.backend == "gloo" and full.device.type != "cpu" and placements != [R]:
            assert_raises_everywhere(world, lambda: judged(given, ranks_only=only), "wrapped")
            return
        got = judged(given, ranks_only=only)
        if only and rank not in only:
            assert got == {}, f"keys {list(got)}"
            return
        assert_type(got["wrapped"], TwoTensor, "wrapped")
        for mine, expected in zip(parts(got["wrapped"]), (full, full.neg()), strict=True):
            assert_same(mine, expected, "wrapped")
        assert_same(got["plain"], full, "plain")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    def test_one_rank_has_none(self, judged: Any, mesh: Any, world: Any) -> None:
        """A wrapper on one rank, where the other has a plain tensor, raises on both, by name."""
        line, full = mesh(2), numbers(6, 4)
        local = part(full, line, [S(0)]).clone()
        odd = dtensor(full, line, [S(0)], local=wrapper(local) if world.rank else local)
        assert_raises_everywhere(
            world, lambda: judged({"fine": full, "layer.odd": odd}), "layer.odd"
        )


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastOpaque:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.thorough(but=["coo", "quantized", "wrapper"])
    def test_it_is_refused_everywhere(
        self, judged: Any, mesh: Any, world: Any, device: torch.device, kind: str
    ) -> None:
        """A sparse, quantized or wrapper tensor that is wanted must be refused by all, by name."""
        full = {"fine": numbers(4, 3, device=device), "layer.odd": opaque(kind, device)}
        like = numbers(5, 3, device=device)
        line = mesh(2)
        odd = target(like, line, [S(0)]) if world.rank else blank(like)
        mine: dict[str, Any] = {"fine": blank(full["fine"]), "layer.odd": odd}
        before = fingerprint(mine)
        assert_raises_everywhere(
            world, lambda: judged(full if world.rank == 0 else {}, mine, device), "layer.odd"
        )
        assert fingerprint(mine) == before, "the local dict has changed"

    @pytest.mark.law("values")
    @pytest.mark.should(OPAQUE)
    @pytest.mark.world(2, collective=8, limit=25)
    def test_what_nobody_wants_does_no_harm(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """A sparse tensor that no rank has a place for keeps no other from landing."""
        wanted = numbers(5, 3, device=device)
        mine: dict[str, Any] = {"w": target(wanted, mesh(2), [S(0)]), "none": None}
        odd = opaque("coo", device)
        judged({"extra": odd, "w": wanted, "none": odd} if rank == 0 else {}, mine, device)
        assert list(mine) == ["w", "none"], f"keys {list(mine)}"
        assert_landed(mine["w"], wanted, mesh(2), [S(0)], "w")
        assert mine["none"] is None

    @pytest.mark.law("values")
    @pytest.mark.world(2, collective=8, limit=25)
    def test_what_follows_a_wrapper(self, judged: Any, rank: int, device: torch.device) -> None:
        """A weight behind a wrapper of two tensors must be its own, or left as it was."""
        full = {"odd": wrapper(numbers(4, 3, device=device)), "w": numbers(9, 3, device=device)}
        mine = {key: blank(value) for key, value in full.items()}
        expected = full["w"].clone()
        try:
            judged(full if rank == 0 else {}, mine, device)
        except (TypeError, ValueError, RuntimeError, NotImplementedError):
            expected = blank(expected)
        assert_same(mine["w"], expected, "behind the wrapper")


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeOpaque:
    @pytest.mark.law("values")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_lands_whole(self, judged: Any, device: torch.device, kind: str) -> None:
        """A sparse, quantized or wrapper tensor must land whole in a plain target of its kind."""
        full = opaque(kind, device)
        local = {"w": opaque(kind, device, salt=1)}
        judged({"w": full}, local, device)
        got = local["w"]
        landed, expected = [(t.layout, t.dtype, tuple(t.shape)) for t in (got, full)]
        assert landed == expected, f"a {kind} tensor: {landed} has landed, expected {expected}"
        for number, (mine, theirs) in enumerate(zip(parts(got), parts(full), strict=True)):
            assert_same(mine, theirs, f"part {number}")
        if kind == "quantized":
            scales = [(t.q_scale(), t.q_zero_point()) for t in (got, full)]
            assert scales[0] == scales[1], f"scale and zero point {scales[0]}, expected {scales[1]}"

    @pytest.mark.law("isolation")
    @pytest.mark.should(OPAQUE)
    @pytest.mark.world(1)
    @pytest.mark.parametrize("kind", ["coo", "csr"])
    def test_the_full_tensor_lends_no_memory(
        self, judged: Any, device: torch.device, kind: str
    ) -> None:
        """A sparse tensor that has landed must not change when the full one is written to."""
        full = opaque(kind, device)
        local = {"w": opaque(kind, device, salt=1)}
        judged({"w": full}, local, device)
        expected = full.values().clone()
        full.values().zero_()
        assert_same(parts(local["w"])[-1], expected, "values")

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("kind", INDIVISIBLE)
    def test_it_is_refused_for_a_dtensor(
        self, judged: Any, mesh: Any, device: torch.device, kind: str
    ) -> None:
        """A sparse or quantized tensor for a DTensor must be refused by key; nothing is written."""
        fine = numbers(5, 3, device=device)
        local = {key: target(fine, mesh(2), [S(0)]) for key in ("fine", "layer.odd")}
        before = fingerprint(local)
        full = {"fine": fine, "layer.odd": opaque(kind, device)}
        refused(lambda: judged(full, local, device), "layer.odd", what=f"{kind} for a DTensor")
        assert fingerprint(local) == before, "the local dict has changed"


PAIRS = [*itertools.permutations(["dense", *KINDS], 2)]


def either(kind: str, salt: int = 0) -> torch.Tensor:
    """A tensor of one of the kinds, or a dense one."""
    return opaque(kind, CPU, salt) if kind in KINDS else numbers(5, 3, salt=salt)


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestCopyOpaque:
    @pytest.mark.law("values")
    @pytest.mark.world(1)
    @beyond("csr")
    def test_it_is_copied_whole(self, judged: Any, kind: str) -> None:
        """A sparse, quantized or wrapper tensor must be copied whole into a target of its kind."""
        source, into = opaque(kind, CPU), {"x": opaque(kind, CPU, salt=1)}
        judged({"x": source}, into)
        for number, (got, expected) in enumerate(zip(parts(into["x"]), parts(source), strict=True)):
            assert_same(got, expected, f"part {number}")

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(1)
    def test_a_target_of_another_kind(self, judged: Any) -> None:
        """A tensor for a target of another kind must be refused by path before any is copied."""

        def refuse(pair: tuple[str, str]) -> None:
            fine = numbers(3, salt=1)
            into = {"fine": fine, "deep": [{"odd": either(pair[1])}]}
            value = {"fine": numbers(3), "deep": [{"odd": either(pair[0])}]}
            refused(lambda: judged(value, into), "odd", what=f"{pair[0]} for {pair[1]}")
            assert_same(fine, numbers(3, salt=1), "what was copied before the error")

        each([pair for pair in PAIRS if "wrapper" not in pair], refuse)


@pytest.mark.judges("_state_dict_utils._check_state_dict_similarity")
class TestSimilarOpaque:
    @pytest.mark.law("values")
    @pytest.mark.should(OPAQUE)
    @pytest.mark.world(1)
    def test_kinds_have_to_agree(self, judged: Any) -> None:
        """Tensors of one kind are similar, of two kinds are not; neither is an error."""
        for kind in KINDS:
            got = judged({"x": either(kind)}, {"x": either(kind, salt=1)})
            assert got is True, f"{kind} and {kind}: {got}, expected True"
        for one, other in PAIRS:
            got = judged({"x": either(one)}, {"x": either(other)})
            assert got is False, f"{one} and {other}: {got}, expected False"


@pytest.mark.judges("_state_dict_utils._create_cpu_state_dict")
class TestCreateOpaque:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @beyond("coo", "csr", "quantized")
    def test_a_buffer_of_its_kind(self, judged: Any, kind: str) -> None:
        """A sparse, quantized or wrapper tensor must get a buffer like it, in memory of its own."""
        value = opaque(kind, CPU)
        before = [mine.clone() for mine in parts(value)]
        got = judged({"x": value})["x"]
        assert_type(got, type(value), f"the buffer of a {kind} tensor")
        made, expected = [(t.layout, t.dtype, tuple(t.shape)) for t in (got, value)]
        assert made == expected, f"the buffer of a {kind} tensor: {made}, expected {expected}"
        overwrite(got, kind)
        for number, (mine, was) in enumerate(zip(parts(value), before, strict=True)):
            assert_same(mine, was, f"part {number} of the original")

    @quiet
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @beyond("wrapper")
    def test_shared_or_refused(self, judged: Any, kind: str) -> None:
        """With share_memory all its parts must be shared, or, if sparse, it is refused by name."""
        value = {"layer.odd": opaque(kind, CPU)}
        if kind in ("coo", "csr"):
            refused(lambda: judged(value, share_memory=True), "layer.odd", what=kind)
            return
        got = judged(value, share_memory=True)["layer.odd"]
        for number, mine in enumerate([got] if kind == "quantized" else parts(got)):
            assert mine.is_shared(), f"part {number} is not in shared memory"


@pytest.mark.judges("_state_dict_utils._offload_state_dict_to_cpu")
class TestOffloadOpaque:
    @pytest.mark.law("isolation")
    @pytest.mark.should(OPAQUE)
    @pytest.mark.world(1)
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_snapshot_of_all_that_it_holds(
        self, judged: Any, device: torch.device, kind: str
    ) -> None:
        """A sparse, quantized or wrapper tensor's snapshot must stay when it is written to."""
        value, before = opaque(kind, device), opaque(kind, CPU)
        got = judged({"x": value})["x"]
        assert got.device.type == "cpu", f"{kind}: on {got.device}, expected the CPU"
        overwrite(value, kind)
        for number, (mine, expected) in enumerate(zip(parts(got), parts(before), strict=True)):
            assert_same(mine, expected, f"part {number}")
