"""Generated cases: drawn in the parent, run on real ranks, judged by an oracle, made smaller.

`ci/fuzz` runs them; see `generated.command`. To add a function: how it is called (`calls`), what it
must come to (a rule in `oracle/`), and what cases of it are drawn (`cases`,
`load_cases`, `more_cases`).

- `emit`: what a case is, and the Python that each rank runs of it;
- `data`, `rig`: what its tensors are made of; `telling`, `compare`: what ranks tell of them;
- `world`: the ranks; `judge`: one case; `search`: many of them; `repeat`: a failure's script.
"""
