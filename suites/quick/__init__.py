"""ci/quick: an answer within a minute after a change of one module.

imports   which modules of this repository import which, read from their sources
affected  from changed files to the functions and the test files that depend on them
choose    a pytest plugin: takes a share of each function's and law's checks that fits the time
__main__  ci/quick
"""
