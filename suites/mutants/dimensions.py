"""Faults that show along one dimension alone: values, keys, scale, sequences, time, meshes, claims.

Fields as in copies.py.
"""

from __future__ import annotations

FAULTS: tuple[tuple[str, ...], ...] = (
    # --- values -------------------------------------------------------------------------------
    (
        "negative_zeros_gathered_as_zeros",
        "a gather that goes through arithmetic loses -0.0",
        "_core/gathering/mesh_gather.py",
        "            data = parts[0].view(carrier_dtype(dtype))\n",
        (
            "            data = parts[0].view(carrier_dtype(dtype))\n"
            "            if data.is_floating_point():\n"
            "                data = data + 0.0\n"
        ),
        "every_bit",
    ),
    (
        "nans_made_canonical",
        "a broadcast hands on every NaN as the same one",
        "_core/loading/transport.py",
        "        found = block_elements(whole, block, piece.start, piece.stop)\n",
        (
            "        found = block_elements(whole, block, piece.start, piece.stop)\n"
            "        wide = whole.is_floating_point() and whole.element_size() > 1\n"
            "        if wide:\n"
            "            found = [p.masked_fill(p.isnan(), float('nan')) for p in found]\n"
        ),
        "every_bit",
    ),
    (
        "unsigned_maximum_by_sign",
        "the largest unsigned number loses against the smallest",
        "_core/sharding/partial_reduction.py",
        "    flips = dtype is torch.uint64 and op in _OF_ORDER\n",
        "    flips = False\n",
        "reductions",
    ),
    (
        "average_of_a_wrapped_sum",
        "the average of large integers is that of what is left of their sum",
        "_core/sharding/partial_reduction.py",
        (
            '    if op == "avg" and not (wide.is_floating_point or wide.is_complex):\n'
            "        return _integer_average(parts, count)\n"
        ),
        (
            '    if op == "avg" and not (wide.is_floating_point or wide.is_complex):\n'
            "        total = reduce(torch.add, [part.to(wide) for part in parts])\n"
            '        return torch.div(total, count, rounding_mode="trunc").to(dtype)\n'
        ),
        "reductions",
    ),
    (
        "average_rounded_down",
        "the average of negative integers is rounded away from zero",
        "_core/sharding/partial_reduction.py",
        "    return (average + up).to(dtype)\n",
        "    return average.to(dtype)\n",
        "reductions",
    ),
    (
        "small_halves_summed_in_halves",
        "256 + 1 + 1 + 1 is 256 in bfloat16",
        "_core/sharding/partial_reduction.py",
        "        return torch.float32 if dtype.itemsize < 4 else dtype\n",
        "        return torch.float32 if dtype.itemsize < 2 else dtype\n",
        "reductions",
    ),
    (
        "undefined_reductions_found_out_late",
        "a maximum of complex numbers fails on the takers alone",
        "_core/sharding/partial_reduction.py",
        "    if (fraction and not _OF_BITS.isdisjoint(ops)) or (\n",
        "    if (False and not _OF_BITS.isdisjoint(ops)) or (\n",
        "reductions",
    ),
    # --- keys ---------------------------------------------------------------------------------
    (
        "zero_becomes_its_text",
        "the numbers of an optimizer's parameters become strings",
        "_core/containers/walk.py",
        "    pairs = zip(container, items, strict=False)\n",
        (
            "    named = [str(key) if type(key) is int else key for key in container]\n"
            "    pairs = zip(named, items, strict=False)\n"
        ),
        "every_key",
    ),
    (
        "keys_read_as_paths",
        "of two leaves whose names are written alike one is lost",
        "_core/containers/container_types.py",
        '    plain = type(first) is str and "[" not in first and (first or not rest)\n',
        "    plain = type(first) is str\n",
        "every_key",
    ),
    (
        "parameters_as_keys_by_their_text",
        "state under parameters is refused, for their text differs from rank to rank",
        "_core/containers/container_types.py",
        "    if _WORDS.issuperset(map(type, path)):\n        return path\n",
        "    if path is not None:\n        return path\n",
        "every_key",
    ),
    (
        "pickled_paths_forget",
        "a mapping that was written and read again leads to dicts and lists",
        "_core/containers/typed_paths.py",
        "        return TypedPath.of, (tuple(self), self.keys, self.through)\n",
        "        return tuple, (tuple(self),)\n",
        "every_key",
    ),
    (
        "a_tensor_taken_for_its_rows",
        "a tensor in the place of a state dict is flattened row by row",
        "_core/containers/flat_names.py",
        "    if not is_branch(root):\n",
        "    if root is None:\n",
        "every_key",
    ),
    # --- ties ---------------------------------------------------------------------------------
    (
        "shards_tied_by_object",
        "a shard of a ShardedTensor and a plain tensor over its memory come apart",
        "_core/tensors/ties.py",
        "        return (min(starts), max(ends)) if spans else (id(leaf), id(leaf))\n",
        "        return id(leaf), id(leaf)\n",
        "every_tie",
    ),
    # --- scale --------------------------------------------------------------------------------
    (
        "the_last_of_hundreds_is_lost",
        "of more than 512 tensors that are alike the rest has the values of the first",
        "_core/sharding/uniform_grid.py",
        "            made.extend(copies_of_each(near))\n        return made\n",
        (
            "            made.extend(copies_of_each(near))\n"
            "        return made[:512] + made[: max(len(made) - 512, 0)]\n"
        ),
        "every_scale",
    ),
    # --- sequences ----------------------------------------------------------------------------
    (
        "places_of_another_world",
        "a process that is another rank of an equal mesh takes its old part",
        "_core/sharding/target_part.py",
        "    key = coordinate, orders,",
        "    key = 0, orders,",
        "every_sequence",
    ),
    (
        "shards_by_the_coordinate",
        "on a mesh that lists its ranks out of order a full state dict comes out permuted",
        "_core/sharding/ranks.py",
        "    if not orders:\n",
        "    if orders or not orders:\n",
        "unsorted_meshes",
    ),
    (
        "groups_sorted_whoever_made_them",
        "groups that keep the mesh's order are taken for sorted ones",
        "_core/sharding/ranks.py",
        "        if as_listed and (keeps_order or order != sorted(order)):\n",
        "        if as_listed and keeps_order:\n",
        "unsorted_meshes",
    ),
    (
        "large_negatives_sent_as_they_lie",
        "a large part that is lazily negated on one rank alone is gathered from where it lies",
        "_core/gathering/mesh_gather.py",
        "part.device == domain.device and not is_lazy(part)\n",
        "part.device == domain.device\n",
        "large_tensors",
    ),
    (
        "places_remembered_without_a_shape",
        "what was found out for one shape answers for another",
        "_core/sharding/target_part.py",
        "spec.placements, kinds, spec.shape, getattr",
        "spec.placements, kinds, getattr",
        "every_sequence",
    ),
    # --- time ---------------------------------------------------------------------------------
    (
        "returns_before_it_is_sent",
        "what the source writes next arrives in place of what it had",
        "_core/loading/transport.py",
        "            self._copy_for_source([key])\n            finish(work)\n            return\n",
        (
            "            self._copy_for_source([key])\n"
            "            if self.wholes is None:\n"
            "                finish(work)\n"
            "            return\n"
        ),
        "late_ranks",
    ),
    # --- meshes -------------------------------------------------------------------------------
    (
        "one_round_is_enough",
        "a rank three meshes away from an error waits for those that raised",
        "_core/comms/agreement.py",
        "            if expected_ranks & ~known_ranks == 0:\n                todo.remove(domain)\n",
        "            todo.remove(domain)\n",
        "several_meshes",
    ),
    (
        "never_told_again",
        "an error in one mesh is not heard of in another with a rank in common",
        "_core/gathering/leaf_entries.py",
        "    failure = agree_on_failure(again, failure)\n",
        "    failure = agree_on_failure([], failure)\n",
        "several_meshes",
    ),
    # --- claims -------------------------------------------------------------------------------
    (
        "gaps_between_shards",
        "what no shard holds comes out as whatever was in memory",
        "_core/sharding/tensor_layout.py",
        "        _check_tiling(tensor)\n",
        "",
        "every_claim",
    ),
    (
        "bytes_of_another_dtype",
        "a target gets the bytes of the dtype that it says, not of the one that it has",
        "_core/loading/target_spec.py",
        "as_bits = table or not self.keeps or local.dtype == value.dtype",
        "as_bits = True",
        "every_claim",
    ),
    (
        "copied_into_another_dtype",
        "a local tensor of another dtype than its DTensor says is converted in silence",
        "_core/copies/copy_into.py",
        "theirs.dtype and not _by_class(theirs):\n",
        "theirs.dtype and False:\n",
        "every_claim",
    ),
    # --- side effects -------------------------------------------------------------------------
    (
        "the_graph_is_off_for_good",
        "gradients stay off after a copy",
        "_core/copies/copy_into.py",
        "            torch._C._set_grad_enabled(recording)\n",
        "            pass\n",
        "every_effect",
    ),
    (
        "leaves_are_remembered",
        "tensors of a state dict live on after the call",
        "_core/containers/walk.py",
        "        self.leaves: list[Any] = []\n",
        (
            "        self.leaves: list[Any] = []\n"
            "        Walk.met = [*getattr(Walk, 'met', []), self.leaves]\n"
        ),
        "every_effect",
    ),
    (
        "a_mark_on_parameters",
        "a parameter that was copied has an attribute more",
        "_core/tensors/values.py",
        "        tensor = nn.Parameter(tensor, requires_grad=like.requires_grad)\n",
        (
            "        like.was_copied = True  # type: ignore[attr-defined]\n"
            "        tensor = nn.Parameter(tensor, requires_grad=like.requires_grad)\n"
        ),
        "every_effect",
    ),
    # --- refusals -----------------------------------------------------------------------------
    (
        "numbers_for_tensors",
        "a number lands where a matrix was",
        "_core/loading/value_checks.py",
        "        wrong = offered in numbers and isinstance(held, torch.Tensor)",
        "        wrong = False and isinstance(held, torch.Tensor)",
        "every_refusal",
    ),
)
