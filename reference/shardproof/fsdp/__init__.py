"""FSDP1 over tensor parallelism, where torch's own code around the set errs.

`install(callers=True)` puts these functions and methods in the place of torch's.

- ``_flat_param``: what FSDP flattens, and the gradients that it shows.
- ``_optim_utils``: the optimizer's state between FSDP's flat parameters and the model's names.
- ``_state_dict_utils``: the model's state dict, loaded.
- ``fully_sharded_data_parallel``: the norm of all gradients.
"""
