"""What people read of a run: from results.json and nothing else.

`python -m report out/latest` prints the matrix of functions by laws and the failures.
"""
