"""Faults between FSDP1 and tensor parallelism with tensors of a kind of their own, and others.

Fields as in ddp.py: name, fault, file below shardproof, old, new, check file without test_.
"""

from __future__ import annotations

FAULTS: tuple[tuple[str, str, str, str, str, str], ...] = (
    (
        "subclass_is_narrowed",
        "a type that can be chunked but not sliced is refused",
        "tensor/parallel/fsdp/dtensor_chunks.py",
        "        if has_own_operations(local):\n            local = piece(",
        "        if False:\n            local = piece(",
        "fsdp_subclasses",
    ),
    (
        "subclass_is_detached",
        "a type without detach is refused where upstream views it",
        "tensor/parallel/_subclasses.py",
        "    with suppress(Exception):\n        return tensor.detach()\n",
        "    return tensor.detach()\n",
        "local_subclasses",
    ),
    (
        "inner_is_pending",
        "what a wrapper holds is handed on before it has arrived",
        "_core/tensors/subclasses.py",
        "                setattr(tensor, name, tree_unflatten(finished, structure))\n",
        "                pass\n",
        "fsdp_subclasses",
    ),
    (
        "closed_is_pending",
        "what a wrapper holds that tells nobody what is not waited for",
        "_core/tensors/subclasses.py",
        "    yield from vars(tensor).items()\n",
        "    yield from ()\n",
        "fsdp_subclasses",
    ),
    (
        "types_not_compared",
        "of a wrapper on one rank and a plain tensor on the other a part is gathered, or they hang",
        "tensor/parallel/fsdp/dtensor_gather.py",
        "        if kind != verdicts[0][1]:\n",
        "        if False:\n",
        "fsdp_subclasses",
    ),
    (
        "short_shard_alone",
        "the rank whose shard is short raises, and the others wait for it",
        "tensor/parallel/fsdp/dtensor_gather.py",
        "        good = good and _can_be_padded(tensor, local)\n",
        "",
        "fsdp_subclasses",
    ),
    (
        "subclass_is_lent",
        "the live weight is handed out where there is nothing to gather",
        "tensor/parallel/fsdp/dtensor_gather.py",
        "        _check_local(tensor, local)\n        return fresh_copy(local, local.device)",
        "        _check_local(tensor, local)\n        return local if own else local.clone()",
        "fsdp_subclasses",
    ),
    (
        "played_on_one_place",
        "where one process plays all ranks all of them get the chunk of one",
        "tensor/parallel/fsdp/dtensor_chunks.py",
        "        coordinate = root.get_coordinate()\n",
        "        with with_real_ranks():\n            coordinate = root.get_coordinate()\n",
        "fsdp_simulated",
    ),
    (
        "chunk_is_a_break",
        "the compiler gives up in the tables of meshes",
        "tensor/parallel/fsdp/dtensor_chunks.py",
        "    if torch.compiler.is_compiling():\n",
        "    if False:\n",
        "chunk_dtensor",
    ),
    (
        "chunk_forgets_strides",
        "a weight that is laid out by columns is said to be by rows",
        "tensor/parallel/fsdp/dtensor_chunks.py",
        "    return tuple(torch.empty_like(ghost).stride())\n",
        "    return tuple(torch.empty(ghost.shape, device='meta').stride())\n",
        "fsdp_details",
    ),
    (
        "chunk_loses_the_sign_of_zero",
        "negative zeros and the payload of NaNs are lost in a chunk",
        "tensor/parallel/fsdp/dtensor_chunks.py",
        "    copied = fresh_copy(local",
        (
            "    local = local + 0 if local.is_floating_point() and local.itemsize > 1 else local\n"
            "    copied = fresh_copy(local"
        ),
        "fsdp_details",
    ),
    (
        "rows_lose_the_sign_of_zero",
        "negative zeros and the payload of NaNs are lost in a ShardedTensor's chunk",
        "tensor/parallel/fsdp/sharded_tensor_chunks.py",
        "        return part.clone(memory_format=torch.contiguous_format)\n    return bits",
        (
            "        return part.clone(memory_format=torch.contiguous_format)\n"
            "    part = part + 0 if part.is_floating_point() and part.itemsize > 1 else part\n"
            "    return bits"
        ),
        "fsdp_details",
    ),
    (
        "large_chunk_unverified",
        "of a large weight a chunk of the wrong shape is gathered as if it were right",
        "tensor/parallel/fsdp/dtensor_gather.py",
        "stages, route.coordinates, chunk)\n",
        (
            "stages, route.coordinates, chunk) if along else collect(\n"
            "        stages, torch.empty(_FIRST_BYTES, dtype=torch.uint8), short=True\n"
            "    )\n"
        ),
        "fsdp_details",
    ),
    (
        "partial_is_forgotten",
        "values that are still to be summed over TP are said to be whole",
        "tensor/parallel/fsdp/dtensor_chunks.py",
        "        if isinstance(placement, Replicate) or not part:\n",
        "        if isinstance(placement, (Replicate, Partial)) or not part:\n",
        "fsdp_details",
    ),
    (
        "device_kinds_compared",
        "a shard that is on another device of the same kind keeps its place in the spec",
        "tensor/parallel/fsdp/sharded_tensor_chunks.py",
        "or placement.device() == device:",
        "or placement.device().type == device.type:",
        "fsdp_details",
    ),
    (
        "empty_shards_unlisted",
        "a rank to which FSDP leaves nothing has no shard for the checkpoint's planner",
        "tensor/parallel/fsdp/sharded_tensor_chunks.py",
        "        _chunk_rows(local, num_devices_per_node, pg, everywhere=True),\n",
        "        _chunk_rows(local, num_devices_per_node, pg),\n",
        "fsdp_details",
    ),
    (
        "spec_is_retyped",
        "the caller's spec takes the dtype of what was unflattened last",
        "tensor/parallel/_data_parallel_utils.py",
        "    spec = spec_with_dtype(spec, local.dtype)\n    if type",
        (
            "    if spec.tensor_meta is not None:\n"
            "        spec.tensor_meta = spec.tensor_meta._replace(dtype=local.dtype)\n    if type"
        ),
        "fsdp_details",
    ),
    (
        "flattened_trains_in_no_grad",
        "a chunk is part of a graph unless somebody forbids it",
        "tensor/parallel/fsdp/dtensor_chunks.py",
        "    meta = TensorMeta(torch.Size(tensor.shape), _dense_stride(tensor), tensor.dtype)\n",
        (
            "    meta = TensorMeta(torch.Size(tensor.shape), _dense_stride(tensor), tensor.dtype)\n"
            "    copied.requires_grad_(tensor.requires_grad)\n"
        ),
        "chunk_dtensor",
    ),
)
