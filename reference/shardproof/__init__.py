"""A reference implementation of PyTorch's private parallelism utilities.

The package mirrors ``torch.distributed``: a module here has the path, the function names and the
signatures of its upstream twin, so either can stand in for the other. What the functions promise
is written in their docstrings and judged by the suites.

    import shardproof
    shardproof.install()

puts the reference under torch's public API, in every process that calls it.

Its parts, in reading order:

- ``_install``: the functions of this package in the place of torch's, and out again.
- ``checkpoint``: state dicts of models and optimizers, in the place of torch's callers of the set.
- ``fsdp``: FSDP1 over tensor parallelism, likewise.
- ``_state_dict_utils``: state dicts between sharded and whole.
- ``tensor``: tensor parallelism below DDP and FSDP.
- ``_core``: what the functions with upstream's names are made of.
"""

from shardproof._install import install, installed, uninstall

__all__ = ["install", "installed", "uninstall"]
__version__ = "0.1.0"
