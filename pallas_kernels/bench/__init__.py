"""Speed of the kernels on the GPU at hand: `ffnlab bench kernels`, `make gpu-bench`.

Every row is one product, ours or XLA's, on the shapes of Llama-2-7B and Llama-3-8B and of mixtures
of experts. Weights rotate through sets larger than the cache, data is random, the figure is the
median of many turns, and the floor beside it is what bytes and operations allow.
"""

from pallas_kernels.bench.measure import Row, Work, measure
from pallas_kernels.bench.rows import rows

__all__ = ["Row", "Work", "measure", "rows"]
