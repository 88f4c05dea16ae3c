"""Faults in moving many tensors that are laid out alike at once. Fields as in copies.py."""

from __future__ import annotations

FAULTS: tuple[tuple[str, ...], ...] = (
    (
        "results_share_a_bucket",
        "gathered tensors are views of one memory: saving one saves all",
        "_core/sharding/uniform_grid.py",
        "            made.extend(copies_of_each(near))\n",
        "            made.extend(near.clone().unbind())\n",
        "many_alike",
    ),
    (
        "new_targets_share_a_bucket",
        "what is made for targets on meta are views of one memory",
        "_core/loading/transport.py",
        "copies_of_each(parts), strict=True)",
        "parts.clone().unbind(), strict=True)",
        "many_alike",
    ),
    (
        "alike_in_the_order_of_the_dict",
        "ranks with another order of keys get each other's tensors",
        "_core/gathering/sharded_leaves.py",
        "        paths = sorted(self.leaves)\n",
        "        paths = list(self.leaves)\n",
        "many_alike",
    ),
    (
        "source_forgets_its_row",
        "the source's own shards of small tensors stay as they were",
        "_core/loading/transport.py",
        "            if self.wholes is not None and not self._own_row(parcel):\n",
        "            if self.wholes is not None:\n",
        "many_alike",
    ),
    (
        "lost_between_buckets",
        "the tensor that does not fit into the rest of a bucket never travels",
        "_core/comms/buckets.py",
        "                    at = (bucket + 1) * width\n",
        "                    at, first = (bucket + 1) * width, first + 1\n",
        "many_alike",
    ),
    (
        "first_ones_again",
        "of many tensors later ones have the values of the first ones",
        "_core/sharding/uniform_grid.py",
        "            yield at, rows.narrow(len(participants), at, number), near[:number]\n",
        "            yield at, rows.narrow(len(participants), 0, number), near[:number]\n",
        "many_alike",
    ),
    (
        "leaves_alike_by_shape",
        "tensors of one shape are taken for laid out alike, however they are sharded",
        "_core/gathering/sharded_leaves.py",
        (
            "*(id(spec.mesh), spec.placements, spec.tensor_meta),\n"
            '                    getattr(spec, "shard_order", None),\n'
        ),
        "*(id(spec.mesh), spec.tensor_meta),\n",
        "many_alike",
    ),
    (
        "distributed_share_a_stack",
        "what is cut together of full tensors are views of one memory",
        "_state_dict_utils/distribute.py",
        "copies_of_each(stacked[:, *block.region])",
        "stacked[:, *block.region].clone().unbind()",
        "many_alike",
    ),
    (
        "distributed_change_places",
        "of small full tensors that are cut together each target gets the values of another",
        "_state_dict_utils/distribute.py",
        "        stacked = torch.stack([full for _, full in some])\n",
        "        stacked = torch.stack([full for _, full in reversed(some)])\n",
        "many_alike",
    ),
    (
        "targets_alike_by_shape",
        "targets of one shape are taken for alike, however they are sharded",
        "_core/loading/targets.py",
        "        sharding = id(spec.mesh), spec.placements, spec.tensor_meta, order\n",
        "        sharding = id(spec.mesh), spec.tensor_meta\n",
        "many_alike",
    ),
    (
        "targets_change_places",
        "of many small targets that are alike each gets the values of another",
        "_core/loading/transport.py",
        "                        copy_each(parts, opened)\n",
        "                        copy_each(parts, opened[::-1])\n",
        "many_alike",
    ),
)

ON_A_DEVICE: tuple[tuple[str, ...], ...] = (
    (
        "snapshots_change_places",
        "of small tensors that leave a device together each gets the values of another",
        "_core/tensors/pinned_copy.py",
        "[index for index, _ in part], copies_of_each(near)",
        "[index for index, _ in reversed(part)], copies_of_each(near)",
        "many_alike",
    ),
    (
        "copies_change_places",
        "small tensors that leave a device together land in each other's targets",
        "_core/tensors/pinned_copy.py",
        "copy_all([target for target, _ in part], list(near.unbind()))",
        "copy_all([target for target, _ in reversed(part)], list(near.unbind()))",
        "many_alike",
    ),
)
"""Faults that show where tensors lie on another device than the CPU."""
