"""Faults of the reference in what one rank does alone, listed as catalog.py takes them.

Each: name, fault, file below shardproof, old text, new text, and the checks below
conformance/state_dict_utils, of which one must fail.
"""

from __future__ import annotations

FAULTS: tuple[tuple[str, ...], ...] = (
    (
        "snapshot_aliases",
        "an offloaded CPU tensor is the live one",
        "_core/tensors/values.py",
        "return bits(tensor).to(device, copy=True).view(tensor.dtype)",
        "return bits(tensor).to(device).view(tensor.dtype)",
        "offload_state_dict_to_cpu",
    ),
    (
        "large_copy_left_empty",
        "new memory for a large tensor is mapped, and nothing is written into it",
        "_core/tensors/values.py",
        "return prefault(fresh, alone=plain.is_cuda).copy_(plain)",
        "return prefault(fresh, alone=plain.is_cuda)",
        "large_tensors",
        "offload_state_dict_to_cpu",
    ),
    (
        "copy_truncates",
        "another dtype is accepted and converted",
        "_core/copies/copy_into.py",
        "    if dtype_of(ours) != dtype_of(theirs) and not _by_class(theirs):\n",
        "    if False:\n",
        "copy_state_dict",
        "check_state_dict_similarity",
    ),
    (
        "copy_before_check",
        "a mismatch is found after half the copies",
        "_core/copies/companions.py",
        "            if reason := pairs.add(other, value):\n",
        "            if (reason := pairs.add(other, value)) or pairs.copy(non_blocking):\n",
        "copy_state_dict",
    ),
    (
        "buffers_lose_strides",
        "staging buffers are always row-major",
        "_state_dict_utils/staging.py",
        "        return torch.empty_like(tensor, device=CPU, pin_memory=pinnable)\n    fill =",
        "        return torch.empty(tensor.size(), dtype=tensor.dtype)\n    fill =",
        "create_cpu_state_dict",
    ),
    (
        "buffers_untied",
        "tied tensors get a buffer each",
        "_state_dict_utils/staging.py",
        "            if key not in made:\n",
        "            if True:\n",
        "create_cpu_state_dict",
    ),
    (
        "iterate_loses_metadata",
        "OrderedDict loses its _metadata",
        "_core/containers/container_types.py",
        '    if hasattr(like, "__dict__"):\n',
        "    if False:\n",
        "iterate_state_dict",
        "iterate_with_companion",
        "flatten_state_dict",
    ),
    (
        "iterate_lets_anything_in",
        "type_check lets any leaf through",
        "_state_dict_utils/iterate.py",
        "    if type_check:\n        check_leaf_types(walk)\n",
        "",
        "iterate_state_dict",
        "iterate_with_companion",
    ),
    (
        "flatten_merges_collisions",
        "colliding keys overwrite each other",
        "_state_dict_utils/flatten.py",
        "    if len(flat) != len(names):\n",
        "    if False:\n",
        "flatten_state_dict",
    ),
    (
        "flatten_drops_empties",
        "empty containers vanish",
        "_core/containers/flat_names.py",
        "not (kind in _USUAL or is_branch(value)) or len(value) == 0:\n",
        "not (kind in _USUAL or is_branch(value)):\n",
        "flatten_state_dict",
        "traverse_state_dict",
    ),
    (
        "unflatten_makes_lists",
        "tuples come back as lists",
        "_core/containers/container_types.py",
        "    if kind is tuple:\n        return tuple(items)\n",
        "    if kind is tuple:\n        return items\n",
        "flatten_state_dict",
    ),
    (
        "set_element_overwrites",
        "_set_element does not extend a list",
        "_state_dict_utils/flatten.py",
        "        holder.extend([None] * (item + 1 - len(holder)))\n",
        "",
        "traverse_state_dict",
    ),
)
