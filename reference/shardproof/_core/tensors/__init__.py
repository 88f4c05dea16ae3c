"""Package _core.tensors."""
