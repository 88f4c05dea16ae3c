"""How each function of the set is called in a case: its arguments as Python, its inputs by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from generated.tensor_texts import group_name, meshes, tensor_text

Step = dict[str, Any]
Case = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One function of the set."""

    function: str
    """Module and name, below the subject's root; of several, of a helper's arguments, by spaces."""
    arguments: Callable[[Case, Step], list[str]]
    given: Callable[[Step], list[str]]
    """The variables whose state after the call is told."""
    through: str = ""
    """The helper of `rig` that is called with the function."""

    def called(self) -> list[str]:
        """The words of what is called, and of its first arguments."""
        subjects = [f"subject({name!r})" for name in self.function.split() if name]
        return [self.through, *subjects] if self.through else subjects


def _pg(case: Case, step: Step) -> list[str]:
    return [f"pg={group_name(case, step['pg'])}"] if step.get("pg") else []


def _flags(step: Step, **defaults: Any) -> list[str]:
    """Options that differ from the function's defaults."""
    return [f"{n}={step[n]!r}" for n, d in defaults.items() if step.get(n, d) != d]


_DEVICE = "torch.device('cpu')"
_SDU = "_state_dict_utils."
_UTILS = "tensor.parallel._data_parallel_utils."
_FSDP = "tensor.parallel.fsdp."


def _tree(step: Step) -> list[str]:
    return [step.get("tree", "state")]


def _tensor(step: Step) -> list[str]:
    return [f"t{step['tensor']}"]


def _mesh(case: Case, step: Step) -> str:
    return f"m{meshes(case).index(step['mesh'])}"


def _module(_: Step) -> list[str]:
    return ["parameters=parameters_of(module)", "state=state_of(module)"]


def _loaded(case: Case, step: Step) -> str:
    items = []
    for name, number in step["names"]:
        entry = {**case["pool"][number]}
        entry.pop("trains", None)
        if step.get("whole"):
            entry["kind"] = "plain"
        items.append(f"{name!r}: {tensor_text(case, entry, str(step['fill']))}")
    return "{" + ", ".join(items) + "}"


def _two(step: Step) -> list[str]:
    return ["full", "local"]


CALLS: dict[str, Call] = {
    "gather": Call(
        _SDU + "_gather_state_dict",
        lambda case, step: [
            *_tree(step),
            *_pg(case, step),
            *_flags(step, cpu_offload=False, ranks_only=(), type_check=True),
        ],
        _tree,
    ),
    "all_gather": Call(
        _SDU + "_all_gather_sharded_tensor",
        lambda case, step: [f"t{step['tensor']}", *_pg(case, step)],
        lambda step: [f"t{step['tensor']}"],
    ),
    "broadcast": Call(
        _SDU + "_broadcast_state_dict",
        lambda case, step: [
            f"full if rank == {step['source']} else {{}}",
            *("local", _DEVICE),
            *_pg(case, step),
            *_flags(step, strict=False, cpu_offload=False),
        ],
        _two,
    ),
    "distribute": Call(
        _SDU + "_distribute_state_dict",
        lambda case, step: ["full", "local", _DEVICE, *_pg(case, step)],
        _two,
    ),
    "copy": Call(
        _SDU + "_copy_state_dict",
        lambda _, step: ["state", "other", *_flags(step, non_blocking=False, type_check=True)],
        lambda _: ["state", "other"],
    ),
    "similar": Call(
        _SDU + "_check_state_dict_similarity",
        lambda *_: ["state", "other"],
        lambda _: ["state", "other"],
    ),
    "create": Call(
        _SDU + "_create_cpu_state_dict",
        lambda _, step: [*_tree(step), *_flags(step, share_memory=False)],
        _tree,
    ),
    "offload": Call(
        _SDU + "_offload_state_dict_to_cpu",
        lambda _, step: [*_tree(step), *_flags(step, ranks_only=(), type_check=True)],
        _tree,
    ),
    "iterate": Call(
        _SDU + "_iterate_state_dict",
        lambda _, step: [
            *_tree(step),
            *[step.get("by", "identity")] * 3,
            *_flags(step, cpu_offload=False, ranks_only=(), type_check=True),
            *(["companion_obj=other"] if step.get("companion") else []),
        ],
        lambda step: [*_tree(step), *(["other"] if step.get("companion") else [])],
    ),
    "flatten": Call(
        _SDU + "_flatten_state_dict " + _SDU + "_unflatten_state_dict",
        lambda _, step: _tree(step),
        _tree,
        "flat_and_back",
    ),
    "traverse": Call(_SDU + "_traverse_state_dict", lambda _, step: _tree(step), _tree, "visits"),
    "set_element": Call(
        _SDU + "_set_element",
        lambda _, step: [*_tree(step), repr(step["path"]), f"t{step['value']}"],
        _tree,
    ),
    "flatten_tensor": Call(
        _UTILS + "_flatten_tensor", lambda _, step: _tensor(step), _tensor, "flat_tensor"
    ),
    "unflatten_tensor": Call(
        _UTILS + "_flatten_tensor " + _UTILS + "_unflatten_tensor",
        lambda _, step: _tensor(step),
        _tensor,
        "flat_tensor_and_back",
    ),
    "sync_grad": Call(
        _UTILS + "sync_grad_hook",
        lambda _, step: [
            f"pending(t{step['tensor']})" if step.get("pending") else f"t{step['tensor']}"
        ],
        _tensor,
    ),
    "all_gather_dtensor": Call(
        _FSDP + "_all_gather_dtensor",
        lambda case, step: [*_tensor(step), _mesh(case, step)],
        _tensor,
    ),
    "chunk_dtensor": Call(
        _FSDP + "_chunk_dtensor",
        lambda case, step: [
            *_tensor(step),
            f"{_mesh(case, step)}.get_local_rank()",
            _mesh(case, step),
        ],
        _tensor,
    ),
    "box_for": Call(
        _FSDP + "_get_box_for",
        lambda _, step: [*_tensor(step), str(step["count"])],
        _tensor,
        "boxes_of",
    ),
    "metadata": Call(
        _FSDP + "_create_sharded_tensor_md_from_dt " + _FSDP + "_get_dt_pg",
        lambda _, step: _tensor(step),
        _tensor,
        "described",
    ),
    "broadcast_tensors": Call(
        _SDU + "_broadcast_tensors",
        lambda case, step: [
            f"full if rank == {step['source']} else infos(subject({_SDU + '_TensorInfo'!r}), full)",
            "local",
            f"{step['keys']!r}",
            _DEVICE,
            *_pg(case, step),
        ],
        _two,
    ),
    "distribute_tensors": Call(
        _SDU + "_distribute_tensors",
        lambda _, step: ["local", f"{step['keys']!r}", _DEVICE],
        lambda _: ["local"],
    ),
    "chunk_tensor": Call(
        _FSDP + "_chunk_tensor",
        lambda case, step: [*_tensor(step), "rank", str(case["world"]), "0", "dist.group.WORLD"],
        _tensor,
    ),
    "wrap": Call("tensor.parallel.ddp._pre_dp_module_transform", lambda *_: ["module"], _module),
    "forward": Call(
        "",
        lambda _, step: [
            *(["without_grad"] if step.get("no_grad") else []),
            *("module", repr(bool(step.get("fail")))),
        ],
        _module,
    ),
    "load": Call(
        "",
        lambda case, step: ["module.load_state_dict", _loaded(case, step)],
        _module,
    ),
}
