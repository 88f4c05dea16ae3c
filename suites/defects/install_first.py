"""Puts the reference into torch, then runs the script that the command line names.

torchrun … install_first.py [--callers] SCRIPT: so that a reproducer needs no word about it.
"""

import runpy
import sys

del sys.path[0]  # this folder: its modules are none of the script's

import shardproof  # noqa: E402

del sys.argv[0]
if callers := sys.argv[0] == "--callers":
    del sys.argv[0]
shardproof.install(callers=callers)
runpy.run_path(sys.argv[0], run_name="__main__")
