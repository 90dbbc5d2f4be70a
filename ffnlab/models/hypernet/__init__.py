"""Hypernetworks: models whose output is the weights of another model."""
