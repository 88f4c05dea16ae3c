"""Named faults in the reference, and the run that proves that the conformance suite catches each.

A check that no fault kills proves nothing. Each entry of `catalog.MUTANTS` is one deliberate
defect: a text of the reference, what to put in its place, and the function whose checks must fail.
`ci/mutants` makes a copy of the reference for each, plants the fault, and judges the copy.
To add one: one entry in catalog.py.
"""
