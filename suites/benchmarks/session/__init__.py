"""One warm parent for a whole run of asv, and the worlds that it forks.

asv starts a process for each benchmark and parameter; starting torch and ranks in each would cost
seconds a number. So the first process starts a server and the others attach to it:

    client      in asv's process: find the server or start it, ask, wait with a deadline
    server      answers one request at a time; ends with the run that it serves, or when idle
    parent      the warm parent: forks a world for each measurement
    world       the parent's side of that world, built from harness.world
    rounds      the rank's side: the arms in turns, each result checked
    awake       CPUs that do not halt meanwhile
    counting    collectives, bytes and memory of one call
    profiling   where a call spends its time
    statistics  from samples of ranks to one number
"""
