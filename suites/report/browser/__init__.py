"""The pages of suites/report/html in a real browser: the system's Chromium, driven by Playwright.

    chromium        finds it, opens pages in it, takes pictures
    example_runs    results of runs of every kind, small and large, as pages show them
    visiting        the example pages, and a tab for each test
    pages           what a reader does with a page: filter, search, links, keyboard, themes, print

Playwright has a thread of its own. The harness forks from a process that has one, so
`suites/report/test_browser.py` runs `pages` in another process, and tells each of its verdicts.
"""
