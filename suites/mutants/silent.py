"""Plausible faults in what ranks agree on, ties, memory and cost. Fields as in copies.py.

An engineer who writes these functions from their description alone may well make each of them.
"""

from __future__ import annotations

FAULTS: tuple[tuple[str, ...], ...] = (
    # --- what ranks agree on ------------------------------------------------------------------
    (
        "placements_unagreed",
        "ranks whose placements differ mix parts of different cuts",
        "_core/gathering/leaf_entries.py",
        "if (found.summary, found.members) != (entry.summary, entry.members):",
        'if found.summary.split(", (")[0] != entry.summary.split(", (")[0]:',
        "agreement",
    ),
    (
        "reductions_unagreed",
        "ranks of which one sums and one takes the maximum get two answers",
        "_core/gathering/leaf_entries.py",
        "if (found.summary, found.members) != (entry.summary, entry.members):",
        'if found.summary.replace("(max)", "(sum)") != entry.summary.replace("(max)", "(sum)"):',
        "agreement",
    ),
    (
        "owners_unagreed",
        "shards that ranks think to be on different ranks are put in different places",
        "_core/sharding/tensor_layout.py",
        ", m.placement and m.placement.rank())",
        ")",
        "agreement",
    ),
    (
        "mesh_order_unagreed",
        "ranks whose meshes count the ranks in another order mix the parts",
        "_core/gathering/leaf_entries.py",
        "if (found.summary, found.members) != (entry.summary, entry.members):",
        "if found.summary != entry.summary:",
        "agreement",
    ),
    (
        "leaves_in_the_dicts_order",
        "leaves are told to others in the order of each rank's dict",
        "_core/gathering/sharded_leaves.py",
        "paths = sorted(self.leaves)",
        "paths = list(self.leaves)",
        "order_of_collectives",
    ),
    (
        "first_where_it_is_first",
        "ranks in several meshes wait for each other in a circle",
        "_core/gathering/agree_on_leaves.py",
        'return sorted(chosen.values(), key=attrgetter("key"))',
        "return sorted(chosen.values(), key=lambda domain: (domain.index(), domain.key))",
        "order_of_collectives",
    ),
    (
        "strange_leaf_raises_alone",
        "a leaf of an unsupported type on one rank raises there, and the others wait",
        "_core/gathering/sharded_leaves.py",
        "        except ValueError as error:\n            found.note_failure(error)\n",
        "        except ValueError:\n            raise\n",
        "gather_state_dict_laws",
    ),
    # --- ties ---------------------------------------------------------------------------------
    (
        "tied_by_object",
        "a parameter and its detached twin come apart",
        "_core/tensors/ties.py",
        "return id(tensor) if isinstance(tensor, ShardedTensor) else geometry(tensor)",
        "return id(tensor)",
        "ties",
    ),
    (
        "dtensors_tied_by_object",
        "a DTensor and its detached twin come apart",
        "_core/tensors/ties.py",
        'return ("DTensor", geometry(tensor._local_tensor), spec.placements, spec.shape)',
        'return ("DTensor", id(tensor), spec.placements, spec.shape)',
        "ties",
    ),
    (
        "views_copied_apart",
        "a weight and its transpose no longer change with each other",
        "_core/tensors/overlapping_copies.py",
        "self._make(tensor) if region is None else self._within(tensor, region)",
        "self._make(tensor)",
        "ties",
    ),
    (
        "whole_storages_copied",
        "of a large storage all is copied for the sake of two pieces",
        "_core/tensors/overlapping_copies.py",
        "held[geometry(memory)] = start, start + extent(memory)",
        "held[geometry(memory)] = 0, memory.untyped_storage().nbytes()",
        "ties",
    ),
    # --- memory -------------------------------------------------------------------------------
    (
        "offloaded_at_the_end",
        "the whole result is held where it was gathered, and then once more on the CPU",
        "_core/gathering/whole_tensors.py",
        (
            "        MeshGather(by_bucket_key[key], destinations, agreed, cpu_offload)"
            ".gather(results)\n"
        ),
        (
            "        MeshGather(by_bucket_key[key], destinations, agreed, False).gather(results)\n"
            "    if cpu_offload:\n"
            "        cpu = torch.device('cpu')\n"
            "        results = {at: full.to(cpu, copy=True) for at, full in results.items()}\n"
        ),
        "memory_options",
        "memory_options_of_loading",
    ),
    (
        "shard_of_a_copy",
        "a shard is a view of a copy of the full tensor, which lives as long as it does",
        "_core/loading/targets.py",
        "self.memory = full[block.region].clone(memory_format=torch.contiguous_format)",
        "self.memory = full.clone()[block.region].view(block.shape)",
        "memory_options",
        "memory_options_of_loading",
    ),
    # --- cost ---------------------------------------------------------------------------------
    *(
        (
            f"a_collective_per_{kind}",
            f"leaves that are {kind} are gathered one by one",
            "_core/gathering/whole_tensors.py",
            "                by_bucket_key[layout.bucket_key].append(kind)\n",
            (
                "                for leaf in kind:\n"
                f'                    own = leaf.path if {condition} else ""\n'
                "                    by_bucket_key[*layout.bucket_key, own].append([leaf])\n"
            ),
            "cost_kinds",
        )
        for kind, condition in (
            ("pending", "layout.reductions"),
            ("sharded_tensor", "layout.cuts is None"),
            ("uneven", "layout.shape and layout.shape[0] % 4"),
            ("odd_dtype", "layout.dtype not in (torch.float32, torch.bfloat16)"),
        )
    ),
    (
        "a_broadcast_per_shape",
        "whole tensors of different shapes travel one by one",
        "_core/loading/transport.py",
        "                together.append(parcel)\n",
        "                self._run_stream([parcel], False)\n",
        "cost_kinds",
    ),
    (
        "a_scatter_per_shape",
        "shards of tensors of different shapes travel one by one",
        "_core/loading/transport.py",
        "                apart.append(parcel)\n",
        "                self._run_stream([parcel], True)\n",
        "cost_kinds",
    ),
)
