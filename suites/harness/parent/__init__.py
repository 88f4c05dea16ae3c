"""The side of the parent: it starts the ranks of a world, watches them, and judges the check.

local_ranks  the processes of a world's ranks on this machine
rank_state   one rank, as the parent sees it
machines     the machines of a run, and which ranks each of them takes
world        starts all ranks of a world, watches them, ends them
worlds       which world a check gets: a kept one, one started ahead, or a fresh one
hangs        what ranks that hang did: their last collectives compared
blame        from the records of all ranks to one verdict that names the rank and the cause
judge        one check: its world, its records, its verdict
"""
