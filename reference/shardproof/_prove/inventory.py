"""What this rank holds: every tensor of model and optimizer, with its claim and its digest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from shardproof._prove import extra
from shardproof._prove.digests import digest
from shardproof._prove.leaves import Leaf, leaves_of, mesh_coordinates
from shardproof._prove.modules import FlatPiece, Modules, local_shard
from shardproof._prove.optimizers import Optimizers
from shardproof._prove.placements import Part, part_of, whole
from shardproof._prove.reach import is_stateful, numbers_in, tensors_in


@dataclass
class Item:
    """One plain tensor on this rank, under the name that all ranks know it by."""

    key: str
    """Unique: what it is called in messages, such as 'exp_avg of layers.0.weight'."""
    kind: str
    """parameter, buffer, non-persistent buffer, attribute, optimizer, or optimizer attribute."""
    name: str
    """Of the parameter or buffer."""
    entry: str
    """Of the optimizer's state, or empty."""
    part: Part
    layout: str
    dtype: str
    tensor: torch.Tensor
    ranks: tuple[int, ...] = ()
    contradiction: str = ""
    inner: str = ""
    synced: int | None = None
    """The rank whose values DDP gives to this buffer before each forward."""
    reclaimed: bool = False
    """Whether the claim is that of a state dict, and the live tensor is plain."""
    trains: bool = False
    """An attribute that is trained, or holds the state of an optimizer within an optimizer."""
    digest: int = 0

    @property
    def side(self) -> str:
        """The column of the table in which a loss of it stands."""
        return "optimizer" if self.kind.startswith("optimizer") else "model"

    def told(self) -> dict[str, Any]:
        """For the other ranks, and for the page."""
        return {
            "key": self.key,
            "kind": self.kind,
            "name": self.name,
            "entry": self.entry,
            "part": asdict(self.part),
            "layout": self.layout,
            "dtype": self.dtype,
            "ranks": list(self.ranks),
            "contradiction": self.contradiction,
            "inner": self.inner,
            "digest": f"{self.digest:016x}",
            "nbytes": self.tensor.numel() * self.tensor.element_size(),
            "synced": self.synced,
            "trains": self.trains,
        }


@dataclass
class Inventory:
    """All items of this rank, and what else a road must bring back."""

    items: dict[str, Item] = field(default_factory=dict)
    ties: list[list[str]] = field(default_factory=list)
    """Names that share a parameter or buffer."""
    values: dict[str, Any] = field(default_factory=dict)
    """What is no tensor: hyperparameters of param_groups, counters in the optimizer's state."""
    strays: list[str] = field(default_factory=list)
    """Parameters of the optimizer that the model does not have."""
    flags: dict[str, bool] = field(default_factory=dict)
    """requires_grad of each parameter."""
    extra: dict[str, str] = field(default_factory=dict)
    """Extra states of modules, as text."""
    stateful: list[str] = field(default_factory=list)
    """Objects that attributes hold, and that have a state dict of their own."""
    untrained: list[str] = field(default_factory=list)
    """Parameters that need gradients, and that no optimizer has."""

    def values_told(self) -> dict[str, dict[str, str]]:
        """What is no tensor, for the other ranks."""
        return {
            "values": {key: extra.text_of_state(value) for key, value in self.values.items()},
            "flags": {key: str(flag) for key, flag in self.flags.items()},
            "extra": self.extra,
        }

    def measure(self) -> None:
        """Fill in the digests."""
        for item in self.items.values():
            item.digest = 0 if item.part.own else digest(item.tensor, item.part.places())
            if item.part.own:
                item.digest = digest(item.tensor)


