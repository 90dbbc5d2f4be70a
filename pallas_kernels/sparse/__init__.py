"""Products with a sparse vector: decoding that skips the rows of inactive channels.

`matvec` multiplies a vector that has zeros, `take` the channels of a list, `rows` computes only the
outputs whose gate is not zero, and `glu` does both for a gated FFN. Who sets what to zero is not
decided here. Weights are float arrays or `Int4Rows` (`pack`).
"""

from pallas_kernels.sparse.api import glu, matvec, rows, take
from pallas_kernels.sparse.blocks import GpuConfig
from pallas_kernels.sparse.packed import Int4Rows, pack, unpack
from pallas_kernels.sparse.xla import Config

__all__ = ["Config", "GpuConfig", "Int4Rows", "glu", "matvec", "pack", "rows", "take", "unpack"]
