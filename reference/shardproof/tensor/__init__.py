"""The twin of ``torch.distributed.tensor``.

- ``parallel``: tensor parallelism below DDP and FSDP.
"""
