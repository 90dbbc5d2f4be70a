"""INT4 weights times FP8 activations on Hopper (Pallas Mosaic GPU).

The weights are the A operand of the tensor core and the tokens B, so that eight tokens cost an
8-wide product. One thread block holds two compute warp groups, each with its own columns of w, and
one group that loads: `stages` steps of 128 rows are in flight. A group's partial sum over 128 rows
is scaled in float32 ("promote"), which also bounds the tensor core's short accumulation; "table"
rounds q * scale to e4m3 in registers instead and adds the partial sums as they are. Blocks are
persistent and walk over (tokens, columns) in a snake, so that neighbours share what they load.

With few tokens there are fewer blocks than multiprocessors: `split_k` cuts the rows of w between
blocks, evenly or to within a step, and XLA adds their float32 partial sums.

A residual is added to the sums in registers. Sums of squares are taken of the rounded tile as it
lies in shared memory: there a row of it belongs to four lanes, in registers it belongs to four
warps, whose exchange would go through one scratch space for both warp groups. Each group writes the
sums of its own columns, which XLA adds: no atomics, the same bits every time.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

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
TOGETHER = 64  # tokens of a tile up to which registers hold two products


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static facts of one call; see `multiply` for the operands.

    Attributes:
      m, k, tiles: tokens, rows of w, and tiles of 64 columns of w (padded sizes).
      config: how the work is cut.
      encoding, glu, treatment, interpret: see `multiply`.
      out: dtype of the output; float32 is written as partial sums.
      residual, with_sumsq: whether there is one to add, and whether squares are summed.
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
    residual: bool = False
    with_sumsq: bool = False

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
        """Pipeline steps of all pieces."""
        return self.k // 128 // self.config.k_tiles

    @property
    def longest(self) -> int:
        """Pipeline steps of the longest piece."""
        return -(-self.steps // self.config.split_k)

    @property
    def partial(self) -> bool:
        """Whether the output is float32 partial sums [split_k, n, m], not [m, n]."""
        return self.out == jnp.float32

    @property
    def together(self) -> int:
        """Products of a warp group that are under way at a time."""
        return 2 if self.config.tile_m <= TOGETHER else 1

    @property
    def unit(self) -> float:
        """What a decoded weight must be multiplied by."""
        return decode.SUBNORMAL if self.encoding == "sm" else 1.0


class Memory(NamedTuple):
    """References to a kernel's operands in global memory, results, and staging buffer."""

    x: Any
    sx: Any
    words: Any
    scales: Any
    residual: Any
    out: Any
    squares: Any
    staging: Any

    @classmethod
    def of(cls, shape, x, sx, words, scales, *rest):
        """From what `plgpu.kernel` hands over; None for what a shape does without."""
        rest = list(rest)
        residual, out = rest.pop(0) if shape.residual else None, rest.pop(0)
        squares = rest.pop(0) if shape.with_sumsq else None
        return cls(x, sx, words, scales, residual, out, squares, *rest)


def multiply(*operands, **options):
    """The kernel on padded operands.

    Args:
      *operands, **options: see `multiply_and_follow`, without an epilogue.
    Returns:
      [m, n] (n / 2 with `glu`) in `out`. Rows of tiles whose group is -1 are not written.
    """
    return multiply_and_follow(*operands, **options)[0]


def follows(config, out):
    """Whether the kernel has an epilogue: where it writes whole 16-bit tiles of 64 tokens or more,
    the fewest that shared memory can be read back by row."""
    return jnp.dtype(out).itemsize == 2 and config.tile_m % 64 == 0


