"""What the functions with upstream's names are made of. Read the packages from the bottom up.

    _state_dict_utils             tensor.parallel          functions with upstream's names
            |                            |
            v                            |
    gathering   loading                  |                 state dicts between ranks
            |                            |
            v                            v
    comms       copies                                     bytes between ranks; copies on one rank
            |
            v
    sharding    containers                                 which rank holds what; nested containers
            |
            v
    tensors                                                one tensor, on one rank
            |
            v
    limits                                                 how much memory a call may take

A package imports only from those below it; ``ci/layers.toml`` says so, and ``ci/lint`` holds it.

- ``limits``: the size of a bucket, and from which size on a tensor travels without one.
- ``tensors``: dtypes, bits, ties and subclasses; knows no rank.
- ``containers``: nested state dicts, their leaves and paths; knows no rank.
- ``sharding``: which elements each rank holds; arithmetic, which moves no byte.
- ``copies``: copies of the leaves of a state dict on one rank.
- ``comms``: collectives, buckets and the agreement of ranks; knows no state dict.
- ``gathering``: from shards to whole tensors.
- ``loading``: from whole tensors to shards.

The way of a tensor through ``_gather_state_dict``:

    gathering.sharded_leaves     walk the containers (containers.walk), validate each sharded leaf,
                                 describe its layout (sharding.tensor_layout)
    gathering.destinations       which ranks want results
    gathering.agree_on_leaves    one small collective (comms.agreement): all ranks go on, or all
                                 raise the same error
    gathering.whole_tensors      tied leaves once; leaves over the same mesh dimensions together
    gathering.mesh_gather        pack into buckets (comms.buckets), all-gather or gather to one
                                 (comms.collectives), write each shard into the new whole tensor
                                 (sharding.uniform_grid, sharding.blocks), reduce partials
    gathering.local_copies       copies of what no other rank holds, and the containers around all

The way of a tensor through ``_broadcast_state_dict``:

    loading.manifest             the source sends names, shapes, dtypes and ties of all tensors
    loading.targets              meanwhile each rank sorts its local values by how they take tensors
    loading.plan                 which target takes which part (sharding.target_part); checks only
    comms.agreement              all ranks learn what all require, or all raise the same error
    loading.requirements         the shards that each rank requires, as blocks and as a grid
    loading.transport            broadcast or scatter buckets; a large tensor goes straight into the
                                 memory of its target
    loading.targets              the object for the local state dict
"""
