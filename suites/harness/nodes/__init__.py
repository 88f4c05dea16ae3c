"""Runs over several machines.

launch    starts torchrun on this machine, with the project's exit codes
cluster   the first node: asks the others for ranks
follower  every other node: forks the ranks that the first node asks for
"""