def multiply_and_follow(
    x8,
    sx,
    words,
    scales,
    tile_group,
    *,
    config,
    encoding,
    glu,
    treatment,
    out,
    residual=None,
    with_sumsq=False,
    interpret=False,
):
    """The kernel on padded operands, and what follows its sums.

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
      residual: [m, n] in `out`, added to the result, or None; where `follows` holds.
      with_sumsq: sum the squares of each row; where `follows` holds.
      interpret: run the body in the interpreter.
    Returns:
      [m, n] (n / 2 with `glu`) in `out`; sums of squares [m] float32, or None. Rows of tiles whose
      group is -1 are not written.
    """
    m, k = x8.shape
    facts = encoding, glu, treatment, jnp.dtype(out), interpret, residual is not None, with_sumsq
    shape = Shape(m, k, words.shape[1], config, *facts)
    n = words.shape[1] * (32 if glu else 64)
    split, work = config.split_k, shape.items[0] * shape.items[1] * config.split_k
    result = (split, n, shape.m) if shape.partial else (shape.m, n)
    staging = (8, 128) if shape.partial else (config.groups, config.tile_m, shape.wide)
    transforms = () if shape.partial else tiled(shape.wide, 16)
    sums = [jax.ShapeDtypeStruct((n // shape.wide, m), jnp.float32)] if with_sumsq else []
    run = _compat.kernel(
        functools.partial(body, shape),
        out_type=[jax.ShapeDtypeStruct(result, out), *sums],
        grid=(min(config.cores // config.cluster, work // config.cluster),),
        grid_names=("sm",),
        num_threads=config.groups + 1,
        thread_name="wg",
        approx_math=True,
        interpret=interpret,
        scratch_types=[plgpu.SMEM(staging, out, transforms=transforms)],
        **cluster_options(config),
    )
    y, *squares = run(tile_group, x8, sx, words, scales, *([] if residual is None else [residual]))
    y = jnp.sum(y, axis=0).T if shape.partial else y
    return y, jnp.sum(squares[0], axis=0) if with_sumsq else None


def cluster_options(config):
    """Thread blocks side by side along n that share one copy of the activations."""
    if config.cluster == 1:
        return {}
    return {"cluster": (config.cluster,), "cluster_names": ("cluster",)}


def body(shape, tile_group, *references):
    """One persistent thread block: allocates the pipeline's buffers, then works off its pieces."""
    memory = Memory.of(shape, *references)
    nothing = lambda *_: None  # noqa: E731
    buffers = pipeline(shape, shape.longest, nothing, nothing).get_allocations(
        memory.words.at[0], memory.x, memory.scales.at[0]
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
                matrix = {"words": memory.words.at[group], "scales": memory.scales.at[group]}
                one_piece(shape, memory._replace(**matrix), buffers, (row, column, piece))

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def one_piece(shape, memory, buffers, where):
    """A tile of tokens times a thread block's columns, over one piece of the rows of w."""
    row, column, piece = where
    tile_m, tile_n, k_tiles = shape.config.tile_m, shape.tile_n, shape.config.k_tiles
    first, count = plan.share(piece, shape.steps, shape.config.split_k)
    # As many as the longest piece has, which never go past the end: the grid has the number.
    first, span = first * k_tiles, shape.longest * k_tiles

    def context(run):
        zero = plgpu.layout_cast(jnp.zeros((64, tile_m), jnp.float32), plgpu.Layout.WGMMA)
        sums = run((zero,) * shape.blocks)
        write(shape, sums, memory, where)  # reads sx only now: registers are scarce

    pipeline(shape, count, functools.partial(step, shape), context)(
        memory.words.at[pl.ds(column * tile_n, tile_n), pl.ds(first, span)],
        memory.x.at[pl.ds(row * tile_m, tile_m), pl.ds(first * 128, span * 128)],
        memory.scales.at[pl.ds(first, span), pl.ds(column * tile_n * 64, tile_n * 64)],
        allocations=buffers,
    )


def pipeline(shape, count, step, context):
    """Loads for `count` times `step` beside it, by a warp group of its own."""
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
        grid=(count,),
        memory_registers=40,
        wg_axis="wg",
        num_compute_wgs=config.groups,
        max_concurrent_steps=plan.in_flight(config, shape.k),
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
    tiles = [(i, block) for i in range(shape.config.k_tiles) for block in range(shape.blocks)]
    for at in range(0, len(tiles), shape.together):
        together, factors = tiles[at : at + shape.together], []
        for i, block in together:
            columns = scales.at[i, pl.ds((first + block) * 64, 64)]
            scale = _compat.load(columns, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
            factors.append(scale.astype(jnp.float32))
        table = factors if shape.treatment == "table" else [None] * len(together)
        parts = products(
            shape,
            [
                (words.at[first + block, i], x.at[:, pl.ds(i * 128, 128)], scale)
                for (i, block), scale in zip(together, table, strict=True)
            ],
        )
        for (_, block), part, scale in zip(together, parts, factors, strict=True):
            if shape.treatment == "promote":
                part = part * lax.broadcast_in_dim(scale, part.shape, [0])
            sums[block] += part
    return tuple(sums)


def products(shape, operands):
    """[64, tile_m] float32 of each (tile of weights, 128 rows of the tokens, scale or None).

    All are under way together: one is multiplied while the next one's weights are decoded, and all
    are waited for at once.
    """
    if shape.interpret:
        return [interpreted(shape, *each) for each in operands]

    def scope(*accumulators):
        for accumulator, (tile, tokens, scale) in zip(accumulators, operands, strict=True):
            words = _compat.load(tile, layout=decode.WORDS)
            if scale is None:
                weights = decode.plain(shape.encoding)(words)
            else:
                weights = decode.table(shape.encoding)(words, scale)
            plgpu.wgmma(accumulator, weights, tokens.T)
        later = range(len(operands) - 1, -1, -1)
        read = plgpu.wgmma_accumulator_load
        return [read(total, wait_n=n) for total, n in zip(accumulators, later, strict=True)]

    accumulator = plgpu.ACC((64, shape.config.tile_m), jnp.float32)
    return pl.run_scoped(scope, *[accumulator] * len(operands))


def interpreted(shape, tile, tokens, scale):
    """One of `products` without PTX, which the interpreter does not know."""
    weights = unpack_tiles(tile[...][None, None], shape.encoding).astype(jnp.float32) / shape.unit
    if scale is not None:
        weights = to_e4m3(weights * scale[:, None]).astype(jnp.float32)
    return jnp.dot(weights, tokens[...].astype(jnp.float32).T, precision="highest")


def write(shape, sums, memory, where):
    """Scales the sums by token and writes them out, transposed through shared memory."""
    row, column, piece = where
    tile_m, group = shape.config.tile_m, lax.axis_index("wg")
    rows, part = pl.ds(row * tile_m, tile_m), column * shape.config.groups + group
    sums = list(sums)
    for i, total in enumerate(sums):
        unit = memory.sx.at[i if shape.glu else 0, rows]
        unit = _compat.load(unit, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        sums[i] = total * lax.broadcast_in_dim(unit * shape.unit, total.shape, [1])
    if shape.glu:
        gate, up = sums
        sums = [gate / (1.0 + jnp.exp(-gate)) * up]
    first, staging = part * shape.wide, memory.staging
    if shape.partial:
        for i, total in enumerate(sums):
            _compat.store(memory.out.at[piece, pl.ds(first + i * 64, 64), rows], total)
        return
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for i, total in enumerate(sums):
        if shape.residual:
            total = total + addend(memory.residual.at[rows, pl.ds(first + i * 64, 64)])
        turned = plgpu.layout_cast(total.astype(shape.out), plgpu.Layout.WGMMA_TRANSPOSED)
        staging.at[group, :, pl.ds(i * 64, 64)].T[...] = turned
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging.at[group], memory.out.at[rows, pl.ds(first, shape.wide)])
    if shape.with_sumsq:
        y = _compat.load(staging.at[group], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        _compat.store(memory.squares.at[part, rows], jnp.sum(y * y, axis=1))


def addend(residual):
    """A tile [tile_m, 64] of 16 bits in global memory as [64, tile_m] float32 like the sums."""
    turned = _compat.load(residual.T, layout=plgpu.Layout.WGMMA_TRANSPOSED, optimized=False)
    return plgpu.layout_cast(turned, plgpu.Layout.WGMMA).astype(jnp.float32)


def tiled(minor, bits):
    """Transforms of shared memory whose rows hold `minor` elements, as the tensor core reads it."""
    swizzle = plgpu.find_swizzle(minor * bits, "w4a8")
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))
    return tiling, plgpu.SwizzleTransform(swizzle)
