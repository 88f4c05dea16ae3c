"""A second, independent reference: what each rank must get, by a simulation of all of them at once.

Slow and obvious. It knows nothing of the reference or of torch's distributed code: ranks are
entries of a list, a DTensor is a `Sim` that says what it is, and elements are cut and put together
by their indices.
"""
