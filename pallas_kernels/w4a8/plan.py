"""How a GPU kernel cuts a product into pieces: as measured, else from its shape alone."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from pallas_kernels.tuning import cache

# What differs between the kernels: tokens per tile, and compute warp groups per thread block.
LIMITS = {"sm90": {"largest": 128, "groups": 2}, "sm80": {"largest": 64, "groups": 1}}
SHARED = 232448 - 2048  # bytes of shared memory of a Hopper block, less its barriers
EVEN = 100  # tokens from which arithmetic takes an H200 longer than four bits of weights
PIECES, SHORTEST = 8, 4  # the most pieces of k, and the fewest steps of one
CLUSTER_FROM = 1024  # tokens from which the L2 cache would give less than blocks want (counted)
HELD = 64 * 64  # sums per tile of columns that a warp group holds without spilling


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the pieces.

    Attributes:
      tile_m: tokens per thread block, a multiple of 8 up to 256.
      columns: columns of w per warp group, 64 or 128; a GLU takes 128, half of them gate's.
      groups: compute warp groups per thread block.
      stages: pipeline steps in flight.
      k_tiles: tiles of 128 rows of w per pipeline step.
      split_k: blocks that share the rows of w, to within one step (`share`).
      cluster: blocks side by side that share a copy of the activations, 1 or 2.
      cores: multiprocessors of the GPU.
    """

    tile_m: int = 64
    columns: int = 64
    groups: int = 2
    stages: int = 4
    k_tiles: int = 1
    split_k: int = 1
    cluster: int = 1
    cores: int = 132


# What a tuned configuration names; the rest is the device's or fixed.
TUNED = ("tile_m", "columns", "stages", "k_tiles", "split_k", "cluster")


@dataclasses.dataclass(frozen=True)
class Call:
    """Static facts of a call: what a configuration depends on.

    Attributes:
      op: "matmul", "glu" or "grouped".
      kernel: "sm90" or "sm80".
      m: tokens.
      n, k: columns (gate's and up's together) and rows of a matrix, padded.
      experts: matrices.
      encoding, treatment: see `w4a8.pack` and `w4a8.matmul`.
      scales, out: dtype names of the scales and of the result.
    """

    op: str
    kernel: str
    m: int
    n: int
    k: int
    experts: int = 1
    encoding: str = "sm"
    treatment: str = "promote"
    scales: str = "bfloat16"
    out: str = "bfloat16"

    @classmethod
    def of(cls, op, kernel, x, codes, scales, treatment, out_dtype):
        """The facts of operands x [m, k], codes (`Fragments`) and their scales."""
        experts = codes.words.shape[0] if op == "grouped" else 1
        sizes = x.shape[0], 64 * codes.words.shape[-4], codes.rows, experts
        names = jnp.dtype(scales.dtype).name, jnp.dtype(out_dtype).name
        return cls(op, kernel, *sizes, codes.encoding, treatment, *names)

    @property
    def facts(self):
        """All but the operation and m, by name."""
        found = dataclasses.asdict(self)
        return {name: found[name] for name in found if name not in ("op", "m")}


def pick(call, cores):
    """The configuration measured best on this device for a call of its size, else `heuristic`.

    Args:
      call: a `Call`.
      cores: multiprocessors of the GPU.
    Returns:
      a `Config` that fits.
    """
    found = cache.find(f"w4a8.{call.op}", call.m, call.facts, lambda named: build(named, call))
    if found is None:
        return heuristic(call, cores)
    return dataclasses.replace(found, cores=cores)


def heuristic(call, cores):
    """What `choose` or `choose_grouped` say of a `Call`."""
    options = {"cores": cores, **LIMITS[call.kernel]}
    if call.op == "grouped":
        return choose_grouped(call.m, call.n, call.k, call.experts, **options)
    return choose(call.m, call.n, call.k, glu=call.op == "glu", **options)


def build(named, call):
    """The `Config` of numbers by name.

    Raises:
      ValueError: other names than TUNED, or a configuration that does not fit the call.
    """
    if set(named) != set(TUNED):
        raise ValueError(f"config must hold {', '.join(TUNED)}, got {', '.join(sorted(named))}")
    config = Config(**named, groups=LIMITS[call.kernel]["groups"])
    reason = refuse(config, call)
    if reason is not None:
        raise ValueError(reason)
    return config


