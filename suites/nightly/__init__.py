"""One night of the project: the steps in order, and tonight held against the night before.

    __main__     the command line
    chain        the steps, each a command that a person could type
    verdicts     tonight's verdicts against the last night's
    speed        tonight's benchmarks against the last green night's
    issue        the one issue that says what is wrong, through gh
    state        what is remembered from night to night

A step is a command of `ci/`: what fails here is repeated by typing it.
"""
