"""A reference implementation of PyTorch's private parallelism utilities.

The package mirrors ``torch.distributed``: a module here has the path, the function names and the
signatures of its upstream twin, so either can stand in for the other. What the functions promise
is written in their docstrings and judged by the suites.

    import shardproof
    shardproof.install()

puts the reference under torch's public API, in every process that calls it.
"""

from shardproof._install import install, installed, uninstall

__all__ = ["install", "installed", "uninstall"]
__version__ = "0.1.0"
