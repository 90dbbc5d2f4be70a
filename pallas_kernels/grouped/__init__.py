"""Grouped matrix products: tokens sorted by expert, each times its expert's matrix (dropless MoE).

`matmul` takes bfloat16 or FP8 and differentiates in tokens and matrices. INT4 experts are
`pallas_kernels.w4a8.grouped`.
"""

from pallas_kernels.grouped.api import matmul

__all__ = ["matmul"]