def take(modules: Modules, optimizers: Optimizers, rank: int) -> Inventory:
    """The inventory of this rank, without digests."""
    found = Inventory()
    owners: dict[int, str] = {}
    """Identity of a parameter -> its first name."""
    shared: dict[int, list[str]] = {}
    parts: dict[str, Leaf] = {}
    flat: dict[int, list[tuple[str, Any]]] = {}

    def add(key: str, kind: str, name: str, leaf: Leaf, entry: str = "") -> Item:
        whole_key = f"{key} ({leaf.inner})" if leaf.inner else key
        item = Item(
            whole_key,
            kind,
            name,
            entry,
            leaf.part,
            leaf.layout,
            str(leaf.tensor.dtype).removeprefix("torch."),
            leaf.tensor,
            leaf.ranks,
            leaf.contradiction,
            leaf.inner,
        )
        found.items[whole_key] = item
        return item

    for name, piece in modules.flat_parameters():
        tensor = piece.of(local_shard(piece.handle))
        leaf = Leaf(tensor, _part_of_piece(piece, rank), "flat shard of FSDP1")
        add(name, "parameter", name, leaf)
        parts[name] = leaf
        flat.setdefault(id(piece.handle.flat_param), []).append((name, piece))
        shared.setdefault(id(piece), []).append(name)
    for name, module, own, param in modules.parameters():
        owners.setdefault(id(param), name)
        if (id(module), own) in modules.flat:
            continue
        shared.setdefault(id(param), []).append(name)
        found.flags[name] = param.requires_grad
        for leaf in leaves_of(param, rank):
            item = add(name, "parameter", name, leaf)
            item.ranks = item.ranks or modules.replicas(module)
            parts.setdefault(name, leaf)
    for name, module, buffer, persistent in modules.buffers():
        shared.setdefault(id(buffer), []).append(name)
        for leaf in leaves_of(buffer, rank):
            kind = "buffer" if persistent else "non-persistent buffer"
            item = add(name, kind, name, leaf)
            if (ddp := modules.ddp.get(id(module))) is not None and ddp.broadcast_buffers:
                item.synced = modules.replicas(module)[0]
    _take_attributes(found, modules, optimizers, rank, {*shared, *owners}, add)
    attributes: dict[int, str] = {}
    """Storage -> the attribute that lies there: it may be what is left of a parameter."""
    for item in found.items.values():
        if item.kind == "attribute":
            attributes.setdefault(item.tensor.untyped_storage()._cdata, item.name)
    found.extra = {name: extra.told(module) for name, module in modules.extra_states()}
    found.ties = sorted(sorted(names) for names in shared.values() if len(names) > 1)
    for param in [p for o in optimizers for g in o.param_groups for p in g["params"]]:
        if id(param) not in owners and id(param) not in flat:
            for leaf in leaves_of(param, rank):
                name = attributes.get(leaf.tensor.untyped_storage()._cdata, "")
                if name in found.items:  # no parameter any more, and the optimizer still trains it
                    found.items[name].trains = True
                    owners[id(param)] = name
                    parts[name] = leaf
    _take_optimizers(found, optimizers, rank, owners, parts, flat, add)
    trained = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
    if optimizers:
        found.untrained = sorted(
            name
            for name, _, _, param in modules.parameters()
            if param.requires_grad
            and id(param) not in trained
            and not any(name in {n for n, _ in names} for names in flat.values())
        )
    return found


def _take_attributes(
    found: Inventory,
    modules: Modules,
    optimizers: Optimizers,
    rank: int,
    known: set[int],
    add: Any,
) -> None:
    """Tensors of the model and of the optimizers that no state dict has."""
    trained = {
        leaf.tensor.untyped_storage()._cdata
        for optimizer in optimizers
        for group in optimizer.param_groups
        for param in group["params"]
        for leaf in leaves_of(param, rank)
    }
    for name, thing in modules.reached():
        if is_stateful(thing) and not isinstance(thing, (nn.Module, torch.optim.Optimizer)):
            found.stateful.append(f"{name} ({type(thing).__name__})")
        if not isinstance(thing, torch.Tensor) or id(thing) in known:
            continue
        for leaf in leaves_of(thing, rank):
            item = add(name, "attribute", name, leaf)
            moves = not optimizers or leaf.tensor.untyped_storage()._cdata in trained
            item.trains = moves and thing.requires_grad and thing.is_leaf
            known.add(id(thing))
    for name, tensor, inner in optimizers.attributes():
        if id(tensor) not in known:
            for leaf in leaves_of(tensor, rank):
                add(name, "optimizer attribute", name, leaf).trains = inner


