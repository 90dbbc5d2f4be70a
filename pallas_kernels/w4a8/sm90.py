"""INT4 weights times FP8 activations on Hopper (Pallas Mosaic GPU).

The weights are the A operand of the tensor core and the tokens B, so that eight tokens cost an
8-wide product. One thread block holds two compute warp groups, each with its own columns of w, and
one group that loads: `stages` steps of 128 rows are in flight. A group's partial sum over 128 rows
is scaled in float32 ("promote"), which also bounds the tensor core's short accumulation; "table"
rounds q * scale to e4m3 in registers instead and adds the partial sums as they are. Blocks are
persistent and walk over (tokens, columns) in a snake, so that neighbours share what they load.

With few tokens there are fewer blocks than multiprocessors: `split_k` cuts the rows of w between
blocks, whose float32 partial sums XLA adds.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat
from pallas_kernels.numerics import to_e4m3
from pallas_kernels.w4a8 import decode, plan
from pallas_kernels.w4a8.packed import unpack_tiles

WORD_SHAPE = (8, 128)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static facts of one call; see `multiply` for the operands.

    Attributes:
      m, k, tiles: tokens, rows of w, and tiles of 64 columns of w (padded sizes).
      config: how the work is cut.
      encoding, glu, treatment, interpret: see `multiply`.
      out: dtype of the output; float32 is written as partial sums.
    """

    m: int
    k: int
    tiles: int
    config: plan.Config
    encoding: str
    glu: bool
    treatment: str
    out: jnp.dtype
    interpret: bool

    @property
    def blocks(self) -> int:
        """Tiles of 64 columns per warp group."""
        return self.config.columns // 64

    @property
    def tile_n(self) -> int:
        """Tiles of 64 columns per thread block."""
        return self.blocks * self.config.groups

    @property
    def wide(self) -> int:
        """Output columns per warp group."""
        return 64 if self.glu else self.config.columns

    @property
    def items(self) -> tuple[int, int, int]:
        """Pieces of the work along tokens, columns and rows of w."""
        return self.m // self.config.tile_m, self.tiles // self.tile_n, self.config.split_k

    @property
    def steps(self) -> int:
        """Pipeline steps of one piece."""
        return self.k // 128 // self.config.k_tiles // self.config.split_k

    @property
    def partial(self) -> bool:
        """Whether the output is float32 partial sums [split_k, n, m], not [m, n]."""
        return self.out == jnp.float32

    @property
    def unit(self) -> float:
        """What a decoded weight must be multiplied by."""
        return decode.SUBNORMAL if self.encoding == "sm" else 1.0


