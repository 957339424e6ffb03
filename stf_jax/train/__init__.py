"""Training: what is trained, the optimiser, and one step of it."""
