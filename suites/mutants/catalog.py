"""The faults: one entry each. `old` stands exactly once in its file of the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.system import devices
from mutants import (
    compatibility,
    copies,
    ddp,
    dimensions,
    fsdp,
    memory,
    opaque,
    refusals,
    silent,
    silent_results,
    subclasses,
    together,
)
from mutants.judge import REFERENCE, SUBJECT, CannotPlantError

_SUITE = "state_dict_utils/"


@dataclass(frozen=True)
class Mutant:
    """One deliberate defect, and the check files that must catch it."""

    name: str
    fault: str
    """What a user would suffer, in one line."""
    file: str
    """Below reference/shardproof."""
    old: str
    new: str
    checks: tuple[str, ...]
    """Files below suites/conformance, one of which must fail."""
    accelerator: bool = False
    """Whether it shows only where there is another device than the CPU."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """What the harness needs to know to judge it."""
        # Gloo, since its ranks share a GPU: NCCL would leave out what needs several.
        return ("--device", devices.accelerator(), "--backend", "gloo") if self.accelerator else ()

    def plant(self, folder: Path) -> None:
        """Put the fault into the copy of the package in the folder."""
        path = folder / SUBJECT / self.file
        source = path.read_text()
        if source.count(self.old) != 1:
            raise CannotPlantError(
                f"{self.name}: its text stands {source.count(self.old)} times in {self.file}, "
                "expected once: bring suites/mutants/catalog.py up to date"
            )
        path.write_text(source.replace(self.old, self.new))

    def choose(self, items: Mapping[str, pytest.Item]) -> list[str]:
        """The checks of the files that it names."""
        return [check for check in items if check.partition("::")[0] in self.checks]

    def lines(self) -> dict[str, set[int]]:
        """The lines of today's reference that it changes, by file below it."""
        before, found, _ = (REFERENCE / self.file).read_text().partition(self.old)
        first = before.count("\n") + 1
        return {self.file: set(range(first, first + self.old.count("\n") + 1))} if found else {}


def _mutant(
    name: str, fault: str, file: str, old: str, new: str, *checks: str, accelerator: bool = False
) -> Mutant:
    files = tuple(f"{_SUITE}test_{check}.py" for check in checks)
    return Mutant(name, fault, file, old, new, files, accelerator)


_PARTS = (
    compatibility,
    copies,
    dimensions,
    memory,
    opaque,
    silent,
    silent_results,
    together,
    refusals,
)

