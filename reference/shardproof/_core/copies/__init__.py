"""Copies of the leaves of a state dict, on one rank.

- ``snapshots``: copies in new memory; tied leaves stay tied.
- ``copy_into``: whether one leaf can take the values of another, and the copy.
- ``companions``: all leaves of a state dict, copied into those of another.
"""
