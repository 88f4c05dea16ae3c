"""Package _core.gathering."""
