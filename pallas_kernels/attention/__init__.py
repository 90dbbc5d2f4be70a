"""Prefill attention over FP8 queries and INT4 keys and values (FireQ's pipelined kernel)."""

from pallas_kernels.attention.api import prefill

__all__ = ["prefill"]
