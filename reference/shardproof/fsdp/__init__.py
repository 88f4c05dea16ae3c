"""FSDP1 over tensor parallelism, where torch's own code around the set errs.

`install(callers=True)` puts these functions and methods in the place of torch's.

"""
