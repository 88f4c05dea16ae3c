"""Worlds and verdicts: starts the ranks of a check, watches them all at once, says what happened.

The harness knows processes and nothing of any subject. It is a pytest plugin (`harness.plugin`);
a check is an ordinary pytest function with a `world` mark, whose body runs on every rank:

    @pytest.mark.world(2, 4)
    def test_all_reduce_sums(world, rank, device):
        \"\"\"An all-reduce leaves the same sum on every rank.\"\"\"
        tensor = torch.tensor([rank], device=device)
        dist.all_reduce(tensor)
        assert tensor.item() == sum(range(world.size))

The parts, in the order in which a check meets them:

    options       the command line, checked before anything starts
    requirements  what a check's marks ask for, and whether this run can give it
    warm          the parent that ranks are forked from: modules imported, one thread, no CUDA
    world         the parent's side: start the ranks, watch them, end them
    rank          the rank's side: run the check, say what happened
    fixtures      what a check is given: world, rank, device, mesh, subject, judged
    recording     the last collectives of a rank, noted where its parent reads them (ring)
    leaks         what must not outlive a check
    hangs         what ranks that hang did: their collectives compared
    blame         from the ranks' records to one verdict that names the rank and the cause
    expectations  known failures of a subject, as data
    results       results.json
    plugin        the pytest hooks that join all this
"""
