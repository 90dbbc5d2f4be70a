"""Grouped products on Hopper (Pallas Mosaic GPU).

Groups are padded to whole tiles of 128 rows (`tiles.Padding`), so a thread block works for one
expert. Two warp groups compute 64 rows each and a third loads. In `multiply` blocks walk over
(tokens, columns) and contract over k; in `outer` over (expert, rows of dw, columns) and contract
over the expert's tokens, as many tiles as it has. FP8 products are promoted to float32 every 128
columns of x, because Hopper's FP8 accumulation is short.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat
from pallas_kernels.numerics import E4M3
from pallas_kernels.tiles import Padding

TILE = 128  # rows and columns of a block's output
GROUPS, STAGES = 2, 4


def multiply(x, w, scale, group_sizes, *, transposed, out_dtype, interpret=False):
    """Same contract as `reference.multiply`, k and n multiples of 128; `out_dtype` is 16 bits."""
    if x.dtype == E4M3 and not transposed:
        w, transposed = w.swapaxes(1, 2), True  # FP8 operands must be contiguous along k
    m, n = x.shape[0], w.shape[1 if transposed else 2]
    padding = Padding.of(group_sizes, m, TILE)
    scale = jnp.ones((m,), jnp.float32) if scale is None else scale
    rows = len(padding.tile_group) * TILE
    steps, step = x.shape[1] // depth(x.dtype), depth(x.dtype)
    run = _compat.kernel(
        functools.partial(multiply_body, steps, step, transposed),
        out_type=jax.ShapeDtypeStruct((rows, n), out_dtype),
        grid=(n // TILE, rows // TILE),
        grid_names=("column", "row"),
        num_threads=GROUPS + 1,
        thread_name="wg",
        interpret=interpret,
        scratch_types=[staging(out_dtype)],
    )
    y = run(padding.tile_group, x[padding.token], w, scale[padding.token])[padding.place]
    return jnp.where(padding.used[:, None], y, jnp.zeros((), y.dtype))


def multiply_body(steps, step, transposed, tile_group, x, w, scale, out, staged):
    """A tile of tokens times 128 columns of its expert's matrix."""
    column, row = lax.axis_index("column"), lax.axis_index("row")
    group, wg = tile_group[row], lax.axis_index("wg")
    rows, columns = pl.ds(row * TILE, TILE), pl.ds(column * TILE, TILE)
    if transposed:
        blocks = plgpu.BlockSpec(
            (TILE, step), lambda i: (0, i), transforms=tiled(step, x.dtype), delay_release=1
        )
    else:
        blocks = plgpu.BlockSpec(
            (step, TILE), lambda i: (i, 0), transforms=tiled(TILE, x.dtype), delay_release=1
        )
    specs = [
        plgpu.BlockSpec(
            (TILE, step), lambda i: (0, i), transforms=tiled(step, x.dtype), delay_release=1
        ),
        blocks,
    ]

    def finish(total):
        first = row * TILE + wg * 64
        unit = _compat.load(
            scale.at[pl.ds(first, 64)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
        )
        total = total * lax.broadcast_in_dim(unit, total.shape, [0])
        write(total, out.at[pl.ds(first, 64), columns], staged.at[wg])

    @pl.when(group >= 0)
    def _():
        matrix = w.at[group, columns] if transposed else w.at[group, :, columns]
        contract(
            (steps,),
            specs,
            (x.at[rows], matrix),
            finish,
            lambda a, b: (a.at[pl.ds(wg * 64, 64)], b.T if transposed else b),
            narrow=x.dtype == E4M3,
        )


def outer(x, dy, group_sizes, *, interpret=False):
    """Same contract as `reference.outer`, k and n multiples of 128, 16-bit operands."""
    m, k, n, experts = *x.shape, dy.shape[1], len(group_sizes)
    padding = Padding.of(group_sizes, m, TILE)
    # Rows that only fill a tile must add nothing: they are zeros in dy.
    size = len(padding.token)
    place = jnp.where(padding.used, padding.place, size)
    real = jnp.zeros((size,), bool).at[place].set(True, mode="drop")
    dy = jnp.where(real[:, None], dy[padding.token], jnp.zeros((), dy.dtype))
    tiles = -(-group_sizes.astype(jnp.int32) // TILE)
    run = _compat.kernel(
        outer_body,
        out_type=jax.ShapeDtypeStruct((experts, k, n), jnp.float32),
        grid=(experts, n // TILE, k // TILE),
        grid_names=("expert", "column", "row"),
        num_threads=GROUPS + 1,
        thread_name="wg",
        interpret=interpret,
        scratch_types=[staging(jnp.float32)],
    )
    # An expert without rows takes one tile of anybody's: its result is dropped here.
    first = jnp.minimum(jnp.cumsum(tiles) - tiles, len(padding.tile_group) - 1)
    dw = run(first, jnp.maximum(tiles, 1), x[padding.token], dy)
    return jnp.where((group_sizes > 0)[:, None, None], dw, 0.0)


def outer_body(first, tiles, x, dy, out, staged):
    """128 x 128 of one expert's gradient, over all its tiles of tokens."""
    expert, column, row = (lax.axis_index(name) for name in ("expert", "column", "row"))
    wg, start = lax.axis_index("wg"), first[expert]
    rows, columns = pl.ds(row * TILE, TILE), pl.ds(column * TILE, TILE)
    step = TILE // 2  # of tokens: shared memory also holds a float32 tile
    spec = plgpu.BlockSpec(
        (step, TILE), lambda i: (2 * start + i, 0), transforms=tiled(TILE, x.dtype), delay_release=1
    )

    def finish(total):
        write(total, out.at[expert, pl.ds(row * TILE + wg * 64, 64), columns], staged.at[wg])

    contract(
        (2 * tiles[expert],),
        [spec, spec],
        (x.at[:, rows], dy.at[:, columns]),
        finish,
        lambda a, b: (a.at[:, pl.ds(wg * 64, 64)].T, b),
        narrow=False,
    )


def contract(grid, specs, refs, finish, operands, *, narrow):
    """finish(sum over the pipeline's steps of a @ b), [64, 128] per compute warp group."""

    def context(run):
        if narrow:
            zero = plgpu.layout_cast(jnp.zeros((64, TILE), jnp.float32), plgpu.Layout.WGMMA)
            finish(run(zero))
            return

        def scope(total):
            run(total)
            finish(total[...])

        pl.run_scoped(scope, plgpu.ACC((64, TILE), jnp.float32))

    def add(_, a, b, total):
        a, b = operands(a, b)
        if narrow:

            def scope(part):
                plgpu.wgmma(part, a, b)
                return part[...]

            return total + pl.run_scoped(scope, plgpu.ACC((64, TILE), jnp.float32))
        plgpu.wgmma(total, a, b)
        plgpu.wgmma_wait(1)
        return total

    plgpu.emit_pipeline_warp_specialized(
        add,
        grid=grid,
        memory_registers=40,
        wg_axis="wg",
        num_compute_wgs=GROUPS,
        max_concurrent_steps=STAGES,
        compute_context=context,
        in_specs=specs,
    )(*refs)


def write(total, target, staged):
    """Rounds a tile and copies it out through shared memory."""
    staged[...] = total.astype(staged.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged, target)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def depth(dtype):
    """Columns of x per pipeline step: 128 bytes."""
    return 128 // jnp.dtype(dtype).itemsize


def staging(dtype):
    """Shared memory for the output of a block."""
    return plgpu.SMEM((GROUPS, 64, TILE), dtype, transforms=tiled(TILE, dtype))


def tiled(minor, dtype):
    """Transforms of shared memory whose rows hold `minor` elements."""
    bits = 8 * jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(minor * bits, "grouped")
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)
