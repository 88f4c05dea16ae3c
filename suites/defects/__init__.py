"""What torch breaks, as a catalogue of defects: one root cause, one file, one stable id.

    catalogue/      SP-001.toml …: the defects; to add one, copy a file and take the next number
    words           the words of a defect: severities with their rules, roads, who mends it
    catalogue       reads the files, strictly
    seen            what whole runs saw of each defect: seen.json, for the page and for the tests
    summary         the defects that a run met, worst first: what a report ends with
    listing         chooses defects, and tells one in full
    page            docs/defects.md
    __main__        ci/defects
    reproducers/    sp_001_some_words.py …: scripts that show a defect with torch alone
    reproduce       ci/reproduce
    runs            runs a script with torchrun, or in forks of a warm process
    install_first   runs a script after shardproof.install()

Expectations (suites/expectations) lead from a failing check to its defects.
"""