MUTANTS: tuple[Mutant, ...] = (
    # --- layout and transport -----------------------------------------------------------------
    _mutant(
        "uneven_chunks",
        "uneven shards are cut by floor instead of ceiling",
        "_core/sharding/blocks.py",
        "step = -(-size // parts)",
        "step = max(size // parts, 1)",
        "gather_state_dict",
        "distribute_state_dict",
    ),
    _mutant(
        "strided_as_plain",
        "_StridedShard is taken for Shard",
        "_core/sharding/blocks.py",
        "splits = int(placement.split_factor)",
        "splits = 1",
        "gather_state_dict",
    ),
    _mutant(
        "cuts_right_to_left",
        "placements apply right to left",
        "_core/sharding/blocks.py",
        "        return tuple(found)\n",
        "        return tuple(reversed(found))\n",
        "gather_state_dict",
    ),
    _mutant(
        "rows_in_group_order",
        "gathered rows stay in the group's order",
        "_core/comms/collectives.py",
        "    return rows[order]",
        "    return rows",
        "gather_state_dict",
        "gather_state_dict_laws",
        "all_gather_sharded_tensor",
    ),
    _mutant(
        "grid_in_any_order",
        "even shards are put in the wrong place where ranks and shards are ordered differently",
        "_core/sharding/uniform_grid.py",
        "        if starts == [tuple(map(mul, cell, size)) for cell in cells_in_order]:",
        "        if set(starts) == {tuple(map(mul, cell, size)) for cell in cells_in_order}:",
        "gather_state_dict",
        "gather_state_dict_laws",
        "large_tensors",
    ),
    _mutant(
        "large_in_group_order",
        "large tensors are gathered as if the ranks' shards followed each other",
        "_core/gathering/mesh_gather.py",
        "return grid is not None and grid.stacked",
        "return grid is not None",
        "large_tensors",
    ),
    _mutant(
        "large_alone_on_some_ranks",
        "a rank with a strided part of a large tensor is not waited for with a bucket",
        "_core/gathering/agree_on_leaves.py",
        "    limited = bool(large) and any(\n",
        "    limited = not layouts and any(\n",
        "large_tensors",
    ),
    _mutant(
        "scatter_from_global_rank_0",
        "the source is global rank 0, not the group's first",
        "_core/comms/collectives.py",
        "dist.scatter(into, parts, group=group, group_src=0,",
        "dist.scatter(into, parts, group=group, src=0,",
        "broadcast_state_dict",
        "broadcast_state_dict_laws",
    ),
    _mutant(
        "broadcast_from_global_rank_0",
        "the source is global rank 0, not the group's first",
        "_core/comms/collectives.py",
        "dist.broadcast(data, group=group, group_src=0,",
        "dist.broadcast(data, group=group, src=0,",
        "broadcast_state_dict",
        "broadcast_state_dict_laws",
    ),
    _mutant(
        "silent_disagreement",
        "ranks whose plans differ go on",
        "_core/comms/agreement.py",
        "same = len({row[0] for row in rows}) == 1 and not failed",
        "same = not failed",
        "gather_state_dict_laws",
    ),
    _mutant(
        "private_errors",
        "an error of one rank is not told to the others",
        "_core/comms/agreement.py",
        "same = len({row[0] for row in rows}) == 1 and not failed",
        "same = len({row[0] for row in rows}) == 1",
        "gather_state_dict_laws",
        "broadcast_state_dict_laws",
    ),
    # --- gather -------------------------------------------------------------------------------
    _mutant(
        "gather_for_everyone",
        "ranks outside ranks_only get the dict, too",
        "_state_dict_utils/gather.py",
        "    if destinations is not None and dist.get_rank() not in destinations:\n"
        "        return found.walk.nothing()\n    return copies",
        "    return copies",
        "gather_state_dict",
        "gather_state_dict_laws",
    ),
    _mutant(
        "gather_unties",
        "tied tensors travel twice and come apart",
        "_core/gathering/whole_tensors.py",
        "            leader = first.setdefault(key, path)\n",
        "            leader = path\n",
        "gather_state_dict",
        "gather_state_dict_laws",
    ),
    _mutant(
        "gather_aliases_replicas",
        "a gathered replicated leaf is the live weight",
        "_core/gathering/local_copies.py",
        "            return self._copy(local_of(tensor), id(tensor))\n",
        "            return tensor._local_tensor.detach()\n",
        "gather_state_dict",
        "gather_state_dict_laws",
    ),
    _mutant(
        "gather_a_leaf_at_a_time",
        "one collective per tensor",
        "_core/gathering/whole_tensors.py",
        "                by_bucket_key[layout.bucket_key].append(kind)\n",
        "                for leaf in kind:\n"
        "                    by_bucket_key[layout.bucket_key, leaf.path].append([leaf])\n",
        "gather_state_dict",
        "gather_state_dict_laws",
    ),
    _mutant(
        "partial_is_not_reduced",
        "a pending reduction is lost",
        "_core/sharding/partial_reduction.py",
        "    total = reduce(_FOLDS[op], values)",
        "    total = values[-1]",
        "gather_state_dict",
    ),
    # --- broadcast and distribute -------------------------------------------------------------
    _mutant(
        "strict_keeps_keys",
        "strict leaves keys that the full state dict lacks",
        "_core/loading/plan.py",
        "    if strict:\n",
        "    if False:\n",
        "broadcast_state_dict",
        "broadcast_state_dict_laws",
    ),
    _mutant(
        "offers_every_key",
        "keys that nobody wants travel",
        "_core/loading/transport.py",
        "            if any(needed):\n",
        "            needed = tuple([mine or (0,) for mine in needed])\n            if kinds:\n",
        "broadcast_state_dict",
        "broadcast_state_dict_laws",
    ),
    _mutant(
        "everyone_gets_everything",
        "sharded targets receive whole tensors by broadcast",
        "_core/loading/transport.py",
        "                apart.append(parcel)\n",
        "                together.append(Parcel(name, entry.dtype, parts.once, keys))\n",
        "broadcast_state_dict",
        "broadcast_state_dict_laws",
    ),
    _mutant(
        "source_keeps_nothing",
        "the source's own shards stay as they were",
        "_core/loading/transport.py",
        "        self._copy_for_source([key for parcel in rest for key in parcel.items])\n",
        "",
        "broadcast_state_dict",
        "large_tensors",
    ),
    _mutant(
        "offload_stays_on_device",
        "cpu_offload is forgotten",
        "_core/loading/targets.py",
        "CPU if self._cpu_offload else device,",
        "device,",
        "broadcast_state_dict",
        "broadcast_state_dict_laws",
        accelerator=True,
    ),
    _mutant(
        "source_dtype_wins",
        "a bf16 meta target becomes what the full tensor is",
        "_core/loading/target_spec.py",
        "        if assigned and _same_kind(value.dtype, self.source_dtype):\n",
        "        if False:\n",
        "broadcast_state_dict",
        "distribute_state_dict",
    ),
    _mutant(
        "shapes_unchecked",
        "a full tensor of the wrong shape is taken for a DTensor",
        "_core/loading/target_spec.py",
        "if value.size() != self.size and not",
        "if value.dim() != len(self.size) and not",
        "broadcast_state_dict_laws",
        "distribute_state_dict",
    ),
    _mutant(
        "broadcast_unifies_tied_objects",
        "of two DTensors over one memory the caller gets one twice, and loses a Parameter so",
        "_state_dict_utils/broadcast.py",
        " if not found[key].spec.keeps",
        "",
        "broadcast_state_dict",
    ),
    _mutant(
        "distribute_unifies_tied_objects",
        "of two DTensors over one memory the caller gets one twice, and loses a Parameter so",
        "_state_dict_utils/distribute.py",
        "        elif spec.keeps:\n",
        "        elif False:\n",
        "distribute_tensors",
    ),
    _mutant(
        "distribute_adds_keys",
        "keys that the target lacks appear",
        "_state_dict_utils/distribute.py",
        "        if key not in local_state_dict:\n            continue\n",
        "        if key not in local_state_dict:\n            values[key] = value\n"
        "            continue\n",
        "distribute_state_dict",
    ),
    *(_mutant(*fault) for module in _PARTS for fault in module.FAULTS),
    *(_mutant(*fault, accelerator=True) for fault in (*memory.ON_A_DEVICE, *together.ON_A_DEVICE)),
    # --- tensor parallel ----------------------------------------------------------------------
    *(
        Mutant(
            name,
            fault,
            "tensor/parallel/_data_parallel_utils.py",
            old,
            new,
            tuple(
                f"tensor_parallel/test_{function}.py"
                for function in ("flatten_tensor", "unflatten_tensor", "sync_grad_hook")
            ),
        )
        for name, fault, old, new in (
            (
                "flatten_trains_frozen",
                "a frozen weight starts to train",
                "return local.requires_grad_() if tensor.requires_grad else local",
                "return local.requires_grad_() if local.is_floating_point() else local",
            ),
            (
                "unflatten_takes_any_shape",
                "a local tensor of the wrong shape is accepted",
                "if tensor.shape != expected and not may_be_local_shape(spec, tensor.shape):",
                "if tensor.dim() != len(expected):",
            ),
            (
                "unflatten_hooks_pile_up",
                "each forward leaves a hook on the parameter",
                "    apply: Callable",
                "    tensor.register_hook(finish)\n    apply: Callable",
            ),
            (
                "unflatten_keeps_placements",
                "a gradient in other placements is taken for this rank's",
                "if grad.placements != placements:",
                "if False:",
            ),
            (
                "unflatten_gradient_pending",
                "a gradient reaches the parameter before it has arrived",
                "return ctx.finish(grad.to_local()), None, None",
                "return grad._local_tensor, None, None",
            ),
            (
                "unflatten_is_compiled",
                "the compiler looks into the tables of layouts, and gives up",
                "    if torch.compiler.is_compiling():\n",
                "    if False:\n",
            ),
            (
                "sync_returns_pending",
                "a gradient in flight is handed on",
                "    if compute_stream is None:\n        return unwrap_pending(grad)",
                "    if compute_stream is None:\n        return grad",
            ),
        )
    ),
    *(
        Mutant(name, fault, file, old, new, (f"tensor_parallel/test_{check}.py",))
        for name, fault, file, old, new, check in (*ddp.FAULTS, *subclasses.FAULTS, *fsdp.FAULTS)
    ),
)
