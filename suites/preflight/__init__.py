"""Is this machine fit for a run? Asked first, so that no subject is blamed for the machine.

    ci/preflight --device cuda

prints what the machine is, then a line for each of its parts that a run leans on: limits, network,
GPUs, and a world that moves exact data. Each line that is not `ok` says what to change. It ends
with 0, or with 3 where a run's verdicts could not be trusted.

    findings   the words: what a run needs, what was found
    facts      the environment, as text
    machine    limits, shared memory, network, clock, the results folder
    gpus       what the driver and torch say of the GPUs
    probe      what torch says, from a process of its own
    trial      starts a world through the harness
    worlds     the checks that this world runs

A new part: a function `(need) -> Finding`, listed in `__main__.PARTS`, and a test that makes it
fail.
"""
