"""Package _core."""
