"""Package _core.containers."""
