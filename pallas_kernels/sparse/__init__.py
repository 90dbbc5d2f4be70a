"""Products with a sparse vector: CPU decoding that skips the rows of inactive channels.

`matvec` multiplies a vector that has zeros, `rows` computes only the outputs whose gate is not
zero, and `glu` does both for a gated FFN. Who sets what to zero is not decided here.
"""

from pallas_kernels.sparse.api import glu, matvec, rows
from pallas_kernels.sparse.xla import Config

__all__ = ["Config", "glu", "matvec", "rows"]
