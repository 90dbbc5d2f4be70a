"""Quantization: methods that store a model in fewer bits. The formats they fill are weights."""

from ffnlab.quantization.fireq import FireQStats, fireq
from ffnlab.quantization.nearest import nearest

__all__ = ["FireQStats", "fireq", "nearest"]
