"""Optimizers as optax chains: by name, in float32, with trust ratios, with annealed noise."""
