"""Worlds and verdicts: starts the ranks of a check, watches them all at once, says what happened.

The harness knows processes and nothing of any subject. It is a pytest plugin
(`harness.session.plugin`). A check is an ordinary pytest function with a `world` mark, whose body
runs on every rank:

    @pytest.mark.world(2, 4)
    def test_all_reduce_sums(world, rank, device):
        \"\"\"An all-reduce leaves the same sum on every rank.\"\"\"
        tensor = torch.tensor([rank], device=device)
        dist.all_reduce(tensor)
        assert tensor.item() == sum(range(world.size))

The packages, from the top down; each imports only those below it, and `ci/lint` holds them to it:

    session   pytest's side: hooks, expectations, results, several checks at a time
    nodes     runs over several machines
    parent    the process that judges: starts ranks, watches them, finds the verdict
    rank      the process that is judged with: runs the check, records its collectives
    settings  the command line, the subject, the marks of a check
    records   verdicts and calls, as data
    system    processes, sockets, devices
"""
