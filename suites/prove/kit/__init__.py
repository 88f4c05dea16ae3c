"""Jobs, planted losses, and what is asked of a proof."""
