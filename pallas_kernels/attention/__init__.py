"""Attention over float or INT4 keys and values: prompts (`prefill`) and single steps (`decode`)."""

from pallas_kernels.attention.api import prefill
from pallas_kernels.attention.api_decode import decode

__all__ = ["decode", "prefill"]
