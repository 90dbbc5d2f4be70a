"""Attention: the layer, rotary positions, and the products behind it for CPUs and short texts."""
