"""Rounding on the device at the speed of memory: tokens to FP8, weights to packed INT4.

`tokens` gives e4m3 codes with one scale per row, `groups` INT4 codes two per byte with one scale
per group of rows, both as `pallas_kernels.w4a8` reads them.
"""

from pallas_kernels.quantize.api import divided, groups, tokens

__all__ = ["divided", "groups", "tokens"]
