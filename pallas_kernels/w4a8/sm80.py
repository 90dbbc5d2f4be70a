"""INT4 weights times FP8 activations on Ampere and Ada (Pallas Mosaic GPU, mma.sync).

As on Hopper the weights are the tensor core's A operand, in the same `Fragments`. Ada multiplies
e4m3; Ampere has none, so codes and e4m3 activations become float16, which holds both exactly. There
is no TMA here: a warp group reads its tiles of words from memory by 128-bit loads, the tokens by
the loads that the operand's layout asks for, and several tiles of rows are read ahead of the
products. One warp group per block; the output is float32 partial sums, which XLA adds.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, backend
from pallas_kernels.w4a8 import decode, plan
from pallas_kernels.w4a8.packed import unpack_tiles


class Shape(NamedTuple):
    """Static facts of one call; see `multiply`."""

    config: plan.Config
    encoding: str
    glu: bool
    ada: bool
    interpret: bool
    steps: int

    @property
    def blocks(self):
        """Tiles of 64 columns per warp group."""
        return self.config.columns // 64

    @property
    def unit(self):
        """What a decoded weight must be multiplied by."""
        if self.encoding == "tc" or self.interpret:
            return 1.0
        return decode.SUBNORMAL if self.ada else decode.HALF_SUBNORMAL


def multiply(
    x8, sx, words, scales, tile_group, *, config, encoding, glu, treatment, out, interpret=False
):
    """Same contract as `sm90.multiply`; `treatment` is "promote" and the output float32."""
    (m, k), tiles = x8.shape, words.shape[1]
    ada = backend.device()[1] == (8, 9)
    steps = k // 128 // config.k_tiles
    shape = Shape(config, encoding, glu, ada, interpret, steps)
    if not ada:
        x8 = x8.astype(jnp.float16)
        x8 = x8 if interpret else decode.half_order(x8)
    run = _compat.kernel(
        functools.partial(body, shape),
        out_type=jax.ShapeDtypeStruct(
            (config.split_k, tiles * (32 if glu else 64), m), jnp.float32
        ),
        grid=(tiles // shape.blocks, m // config.tile_m, config.split_k),
        grid_names=("column", "row", "piece"),
        approx_math=True,
        interpret=interpret,
    )
    return jnp.sum(run(tile_group, x8, sx, words, scales), axis=0).T


def follows(config, out):
    """Whether the kernel has an epilogue: XLA, which adds its sums, does that in the same pass."""
    return False


def body(shape, tile_group, x, sx, words, scales, out):
    """A tile of tokens times one warp group's columns, over one piece of the rows of w."""
    column, row, piece = (lax.axis_index(name) for name in ("column", "row", "piece"))
    group, tile_m = tile_group[row], shape.config.tile_m

    @pl.when(group >= 0)
    def _():
        operand = jnp.float8_e4m3fn if shape.ada else jnp.float16
        zero = jnp.zeros((64, tile_m), jnp.float32)
        if not shape.interpret:
            zero = plgpu.layout_cast(zero, _compat.mma_layouts(operand)[2])
        first, count = plan.share(piece, shape.steps, shape.config.split_k)
        add = functools.partial(
            step,
            shape,
            x.at[pl.ds(row * tile_m, tile_m)],
            words.at[group],
            scales.at[group],
            column * shape.blocks,
            first,
            zero,
        )
        sums = lax.fori_loop(0, count, add, (zero,) * shape.blocks)
        write(shape, sums, sx, out, (row, column, piece))


def step(shape, x, words, scales, tile, first, zero, i, sums):
    """Adds `k_tiles` groups of 128 rows to the sums; words are read before the first product."""
    each = [
        ((first + i) * shape.config.k_tiles + j, block)
        for j in range(shape.config.k_tiles)
        for block in range(shape.blocks)
    ]
    read = [_compat.load(words.at[tile + b, k], layout=decode.WORDS) for k, b in each]
    sums = list(sums)
    for (k, block), held in zip(each, read, strict=True):
        tokens = x.at[:, pl.ds(k * 128, 128)].T
        columns = scales.at[k, pl.ds((tile + block) * 64, 64)]
        scale = _compat.load(columns, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        part = product(shape, held, tokens, zero)
        scale = lax.broadcast_in_dim(scale.astype(jnp.float32), part.shape, [0])
        sums[block] += part * scale
    return tuple(sums)


def product(shape, held, tokens, zero):
    """[64, tile_m] float32: one tile of weights times 128 rows of the tokens."""
    if shape.interpret:
        weights = unpack_tiles(held[None, None], shape.encoding).astype(jnp.float32)
        return jnp.dot(weights, tokens[...].astype(jnp.float32), precision="highest")
    if shape.ada:
        weights, operand = decode.plain(shape.encoding, ada=True)(held), jnp.float8_e4m3fn
    else:
        weights, operand = decode.half(shape.encoding)(held), jnp.float16
    loaded = _compat.load(tokens, layout=_compat.mma_layouts(operand)[1], optimized=False)
    return _compat.mma(zero, weights, loaded)


def write(shape, sums, sx, out, where):
    """Scales the sums by token and writes them out."""
    row, column, piece = where
    rows = pl.ds(row * shape.config.tile_m, shape.config.tile_m)
    sums = list(sums)
    for i, total in enumerate(sums):
        unit = sx.at[i if shape.glu else 0, rows]
        unit = _compat.load(unit, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        sums[i] = total * lax.broadcast_in_dim(unit * shape.unit, total.shape, [1])
    if shape.glu:
        gate, up = sums
        sums = [gate / (1.0 + jnp.exp(-gate)) * up]
    for i, total in enumerate(sums):
        _compat.store(out.at[piece, pl.ds((column * len(sums) + i) * 64, 64), rows], total)
