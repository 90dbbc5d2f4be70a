"""Quantized linear maps in the formats of compressed-tensors, which vLLM reads, in and out."""
