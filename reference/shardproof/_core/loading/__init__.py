"""From whole tensors to the shards of local state dicts: what a broadcast or distribution needs.

- ``value_checks``: whether a value of the full state dict can take the place of a local one.
- ``target_spec``: how targets that are alike take full tensors.
- ``targets``: the entries of a local state dict that take full tensors.
- ``manifest``: what the source rank has, sent to all ranks first.
- ``requirements``: which shards each rank requires, and whether they form a uniform grid.
- ``plan``: what this rank does with the source's tensors, and what it tells the others.
- ``transport``: full tensors from the source to all, broadcast whole or scattered as shards.
- ``simulated``: the broadcast where one process plays all ranks, or tensors have no values.
"""
