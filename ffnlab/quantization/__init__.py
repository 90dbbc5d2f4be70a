"""Quantization: methods that store a model in fewer bits. The formats they fill are weights."""

__all__: list[str] = []
