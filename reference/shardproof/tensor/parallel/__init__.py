"""The twin of ``torch.distributed.tensor.parallel``."""
