"""What is known of a check and of its ranks, as data.

call_ring  the last collectives of a rank, in a file that its parent reads without its help
verdicts   the verdicts of a check, and the fate of one rank
"""
