"""Pytest's side of a run.

plugin        the hooks that join all packages
judging_loop  the loop of a run that judges several checks at a time
judge_pool    its judges: forks of the process that collected the checks
expectations  known failures of a subject, as data
progress      what a terminal shows meanwhile
time_left     how long the run still takes
reports       what pytest's own reporters are told
results       results.json
certified     what --certified refuses, and what may be said of a run that leaves nothing out
ending        signals, the exit code, and what was not judged
"""
