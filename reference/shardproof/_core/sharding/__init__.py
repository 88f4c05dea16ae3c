"""Which rank holds which elements of a tensor, as arithmetic on sizes. No byte moves here.

- ``simulated_ranks``: ranks that one process plays, as under torch's LocalTensorMode.
- ``ranks``: the global ranks of device meshes, coordinates, and which shard each rank holds.
- ``domain``: the ranks of a mesh or process group that share tensors, in order.
- ``blocks``: which elements each shard holds, by mesh coordinate and placements.
- ``uniform_grid``: shards of equal size, as one view of the whole tensor.
- ``partial_reduction``: pending reductions, carried out on gathered contributions.
- ``table_shards``: DTensors whose local tensor wraps the shards of an embedding table.
- ``tensor_layout``: how a DTensor or ShardedTensor is sharded, and its summary for other ranks.
- ``target_part``: which part of a full tensor each rank takes.
- ``dtensors``: DTensors around local tensors, from a spec that is there already.
- ``sharded_tensors``: a ShardedTensor of the same sharding around other local shards.
"""
