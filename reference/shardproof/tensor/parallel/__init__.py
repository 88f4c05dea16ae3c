"""The twin of ``torch.distributed.tensor.parallel``.

- ``_subclasses``: views and pieces of tensors whose class implements operations itself.
- ``_data_parallel_utils``: from a DTensor to its local tensor, and back.
- ``_redistribution``: redistribution of DTensors of any dtype.
- ``_local_parameters``: local Parameters that stand in for a module's DTensors.
- ``_optimizers``: optimizers that hold DTensors which local Parameters have replaced.
- ``_replicate_groups``: a check that the ranks of DDP or ``replicate`` hold the same shards.
- ``_forward_hooks``: DTensors in before every forward, local Parameters after it.
- ``ddp``: a tensor-parallel module below DistributedDataParallel.
- ``fsdp``: FSDP1 over tensor parallelism.
"""
