"""Package _core.copies."""
