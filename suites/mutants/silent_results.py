"""Plausible faults in the result alone: isolation, values, structure. Fields as in copies.py."""

from __future__ import annotations

FAULTS: tuple[tuple[str, ...], ...] = (
    # --- isolation ----------------------------------------------------------------------------
    (
        "source_lends_its_values",
        "a list of the full dict is in the local dict of the source, too",
        "_state_dict_utils/broadcast.py",
        "    assign(local, plan.values)\n",
        "    assign(local, {key: full.get(key, plan.values[key]) for key in plan.values})\n",
        "own_objects",
    ),
    (
        "distribute_lends_its_values",
        "a list of the full dict is in the local dict, too",
        "_state_dict_utils/distribute.py",
        "values[key] = copy_or_value(value)",
        "values[key] = value",
        "own_objects",
    ),
    (
        "values_copied_shallowly",
        "what a list holds is shared with the snapshot",
        "_core/containers/leaf_values.py",
        "    return copy.deepcopy(value)\n    except (TypeError",
        "    return copy.copy(value)\n    except (TypeError",
        "own_objects",
    ),
    (
        "scalars_are_lent",
        "a 0-dim tensor that was distributed is the full dict's own",
        "_core/loading/targets.py",
        "        elif spec.is_opaque:\n            self.memory =",
        (
            "        elif not full.dim():\n            self.memory = full\n"
            "        elif spec.is_opaque:\n            self.memory ="
        ),
        "own_objects",
    ),
    (
        "large_source_not_waited_for",
        "the source returns while its memory is still being sent",
        "_core/loading/transport.py",
        "            self._copy_for_source([key])\n            finish(work)\n",
        "            self._copy_for_source([key])\n            self.unfinished = work\n",
        "process_state",
    ),
    (
        "grad_mode_forgotten",
        "after a copy gradients are recorded where the caller had turned that off",
        "_core/copies/copy_into.py",
        "            torch._C._set_grad_enabled(recording)",
        "            torch._C._set_grad_enabled(True)",
        "process_state",
    ),
    (
        "seeds_the_generator",
        "each gather starts the random numbers anew",
        "_state_dict_utils/gather.py",
        "    destinations = find_destinations(ranks_only, pg, found)\n",
        "    destinations = find_destinations(ranks_only, pg, found)\n    torch.manual_seed(0)\n",
        "process_state",
    ),
    (
        "second_call_is_the_first",
        "a second gather of the same dict gives what the first gave",
        "_state_dict_utils/gather.py",
        "    gathered = gather_whole_tensors(found, destinations, agreed, copies)\n",
        (
            "    known = vars(dist).setdefault('known', {})\n"
            "    if id(state_dict) not in known:\n"
            "        whole = gather_whole_tensors(found, destinations, agreed, copies)\n"
            "        known[id(state_dict)] = whole\n"
            "    gathered = known[id(state_dict)]\n"
        ),
        "process_state",
    ),
    (
        "default_device_is_used",
        "under a default device results are made there",
        "_core/tensors/values.py",
        "        fresh = torch.empty(shape, dtype=made, device=device)\n",
        (
            "        fresh = torch.empty(shape, dtype=made, "
            'device=None if device == "cpu" or device == CPU else device)\n'
        ),
        "process_state",
    ),
    (
        "inputs_are_kept",
        "the tensors of the last call live until the next",
        "_state_dict_utils/gather.py",
        "    destinations = find_destinations(ranks_only, pg, found)\n",
        (
            "    destinations = find_destinations(ranks_only, pg, found)\n"
            "    dist.last_gathered = found\n"
        ),
        "process_state",
    ),
    # --- values -------------------------------------------------------------------------------
    (
        "zeros_added",
        "gathered as a sum with zeros: -0.0 becomes 0.0, a NaN another",
        "_core/comms/buckets.py",
        "            values.append(as_carrier(parts[0]))\n",
        "            values.append(as_carrier(parts[0]) + 0)\n",
        "bits",
    ),
    (
        "stacked_with_zeros",
        "many small ones gathered as a sum with zeros",
        "_core/tensors/values.py",
        "    torch.stack(parts, out=room.view(len(parts), *parts[0].shape))\n",
        "    torch.stack(parts, out=room.view(len(parts), *parts[0].shape)).add_(0)\n",
        "bits",
    ),
    (
        "scattered_as_a_sum",
        "shards of a large tensor are sent as a sum with zeros",
        "_core/loading/transport.py",
        "torch.cat([part.to(room.device) for part in found], out=room)",
        "torch.cat([part.to(room.device) + 0 for part in found], out=room)",
        "bits",
    ),
    (
        "copied_through_double",
        "integers beyond 2^53 lose their last digits on their way into another memory",
        "_core/tensors/values.py",
        "        target.detach().copy_(source.detach(), non_blocking=non_blocking)\n",
        (
            "        wide = source.detach() if source.is_complex() else source.detach().double()\n"
            "        target.detach().copy_(wide, non_blocking=non_blocking)\n"
        ),
        "bits",
    ),
    (
        "conjugate_forgotten",
        "a lazily conjugated tensor arrives without the conjugation",
        "_core/tensors/values.py",
        "    if plain.is_conj() or plain.is_neg():\n",
        "    if plain.is_conj():\n        plain = plain.conj()\n    if plain.is_neg():\n",
        "bits",
    ),
    # --- structure ----------------------------------------------------------------------------
    (
        "gathered_requires_grad",
        "what was gathered from parameters requires grad",
        "_core/gathering/local_copies.py",
        "                results.append(gathered[name])\n",
        "                results.append(gathered[name].requires_grad_(value.requires_grad))\n",
        "process_state",
    ),
    (
        "ranks_only_in_world_numbers",
        "ranks_only counts in the world's numbers whatever the group",
        "_core/sharding/ranks.py",
        "return not ranks_only or dist.get_rank(pg) in ranks_only",
        "return not ranks_only or dist.get_rank() in ranks_only",
        "gather_state_dict_laws",
        "iterate_state_dict",
        "iterate_with_companion",
    ),
    (
        "none_takes_a_tensor",
        "a local None is replaced by a tensor",
        "_core/loading/plan.py",
        'if value is None and (key not in local or entry.kind in ("tensor", "opaque")):',
        "if key not in local:",
        "own_objects",
    ),
    (
        "companion_may_have_more",
        "a companion with keys of its own is taken for the same structure",
        "_core/containers/walk.py",
        "        if companion.keys() != value.keys():\n",
        "        if not companion.keys() >= value.keys():\n",
        "copy_state_dict",
        "check_state_dict_similarity",
    ),
    (
        "companion_may_be_longer",
        "a companion with a longer list is taken for the same structure",
        "_core/containers/walk.py",
        "    if len(companion) != len(value):\n",
        "    if len(companion) < len(value):\n",
        "copy_state_dict",
        "check_state_dict_similarity",
    ),
    (
        "keys_become_text",
        "numbers as keys come back as text",
        "_core/containers/walk.py",
        "    pairs = zip(container, items, strict=False)\n",
        "    pairs = zip(map(str, container), items, strict=False)\n",
        "gather_state_dict",
        "iterate_state_dict",
        "iterate_with_companion",
    ),
    (
        "namedtuples_become_tuples",
        "a namedtuple comes back as a tuple",
        "_core/containers/container_types.py",
        '    if hasattr(kind, "_make"):\n        return kind._make(items)\n',
        '    if hasattr(kind, "_make"):\n        return tuple(items)\n',
        "iterate_state_dict",
        "iterate_with_companion",
        "flatten_state_dict",
    ),
    (
        "strides_forgotten",
        "a transposed tensor comes back row-major",
        "_core/gathering/mesh_gather.py",
        "return allocate(layout.shape, layout.dtype, device, layout.stride)",
        "return allocate(layout.shape, layout.dtype, device)",
        "gather_state_dict",
    ),
    (
        "scalar_buffers_are_the_tensors",
        "the buffer of a 0-dim tensor is the tensor itself",
        "_state_dict_utils/staging.py",
        "    pinnable = pin_memory and tensor.numel() > 0\n",
        (
            "    pinnable = pin_memory and tensor.numel() > 0\n"
            "    if not tensor.dim() and tensor.device == CPU:\n        return tensor.detach()\n"
        ),
        "create_cpu_state_dict",
    ),
    (
        "mesh_of_a_companion_unread",
        "values are copied into a DTensor whose parts are those of other ranks",
        "_core/copies/copy_into.py",
        "        and all(map(same_ranks, map(_mesh, ours), map(_mesh, theirs)))\n",
        "",
        "other_meshes",
    ),
    (
        "similar_whatever_the_reduction",
        "a DTensor whose reduction is pending is similar to a whole one",
        "_core/copies/copy_into.py",
        "        list(map(_placements, ours)) == list(map(_placements, theirs))\n        and ",
        "        ",
        "other_meshes",
    ),
    (
        "mapping_decides_the_order",
        "a flat dict that was sorted comes back in the order of the original",
        "_state_dict_utils/flatten.py",
        "    return [(mapping[name], value) for name, value in state_dict.items()]\n",
        (
            "    return [(path, state_dict[name]) for name, path in mapping.items() "
            "if name in state_dict]\n"
        ),
        "key_order",
    ),
)
