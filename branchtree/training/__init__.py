"""Training: the loop around the core, on accelerate."""
