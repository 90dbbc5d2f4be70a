"""W4A8: INT4 group-scaled weights times activations rounded to e4m3 per token (FireQ).

`matmul` is the public function; `pack_nibbles` and `unpack_nibbles` convert codes to and from the
canonical two-per-byte form. Layouts that one kernel alone reads belong to that kernel's file.
"""

from pallas_kernels.w4a8.api import matmul
from pallas_kernels.w4a8.reference import dequantize, pack_nibbles, unpack_nibbles

__all__ = ["dequantize", "matmul", "pack_nibbles", "unpack_nibbles"]
