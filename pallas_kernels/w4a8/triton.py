"""INT4 weights times FP8 activations as a Triton kernel, called through jax-triton.

For Ampere and Ada where `sm80` does not run: under a jax without `mma` (before 0.11.2), and for
canonical codes and groups that are not 128. Codes are read as they are stored, two rows of w per
byte; even and odd rows are multiplied apart, by the even and odd columns of x, so that nothing is
interleaved. float16 holds codes and e4m3 exactly; each group's sum is scaled in float32. Few tokens
are cut along k, and XLA adds the pieces.

`Fragments` are unpacked at every call: a device without `sm80` is better served by canonical codes,
and `ffnlab` keeps them so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from pallas_kernels import backend, quantize
from pallas_kernels._triton import launch
from pallas_kernels.w4a8 import plan
from pallas_kernels.w4a8.packed import canonical

if TYPE_CHECKING:
    import triton.language as tl

COLUMNS = 128  # of a block
LARGEST = 64  # tokens of a block


def product_kernel(
    x, codes, scales, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
    STEPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[piece, m, n] = sum over the piece's groups g of scales[g, n] * x[m, g] @ q[g, n].

    x is [2, M, K / 2] float16, the even columns before the odd ones; a group has 2 * HALF rows.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    here, there = (n < N)[None, :], (m < M)[:, None]
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(STEPS):
        group = tl.program_id(2) * STEPS + step
        rows = group * HALF + tl.arange(0, HALF)
        at = rows[:, None].to(tl.int64) * N + n[None, :]
        both = tl.load(codes + at, mask=here, other=0).to(tl.uint16)
        # A nibble with its sign bit turned is code + 8: the last bits of 1024 + 8 + code.
        low = (((both & 15) ^ 8) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
        high = (((both >> 4) ^ 8) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
        places = m[:, None] * (K // 2) + rows[None, :]
        even = tl.load(x + places, mask=there, other=0.0)
        odd = tl.load(x + places + M * (K // 2), mask=there, other=0.0)
        part = tl.dot(odd, high, tl.dot(even, low))
        unit = tl.load(scales + group * N + n, mask=n < N, other=0.0)
        total += part * unit[None, :]
    where = (tl.program_id(2) * M + m)[:, None].to(tl.int64) * N + n[None, :]
    tl.store(out + where, total, mask=there & here)


def matmul(x, sx, codes, scales, divisor, *, group, **_):
    """Same contract as `reference.matmul` for x that is or is rounded to e4m3, without a table."""
    x8, sx = quantize.tokens(x) if sx is None else (x, sx)
    codes = canonical(codes, scales.shape[1])
    (m, k), n = x8.shape, scales.shape[1]
    pairs = x8.astype(jnp.float16).reshape(m, k // 2, 2).transpose(2, 0, 1)
    tokens = next((size for size in (16, 32) if m <= size), LARGEST)
    columns, rows = -(-n // COLUMNS), -(-m // tokens)
    groups = k // group
    pieces = plan.best_split(groups, columns * rows, backend.cores()) if m <= LARGEST else 1
    parts = launch(
        product_kernel, (pieces, m, n), (columns, rows, pieces),
        pairs, codes, scales.astype(jnp.float32), warps=8 if tokens == LARGEST else 4, stages=3,
        M=m, N=n, K=k, HALF=group // 2, STEPS=groups // pieces, BM=tokens, BN=COLUMNS,
    )  # fmt: skip
    return sx * jnp.sum(parts, axis=0) / divisor
