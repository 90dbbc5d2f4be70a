"""W4A8: INT4 group-scaled weights times activations rounded to e4m3 per token (FireQ).

`matmul`, `glu` (gate and up in one) and `grouped` (experts) are the public functions.
`pack_nibbles` and `unpack_nibbles` convert codes to and from the canonical two-per-byte form,
`pack` and `unpack` to and from `Fragments`, the order in which the Hopper kernel's lanes read them,
and `join` makes one matrix of gate and up, which `split` takes apart.
"""

from pallas_kernels.w4a8.api import matmul
from pallas_kernels.w4a8.api_glu import glu
from pallas_kernels.w4a8.api_grouped import grouped
from pallas_kernels.w4a8.backends import reads_fragments
from pallas_kernels.w4a8.nibbles import pack_nibbles, unpack_nibbles
from pallas_kernels.w4a8.packed import Fragments, join, narrowest_encoding, pack, split, unpack
from pallas_kernels.w4a8.reference import dequantize

__all__ = [
    "Fragments",
    "dequantize",
    "glu",
    "grouped",
    "join",
    "matmul",
    "narrowest_encoding",
    "pack",
    "pack_nibbles",
    "reads_fragments",
    "split",
    "unpack",
    "unpack_nibbles",
]
