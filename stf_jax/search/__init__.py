"""`stf-jax search`: how many tokens of an image each layer needs (G-Search, P-Sigmoid)."""
