"""The state dicts of ``torch.distributed.checkpoint``, where torch's own code around the set errs.

`install(callers=True)` puts these functions in the place of torch's.

- ``state_dict``: model and optimizer state of parallel models, got and set.
- ``_full_loads``: strictness of full loads, and errors that every rank raises.
- ``_optimizer_state``: which state an optimizer is given by a state dict, and may lack.
- ``_local_optimizer_state``: optimizer state of parameters that data parallelism made local.
"""