def multiply(
    x8, sx, words, scales, tile_group, *, config, encoding, glu, treatment, out, interpret=False
):
    """The kernel on padded operands.

    Args:
      x8: [m, k] float8_e4m3fn, m a multiple of config.tile_m.
      sx: [1, m] float32: multiplies the rows of the result; [2, m] with `glu`, gate's and up's.
      words: [e, n / 64, k / 128, 8, 128] int32, `packed`; with `glu` tiles are gate's and up's.
      scales: [e, k / 128, n], float32, bfloat16 or float8_e4m3fn.
      tile_group: [m / tile_m] int32: which of the e matrices a tile of tokens takes, -1 for none.
      config: a `Config` that fits.
      encoding: of the words.
      glu: silu(x @ gate) * (x @ up).
      treatment: "promote" or "table" (encoding "tc").
      out: output dtype; float32, or 16 bits with config.split_k == 1.
      interpret: run the body in the interpreter.
    Returns:
      [m, n] (n / 2 with `glu`) in `out`. Rows of tiles whose group is -1 are not written.
    """
    m, k = x8.shape
    shape = Shape(m, k, words.shape[1], config, encoding, glu, treatment, jnp.dtype(out), interpret)
    n = words.shape[1] * (32 if glu else 64)
    split, work = config.split_k, shape.items[0] * shape.items[1] * config.split_k
    result = (split, n, shape.m) if shape.partial else (shape.m, n)
    staging = (8, 128) if shape.partial else (config.groups, config.tile_m, shape.wide)
    transforms = () if shape.partial else tiled(shape.wide, 16)
    run = _compat.kernel(
        functools.partial(body, shape),
        out_type=jax.ShapeDtypeStruct(result, out),
        grid=(min(config.cores // config.cluster, work // config.cluster),),
        grid_names=("sm",),
        num_threads=config.groups + 1,
        thread_name="wg",
        approx_math=True,
        interpret=interpret,
        scratch_types=[plgpu.SMEM(staging, out, transforms=transforms)],
        **cluster_options(config),
    )
    y = run(tile_group, x8, sx, words, scales)
    return jnp.sum(y, axis=0).T if shape.partial else y


def cluster_options(config):
    """Thread blocks side by side along n that share one copy of the activations."""
    if config.cluster == 1:
        return {}
    return {"cluster": (config.cluster,), "cluster_names": ("cluster",)}


def body(shape, tile_group, x, sx, words, scales, out, staging):
    """One persistent thread block: allocates the pipeline's buffers, then works off its pieces."""
    buffers = pipeline(shape, lambda *_: None, lambda *_: None).get_allocations(
        words.at[0], x, scales.at[0]
    )

    @functools.partial(pl.run_scoped, buffers=buffers, collective_axes="wg")
    def _(buffers):
        m_items, n_items, split = shape.items
        n_items //= shape.config.cluster

        @plgpu.nd_loop((m_items * n_items * split,), collective_axes="sm")
        def _(info):
            piece = lax.rem(info.index[0], split)
            tile = lax.div(info.index[0], split)
            row, column = plgpu.planar_snake(tile, (m_items, n_items), 1, 8)
            if shape.config.cluster > 1:
                column = column * shape.config.cluster + lax.axis_index("cluster")
            group = tile_group[row]

            @pl.when(group >= 0)
            def _():
                refs = (x, sx, words.at[group], scales.at[group], out, staging)
                one_piece(shape, refs, buffers, (row, column, piece))

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def one_piece(shape, refs, buffers, where):
    """A tile of tokens times a thread block's columns, over one piece of the rows of w."""
    x, sx, words, scales, out, staging = refs
    row, column, piece = where
    tile_m, tile_n, span = shape.config.tile_m, shape.tile_n, shape.steps * shape.config.k_tiles

    def context(run):
        zero = plgpu.layout_cast(jnp.zeros((64, tile_m), jnp.float32), plgpu.Layout.WGMMA)
        sums = run((zero,) * shape.blocks)
        write(shape, sums, sx, out, staging, where)  # reads sx only now: registers are scarce

    pipeline(shape, functools.partial(step, shape), context)(
        words.at[pl.ds(column * tile_n, tile_n), pl.ds(piece * span, span)],
        x.at[pl.ds(row * tile_m, tile_m), pl.ds(piece * span * 128, span * 128)],
        scales.at[pl.ds(piece * span, span), pl.ds(column * tile_n * 64, tile_n * 64)],
        allocations=buffers,
    )


def pipeline(shape, step, context):
    """Loads of weights, activations and scales beside `step`, by a warp group of its own."""
    config, k_tiles, tile_n = shape.config, shape.config.k_tiles, shape.tile_n
    tokens = plgpu.BlockSpec(
        (config.tile_m, 128 * k_tiles),
        lambda i: (0, i),
        transforms=tiled(128, 8),
        memory_space=plgpu.SMEM,
        collective_axes=("cluster",) if config.cluster > 1 else (),
    )
    spec = functools.partial(plgpu.BlockSpec, memory_space=plgpu.SMEM)
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(shape.steps,),
        memory_registers=40,
        wg_axis="wg",
        num_compute_wgs=config.groups,
        max_concurrent_steps=min(config.stages, shape.steps),
        compute_context=context,
        in_specs=[
            spec((tile_n, k_tiles, *WORD_SHAPE), lambda i: (0, i, 0, 0)),
            tokens,
            spec((k_tiles, tile_n * 64), lambda i: (i, 0)),
        ],
    )


def step(shape, _, words, x, scales, sums):
    """Adds `k_tiles` groups of 128 rows to the sums of this warp group's columns."""
    first, sums = lax.axis_index("wg") * shape.blocks, list(sums)
    for i in range(shape.config.k_tiles):
        tokens = x.at[:, pl.ds(i * 128, 128)]
        for block in range(shape.blocks):
            tile = words.at[first + block, i]
            columns = scales.at[i, pl.ds((first + block) * 64, 64)]
            scale = _compat.load(columns, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
            scale = scale.astype(jnp.float32)
            if shape.treatment == "table":
                sums[block] += product(shape, tile, tokens, scale)
            else:
                part = product(shape, tile, tokens, None)
                sums[block] += part * lax.broadcast_in_dim(scale, part.shape, [0])
    return tuple(sums)


def product(shape, tile, tokens, scale):
    """[64, tile_m] float32: one tile of weights times 128 rows of the tokens."""
    if shape.interpret:
        return interpreted(shape, tile, tokens, scale)

    def scope(accumulator):
        words = _compat.load(tile, layout=decode.WORDS)
        if scale is None:
            weights = decode.plain(shape.encoding)(words)
        else:
            weights = decode.table(shape.encoding)(words, scale)
        plgpu.wgmma(accumulator, weights, tokens.T)
        return accumulator[...]

    return pl.run_scoped(scope, plgpu.ACC((64, shape.config.tile_m), jnp.float32))


def interpreted(shape, tile, tokens, scale):
    """`product` without PTX, which the interpreter does not know."""
    weights = unpack_tiles(tile[...][None, None], shape.encoding).astype(jnp.float32) / shape.unit
    if scale is not None:
        weights = to_e4m3(weights * scale[:, None]).astype(jnp.float32)
    return jnp.dot(weights, tokens[...].astype(jnp.float32).T, precision="highest")


def write(shape, sums, sx, out, staging, where):
    """Scales the sums by token and writes them out, transposed through shared memory."""
    row, column, piece = where
    tile_m, group = shape.config.tile_m, lax.axis_index("wg")
    rows = pl.ds(row * tile_m, tile_m)
    sums = list(sums)
    for i, total in enumerate(sums):
        unit = sx.at[i if shape.glu else 0, rows]
        unit = _compat.load(unit, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        sums[i] = total * lax.broadcast_in_dim(unit * shape.unit, total.shape, [1])
    if shape.glu:
        gate, up = sums
        sums = [gate / (1.0 + jnp.exp(-gate)) * up]
    first = (column * shape.config.groups + group) * shape.wide
    if shape.partial:
        for i, total in enumerate(sums):
            _compat.store(out.at[piece, pl.ds(first + i * 64, 64), rows], total)
        return
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for i, total in enumerate(sums):
        turned = plgpu.layout_cast(total.astype(shape.out), plgpu.Layout.WGMMA_TRANSPOSED)
        staging.at[group, :, pl.ds(i * 64, 64)].T[...] = turned
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging.at[group], out.at[rows, pl.ds(first, shape.wide)])


def tiled(minor, bits):
    """Transforms of shared memory whose rows hold `minor` elements, as the tensor core reads it."""
    swizzle = plgpu.find_swizzle(minor * bits, "w4a8")
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))
    return tiling, plgpu.SwizzleTransform(swizzle)
