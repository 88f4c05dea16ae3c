"""From the shards of a state dict to whole tensors: what a gather needs of the packages below.

- ``leaf_entries``: what ranks tell each other of their sharded leaves, and whether it fits.
- ``sharded_leaves``: the sharded leaves of a state dict, found, checked and described.
- ``destinations``: which ranks get the result.
- ``mesh_gather``: the gather over some dimensions of a mesh, to all ranks or to one.
- ``agree_on_leaves``: ranks agree on the leaves that they are about to gather.
- ``local_copies``: copies of what no other rank holds a part of.
- ``whole_tensors``: the gather itself, tied leaves once.
- ``simulated``: the gather where one process plays all ranks, or tensors have no values.
"""