def refuse(config, call):
    """Why a configuration does not fit a call of any number of tokens; None when it does.

    Registers count as far as the compiler has told (`python -m pallas_kernels.aot`): pairs of tiles
    of columns spill above 64 tokens, and already at 64 where a step has more than one tile of k, on
    Ampere and Ada, and on Hopper for gate and up in one; so do more than four stages of a kernel
    that writes float32 sums, and more than three of blocks that share their tokens.
    """
    limits, fused = LIMITS[call.kernel], call.op == "glu" and config.split_k == 1
    if config.tile_m not in (8, 16, 32, 64, 128) or config.tile_m > limits["largest"]:
        return f"tile_m={config.tile_m}; accepted: 8, 16, 32, 64, 128 up to {limits['largest']}"
    if config.columns not in ((128,) if fused else (64, 128)):
        return f"columns={config.columns}; accepted: {'128' if fused else '64, 128'}"
    if config.columns * config.tile_m > 2 * HELD:
        return f"columns={config.columns} with tile_m={config.tile_m} spills registers"
    if (call.kernel == "sm80" or fused) and too_wide(config.columns, config.tile_m, config.k_tiles):
        return f"columns={config.columns} with k_tiles={config.k_tiles} spills registers"
    if call.n % (config.columns * config.groups):
        return f"columns={config.columns} by {config.groups} groups do not divide n={call.n}"
    sizes = {name: getattr(config, name) for name in ("stages", "k_tiles", "split_k")}
    if min(sizes.values()) < 1 or call.k // 128 % config.k_tiles:
        return f"k_tiles must divide the {call.k // 128} tiles of k; got {sizes}"
    if config.split_k > (steps := call.k // 128 // config.k_tiles):
        return f"split_k={config.split_k}; a step for each piece, there are {steps}"
    if call.op == "grouped" and config.split_k > 1:
        return f"split_k={config.split_k}; groups are not split"
    if call.kernel == "sm80":
        return None if config.cluster == 1 else f"cluster={config.cluster}; accepted: 1"
    reason = refuse_cluster(config, call)
    if reason is not None:
        return reason
    if config.stages > 4 and partial(config, call):
        return f"stages={config.stages} with float32 sums to write spills registers"
    if shared(config, call) > SHARED:
        return f"{sizes} take {shared(config, call)} bytes of shared memory, {SHARED} are there"
    return None


def refuse_cluster(config, call):
    """Why blocks of a Hopper kernel cannot share their tokens as a configuration says, or None."""
    if config.cluster == 1:
        return None
    if config.cluster != 2 or call.op == "grouped" or partial(config, call):
        return f"cluster={config.cluster}; accepted: 1, and 2 for whole 16-bit results of no group"
    if call.n % (2 * config.columns * config.groups):
        return f"cluster=2 of columns={config.columns} does not divide n={call.n}"
    return f"cluster=2 with stages={config.stages} spills registers" if config.stages > 3 else None


def too_wide(columns, tile_m, k_tiles):
    """Whether a warp group holds more than the registers that words read ahead leave it."""
    return k_tiles > 1 and columns * tile_m > HELD


def share(piece, steps, split):
    """The steps of one of `split` pieces: the first, and how many (a number where all are alike).

    Args:
      piece: int32, traced.
      steps, split: numbers.
    """
    if steps % split == 0:
        return piece * (steps // split), steps // split
    first, end = (lax.div((piece + i) * steps, jnp.int32(split)) for i in (0, 1))
    return first, end - first


def in_flight(config, k):
    """Pipeline steps that a Hopper block has under way: no more than the shortest piece holds."""
    return min(config.stages, k // 128 // config.k_tiles // config.split_k)


def partial(config, call):
    """Whether a kernel writes float32 sums, not the result."""
    return config.split_k > 1 or call.out == "float32"


def shared(config, call):
    """Bytes of shared memory that a Hopper block takes: the steps in flight and the output."""
    wide = config.groups * config.columns
    weights, scales = 64 * wide, jnp.dtype(call.scales).itemsize * wide
    steps = in_flight(config, call.k)
    loaded = config.k_tiles * (weights + 128 * config.tile_m + scales)
    staged = (
        4096
        if partial(config, call)
        else 2 * config.tile_m * wide // (2 if call.op == "glu" else 1)
    )
    return steps * loaded + staged


def choose(m, n, k, *, glu=False, cores=132, largest=128, groups=2):
    """A configuration for m tokens, n columns (gate's and up's together) and k rows.

    Up to 64 tokens the weights' bytes are what takes the time: small tiles of tokens. Beyond, the
    largest tiles of tokens reuse a decoded weight most. Rows of w are split where that pays. Two
    blocks share a copy of many tokens: the L2 cache would else have to give each 48 bytes a clock.

    Args:
      m, n, k: padded sizes; n a multiple of 128, k of 128.
      glu: see `sm90.multiply`.
      cores: multiprocessors of the GPU.
      largest: tokens that a tile may have.
      groups: compute warp groups per block.
    Returns:
      a `Config` that fits.
    """
    many = min(64, largest) if glu else largest
    tile_m = next((size for size in (8, 16, 32, 64) if m <= size <= largest), many)
    columns = 128 if glu else 64
    k_tiles = 2 if m <= 64 and k % 256 == 0 else 1
    if (groups == 1 or glu) and too_wide(columns, tile_m, k_tiles):
        k_tiles = 1
    rows = -(-m // tile_m)
    blocks = rows * n // (groups * columns)
    k_tiles, split = best_cut(rows * tile_m, k // 128, k_tiles, blocks, cores)
    pairs = groups == 2 and n // columns % 4 == 0 and m >= CLUSTER_FROM and split == 1
    stages, cluster = (3, 2) if pairs else (4, 1)
    return Config(tile_m, columns, groups, stages, k_tiles, split, cluster, cores)


def best_cut(m, tiles, k_tiles, blocks, cores):
    """Tiles of k per step, and pieces of k: the largest and fewest that cost about the least.

    The cost counts a weight's byte as 1: the time of the weights, or of the arithmetic where m
    tokens make that longer, over the share of the GPU that works; and that of the pieces' float32
    sums, which are written and read again.

    Args:
      m: tokens in whole tiles.
      tiles: of 128 rows of k; k_tiles: of them in a step, or else 1.
      blocks: of threads that unsplit work takes; cores: multiprocessors.

    >>> best_cut(16, 86, 2, 32, 132), best_cut(16, 32, 2, 86, 132), best_cut(16, 32, 2, 112, 132)
    ((2, 4), (1, 3), (2, 1))
    """

    def cost(cut):
        (size, split), work = cut, max(1, m / EVEN)
        sums = 8 * split * m / (64 * tiles) if split > 1 else 0
        return work / busy(tiles // size, split, blocks, cores) + sums

    pairs = [(size, split) for size in (k_tiles, 1) for split in range(1, PIECES + 1)]
    pairs = [c for c in pairs if c[1] == 1 or tiles // c[0] // c[1] >= SHORTEST]
    return next(c for c in pairs if cost(c) <= 1.05 * min(map(cost, pairs)))


def best_split(steps, blocks, cores):
    """The fewest even pieces of `steps` that leave the least of the GPU idle in its last wave.

    >>> best_split(16, 32, 132), best_split(16, 132, 132)
    (4, 1)
    """
    sizes = [s for s in (1, 2, 4, 8) if steps % s == 0 and (s == 1 or steps // s >= SHORTEST)]
    best = max(busy(steps, s, blocks, cores) for s in sizes)
    return next(s for s in sizes if busy(steps, s, blocks, cores) > 0.9 * best)


def busy(steps, split, blocks, cores):
    """The share of the GPU that works while blocks of `steps` in `split` pieces go round it.

    >>> busy(43, 1, 33, 132), busy(43, 4, 33, 132)  # a quarter; 11, 11, 11 and 10 steps of 11
    (0.25, 0.9772727272727273)
    """
    waves = -(-blocks * split // cores)
    return blocks * steps / (cores * waves * -(-steps // split))


def choose_grouped(m, n, k, experts, *, cores=132, largest=128, groups=2):
    """A configuration for m tokens over `experts` matrices; see `choose`.

    Tiles are as large as an expert's share of the tokens: padding costs less than rereading.
    """
    share = -(-m // experts)
    tile_m = next((size for size in (8, 16, 32, 64) if share <= size <= largest), largest)
    k_tiles = 2 if tile_m <= 64 and k % 256 == 0 else 1
    return Config(tile_m, groups=groups, k_tiles=k_tiles, cores=cores)
