"""Faults in the reference, and the runs that prove that the conformance suite catches each.

A check that no fault kills proves nothing. There are three kinds:

    catalog       one change of a text each, with the checks that must fail: `ci/mutants`
    patches/      faults that take several changes, as unified diffs: `ci/mutants`, too
    operators     automatic changes of each place of the reference: `ci/mutation`

All are planted in a copy of the reference, which `judge` judges from one warm parent; `executed`
knows which check runs which statement, and `scope` which modules are judged by which suite. What
survives `ci/mutation` has its answer in survivors.toml. To add a fault: one entry in catalog.py, or
one patch.
"""
