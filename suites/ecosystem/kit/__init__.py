"""What scenarios share: digests of what they got, oracles of a resumed training."""
