"""Sparse products as Triton kernels, called through jax-triton, for one row of x.

For GPUs from Turing to Ada under a jax whose Mosaic GPU knows only Hopper (before 0.11.2), and to
compare with. As in TEAL (arXiv 2408.14690) loads are masked by the activations; unlike there the
blocks' partial sums are added by XLA, not by atomics, so repeats have the same bits.

A block of threads reads tiles of weight rows, [rows, words]; a word holds one column, or one of
each of the 8 planes of `Int4Rows`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from pallas_kernels._triton import launch
from pallas_kernels.sparse.packed import Int4Rows

if TYPE_CHECKING:
    import triton.language as tl

COLUMNS, STEPS = 256, 2  # words and turns of a block of `walk`
BLOCK_ROWS = {1: 32, 8: 4}  # weight rows per tile of `walk`, by planes
DOT_ROWS, DOT_COLUMNS = 4, {1: 1024, 8: 128}  # tile of `dots`


def walk_kernel(
    x, w, scales, out, K: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """out[split, p, n] = sum over the split's rows with x[k] != 0 of x[k] * plane p of w[k, n]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    planes = tl.arange(0, P)
    total = tl.zeros((P, BN), tl.float32)
    for turn in range(TURNS):
        k = (tl.program_id(1) * TURNS + turn) * BK + tl.arange(0, BK)
        v = tl.load(x + k, mask=k < K, other=0.0)
        live = (v != 0)[:, None] & (n < N)[None, :]
        words = tl.load(w + k[:, None].to(tl.int64) * N + n[None, :], mask=live, other=0)
        if P == 1:
            total += tl.sum(words.to(tl.float32) * v[:, None], 0)[None, :]
        else:
            unit = tl.load(
                scales + k[:, None] * P + planes[None, :], mask=(k < K)[:, None], other=0.0
            )
            codes = ((words[:, None, :] >> (4 * planes)[None, :, None]) & 15) - 8
            total += tl.sum(codes.to(tl.float32) * (v[:, None] * unit)[:, :, None], 0)
    at = (tl.program_id(1) * P + planes)[:, None] * N + n[None, :]
    tl.store(out + at, total, mask=(n < N)[None, :])


def dots_kernel(
    x, w, scales, gate, out, F: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BF: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """out[f] = gate[f] * <w[f], x>, rows with a zero gate unread; x is [P, N]."""
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    planes = tl.arange(0, P)
    g = tl.load(gate + f, mask=f < F, other=0.0)
    total = tl.zeros((BF,), tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        live = (g != 0)[:, None] & (n < N)[None, :]
        words = tl.load(w + f[:, None].to(tl.int64) * N + n[None, :], mask=live, other=0)
        v = tl.load(x + planes[:, None] * N + n[None, :], mask=(n < N)[None, :], other=0.0)
        if P == 1:
            total += tl.sum(words.to(tl.float32) * v, 1)
        else:
            unit = tl.load(
                scales + f[:, None] * P + planes[None, :], mask=(f < F)[:, None], other=0.0
            )
            codes = ((words[:, None, :] >> (4 * planes)[None, :, None]) & 15) - 8
            parts = tl.sum(codes.to(tl.float32) * v[None, :, :], 2)
            total += tl.sum(parts * unit, 1)
    tl.store(out + f, tl.where(g == 0, 0.0, g * total), mask=f < F)


def stored(w):
    """The array of words of a weight, its scales (the words once more if it has none), planes."""
    if isinstance(w, Int4Rows):
        return w.words, w.scales, 8
    return w, w, 1


def matvec(x, w, *, config=None):
    """`reference.matvec` for x [1, k] and w [k, n] or `Int4Rows`: [1, n] float32."""
    words, scales, planes = stored(w)
    (k, n), rows = words.shape, BLOCK_ROWS[planes]
    grid = (-(-n // COLUMNS), -(-k // (rows * STEPS)))
    parts = launch(
        walk_kernel, (grid[1], planes, n), grid, x[0].astype(jnp.float32), words, scales,
        K=k, N=n, P=planes, BN=COLUMNS, BK=rows, TURNS=STEPS,
    )  # fmt: skip
    return parts.sum(0).reshape(1, planes * n)


def rows(x, w_rows, gate, *, config=None):
    """`reference.rows` for x [1, d], w_rows [f, d] or `Int4Rows`, gate [1, f]: [1, f] float32."""
    words, scales, planes = stored(w_rows)
    f, n = words.shape
    x, gate = x[0].astype(jnp.float32), gate[0].astype(jnp.float32)
    return launch(
        dots_kernel, (f,), (-(-f // DOT_ROWS),), x, words, scales, gate,
        F=f, N=n, P=planes, BF=DOT_ROWS, BN=DOT_COLUMNS[planes],
    )[None]  # fmt: skip


def glu(gate, up_rows, down, x, *, config=None):
    """`reference.glu` for one row: `rows`, then `matvec`."""
    return matvec(rows(x, up_rows, gate), down)
