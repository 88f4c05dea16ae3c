"""`ci/bundle`: one file that holds a run, to hand over; and whether such a file can be believed.

__main__     the command
contents     what of a run goes into the file
archive      the file: a zip with checksums, and a digest of the whole at its end
crosscheck   whether the parts of a bundle say the same
inventory    which checks the suites of a commit have
verify       all of that, in the order in which people ask

A bundle has no signature. What it can prove, and what not, stands in docs/worlds-and-verdicts.md.
"""
