"""The side of a rank: the process that a check's body runs in.

rank_process  joins the process group, runs checks, says what happened
spawned       the same as a new interpreter, for `--start-method spawn`
fixtures      what a check is given: world, rank, device, mesh, subject, judged
recording     notes every collective that the rank issues
leaks         what must not outlive a check
reporter      what happened on the rank, phase by phase, and its answer to the parent
"""
