"""What both kernels for Hopper keep in registers: layouts, and the products of the tensor core.

Exponentials meet the values without leaving the registers of the scores. A thread holds columns 2c
and 2c + 1 of every 8 keys (c: its place among the four of a row). For 16-bit products that is the
left operand as it is. An 8-bit operand wants columns 4c to 4c + 3 of every 16 keys: a thread hands
over the four that it has, 2c, 2c + 1, 8 + 2c, 8 + 2c + 1, and the values come in the same order
(`key_order`), on which a sum over keys does not depend.
"""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.numerics import E4M3

ROWS = 64  # of the left operand of a warp group's product
LAYOUT = plgpu.Layout.WGMMA
BY_ROW, BY_KEY = LAYOUT.reduce(1), LAYOUT.reduce(0)  # vectors along one axis of the scores


def tiled(minor, dtype):
    """How shared memory holds rows of `minor` numbers for the tensor core."""
    bits = 4 if dtype == jnp.int4 else 8 * jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(minor * bits, "attention")
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def full(shape, x, layout):
    """A float32 array of x in registers."""
    return plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)


def product(shape, a, b):
    """a @ b by the tensor core, float32 in registers, once it is there."""

    def run(total):
        plgpu.wgmma(total, a, b)
        return total[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def weighted(p, values, total=None, *, interpret=False):
    """Sum of a tile of values by its weights, once all products under way are there.

    Args:
      p: [64, keys] float32 in the layout of scores.
      values: shared memory [keys, d] of 16 bits, or [d, keys] e4m3 with its keys in `key_order`.
      total: [64, d] float32 to add to; None: 0.
      interpret: in the interpreter, whose tensor core takes nothing from registers.
    Returns:
      [64, d] float32.
    """
    narrow = values.dtype == E4M3
    if interpret:
        p = (key_order(p) if narrow else p).astype(values.dtype).astype(jnp.float32)
        dense = values[...].astype(jnp.float32)
        part = jnp.dot(p, dense.T if narrow else dense, precision="highest")
        return part if total is None else total + part
    a, b = (bytes_of(p), values.T) if narrow else (p.astype(values.dtype), values)
    if total is None:
        return product((ROWS, b.shape[1]), a, b)
    return cast(jax.Array, pl.run_state(lambda x: plgpu.wgmma(x, a, b))(plgpu.ACC.init(total)))


def key_order(x):
    """The last axis, a multiple of 16 keys, in the order in which `bytes_of` hands them over."""
    shape = x.shape
    return x.reshape(*shape[:-1], shape[-1] // 16, 2, 4, 2).swapaxes(-2, -3).reshape(shape)


def bytes_of(p):
    """p [64, keys] float32 as an e4m3 operand, its keys in `key_order`; saturates at 448."""
    result = plgpu.ShapeDtypeStruct(p.shape, jnp.dtype(E4M3), layout=plgpu.Layout.WGMMA_8BIT)

    @plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=result)
    def relabel(_, codes):
        layout = plgpu.Layout.WGMMA_8BIT.to_mgpu()
        held = np.empty(layout.registers_shape(p.shape), dtype=object)
        # Registers of two keys: by tile of 16 keys, its half, and the half of 16 rows.
        tiles = codes.registers.reshape(-1, 2, 2)
        four = [utils.vector_concat([*halves]) for tile in tiles for halves in tile.T]
        for index, register in zip(np.ndindex(held.shape), four, strict=True):
            held[index] = register
        return fragmented_array.FragmentedArray(_registers=held, _layout=layout, _is_signed=None)

    return relabel(p.astype(E4M3))


def spread(x, shape, axis):
    """A vector along one axis of a matrix."""
    return lax.broadcast_in_dim(x, shape, [axis])
