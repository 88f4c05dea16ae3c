"""shardproof.prove(): right jobs are whole, planted losses found, the job stays as it was.

A job is a model with its optimizer and a step (`kit.jobs`); a planted loss changes one, or the
code that saves and loads it, on one rank or all (`kit.losses`). `ci/prove-losses` runs each of
both and prints the table of docs/prove.md.
"""
