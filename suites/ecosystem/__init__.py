"""Libraries on top of torch, with and without the reference under them."""
