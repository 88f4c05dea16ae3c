"""Package _core.sharding."""
