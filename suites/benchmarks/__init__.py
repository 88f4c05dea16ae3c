"""asv benchmarks: what each function of the set costs, beside torch's and beside the floor.

A benchmark is one class in `bench_<area>.py`, a subclass of `base.Measured`; what it declares
gives asv its parameters, what `work` and `floor` return is timed and counted on the ranks:

    class GatherStateDict(Measured):
        \"\"\"A sharded state dict becomes whole on every rank.\"\"\"

        functions = ("_state_dict_utils._gather_state_dict",)
        regimes = ("many", "large")
        sizes = (2, 4)

        def work(self, ctx): ...
        def floor(self, ctx): ...

The parts, in the order in which a number passes them; each imports only those above it:

    settings        quick or full, device, backend; the regimes and their leaves
    statistics      from the samples of all ranks to one number
    session_client  in asv's process: asks the server of the run
    work            what a benchmark gives back on a rank: a call, its check, its reset
    rank_context    what a benchmark is given on a rank: data, meshes, the subject, floors
    base            the base class of all benchmarks: what asv sees
    listing         all benchmarks, and the functions that they cover
    journal         each measurement of a run, as JSON lines
    machine_label   the machine and the settings, for the head of a table
    run/            one warm parent for a whole run of asv, and the worlds that it forks
    results/        tables, goals, the baseline of counts, the cost model
    command         ci/bench
    environment     the environment in which asv measures a commit
    world_cost      ci/world-cost: what a fresh world costs a check

Modules that asv imports in each of its processes must not import torch: `work` and `floor` run on
the ranks, and import what they need there.
"""
