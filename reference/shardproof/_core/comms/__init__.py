"""Package _core.comms."""
