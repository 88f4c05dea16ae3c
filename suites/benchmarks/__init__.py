"""asv benchmarks: what each function of the set costs, beside torch's and beside the floor.

A benchmark is one class in `bench_<area>.py`, a subclass of `measured.Measured`; what it declares
gives asv its parameters, what `work` and `floor` return is timed and counted on the ranks:

    class GatherStateDict(Measured):
        \"\"\"A sharded state dict becomes whole on every rank.\"\"\"

        functions = ("_state_dict_utils._gather_state_dict",)
        regimes = ("many", "large")
        sizes = (2, 4)

        def work(self, bed): ...
        def floor(self, bed): ...

The parts, in the order in which a number passes them:

    measured      the base class: what asv sees; asks the session, hands asv samples and counts
    settings      quick or full, device, backend; the regimes and their leaves
    session/      one warm parent for the whole run of asv, and the worlds forked from it
    bed           what a benchmark is given on a rank: data, meshes, the subject, floors
    goals         what the reference is to reach, and does: ci/bench --goals
    agreement     whether two runs of one code say the same: ci/bench --agree
    baseline      the counts that must not rise: ci/bench --check
    cost          the cost model as formulas, held against counted bytes
    command       ci/bench
    environment   the environment in which asv measures a commit

Modules that asv imports in each of its processes must not import torch: `work` and `floor` run on
the ranks, and import what they need there.
"""
