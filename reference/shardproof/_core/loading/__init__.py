"""Package _core.loading."""
