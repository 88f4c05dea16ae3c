"""One warm parent for a whole run of asv, and the worlds that it forks.

asv starts a process for each benchmark and parameter; starting torch and ranks in each would cost
seconds a number. So the first process starts a server and the others attach to it:

    server             answers one request at a time; ends with the run that it serves, or when idle
    parent             the warm parent: forks a world for each measurement
    task               one measurement, as ranks get it
    world              the parent's side of that world, built from harness.parent.world
    awake              CPUs that do not halt meanwhile
    rounds             the rank's side: the arms in turn, each result checked
    malloc_settings    freed memory is kept, so that page faults do not move between calls
    counting           collectives, bytes, memory and Python calls of one call
    peaks              the most memory that a call holds
    operations         the operations of a call; those that a tensor subclass passes on, once
    profiling          where a call spends its time

`benchmarks.session_client`, in asv's process, finds the server or starts it.
"""