def _take_optimizers(
    found: Inventory,
    optimizers: Optimizers,
    rank: int,
    owners: dict[int, str],
    parts: dict[str, Leaf],
    flat: dict[int, list[tuple[str, Any]]],
    add: Any,
) -> None:
    for number, optimizer in enumerate(optimizers):
        which = f" of optimizer {number}" if len(optimizers) > 1 else ""
        for place, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if key == "params":
                    continue
                label = f"{key} of param_groups[{place}]{which}"
                if isinstance(value, torch.Tensor):
                    for leaf in leaves_of(value, rank):
                        add(label, "optimizer", f"param_groups[{place}]", leaf, key)
                else:
                    found.values[label] = value
            for at, param in enumerate(group["params"]):
                state = optimizer.state.get(param, {})
                if id(param) in flat:
                    _take_flat_state(found, state, flat[id(param)], param, rank, add)
                    continue
                name = owners.get(id(param))
                if name is None:
                    name = f"(parameter {at} of param_groups[{place}]{which})"
                    found.strays.append(name)
                    for leaf in leaves_of(param, rank):
                        add(name, "attribute", name, leaf)
                for entry, value in state.items():
                    label = f"{entry} of {name}"
                    if not isinstance(value, torch.Tensor):
                        for path, tensor in tensors_in(value, str(entry)):
                            for leaf in leaves_of(tensor, rank):
                                leaf = _like_parameter(leaf, parts.get(name))
                                add(f"{path} of {name}", "optimizer", name, leaf, path)
                        for path, number in numbers_in(value, str(entry)):
                            found.values[f"{path} of {name}"] = number
                        continue
                    for leaf in leaves_of(value, rank):
                        add(label, "optimizer", name, _like_parameter(leaf, parts.get(name)), entry)


def _like_parameter(leaf: Leaf, param: Leaf | None) -> Leaf:
    """State of the shape of a shard, whose parameter is one: the state claims what it claims."""
    if (
        param is not None
        and leaf.layout == "plain"
        and param.layout != "plain"
        and leaf.tensor.ndim
        and leaf.tensor.numel() == param.part.numel
        and param.part.flat is not None
    ):
        return replace(leaf, part=param.part, layout=param.layout)
    return leaf


def _part_of_piece(piece: FlatPiece, rank: int) -> Part:
    run = (piece.start, piece.start + piece.numel)
    if piece.spec is None or (at := mesh_coordinates(piece.spec.mesh, rank)) is None:
        return replace(whole(piece.shape), flat=run)
    spec = piece.spec
    return replace(part_of(spec.shape, spec.placements, spec.mesh.mesh.shape, at), flat=run)


def _take_flat_state(
    found: Inventory,
    state: dict[Any, Any],
    named: list[tuple[str, Any]],
    param: nn.Parameter,
    rank: int,
    add: Any,
) -> None:
    """State of a flat parameter of FSDP1, by the parameters that are in it."""
    for entry, value in state.items():
        if not isinstance(value, torch.Tensor):
            found.values[f"{entry} of {named[0][0]}"] = value
        elif value.ndim and value.numel() == param.numel():
            for name, piece in named:
                leaf = Leaf(
                    piece.of(value.detach()), _part_of_piece(piece, rank), "flat shard of FSDP1"
                )
                add(f"{entry} of {name}", "optimizer", name, leaf, entry)
        else:
            for leaf in leaves_of(value, rank):
                add(f"{entry} of {named[0][0]}", "optimizer", named[0][0], leaf, entry)
