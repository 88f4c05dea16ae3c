"""What the integration checks share: models, recipes for wrapping them, their oracles."""
