"""`ci/site`: pages of many runs, for GitHub Pages or a folder; from their results.json alone.

__main__     the command
history      the runs in columns (subject, torch, backend), and what each says
mixture      whether they are of one commit of the suites, and what may be compared
comparison   what the page that compares any two runs is given
badge        a run in one line, as an SVG
build        the pages
in_browser   what is wrong with pages in Chromium, for the tests

    index.html       versions x backends x functions, and the nights
    runs/<run>.html  one run, at an address that stays
    diff.html#A..B   any two runs
    badge.svg        of torch.distributed, its newest release; badges/<column>.svg of each column
    runs.json        the runs for programs
"""
