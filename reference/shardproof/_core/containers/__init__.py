"""Nested containers: how a state dict is walked, flattened, and built again with the same types.

- ``container_types``: what counts as a container, and another of the same type.
- ``walk``: the leaves of a nested state dict, and the same containers around other leaves.
- ``leaf_values``: leaves that a checkpoint can hold, and copies of those that are no tensors.
- ``typed_paths``: paths that also know the types of containers and keys.
- ``flat_names``: the leaves with their paths and flat keys, and colliding keys escaped.
- ``builder``: a nested state dict built from paths.
"""
