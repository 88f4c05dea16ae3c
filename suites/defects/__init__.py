"""What torch breaks, as a catalogue of defects: one root cause, one file, one stable id.

    catalogue/    SP-001.toml …: the defects; to add one, copy a file and take the next number
    words         the words of a defect: severities with their rules, roads, who mends it
    catalogue     reads the files, strictly
    seen          what a whole run saw of each defect: seen.json, for the page and for the tests
    summary       the defects that a run met, worst first: what a report ends with
    page          docs/defects.md
    __main__      ci/defects

Expectations (suites/expectations) lead from a failing check to its defects.
"""
