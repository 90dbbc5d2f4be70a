"""How the Hopper kernel cuts a product into pieces, from its shape alone."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the pieces.

    Attributes:
      tile_m: tokens per thread block, a multiple of 8 up to 256.
      columns: columns of w per warp group, 64 or 128; a GLU takes 128, half of them gate's.
      groups: compute warp groups per thread block.
      stages: pipeline steps in flight.
      k_tiles: tiles of 128 rows of w per pipeline step.
      split_k: blocks that share the rows of w.
      cluster: blocks side by side that share a copy of the activations; no plan chooses 2, which
        spills 32 bytes per thread.
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


def choose(m, n, k, *, glu=False, cores=132, largest=128, groups=2):
    """A configuration for m tokens, n columns (gate's and up's together) and k rows.

    Up to 64 tokens the weights' bytes are what takes the time: small tiles of tokens, and blocks
    enough to fill the GPU's waves. Beyond, the largest tiles of tokens reuse a decoded weight most.

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
    steps, blocks = k // 128 // k_tiles, -(-m // tile_m) * n // (groups * columns)
    split = best_split(steps, blocks, cores) if m <= 64 else 1
    return Config(tile_m, columns, groups, 4, k_tiles, split, 1, cores)


def best_split(steps, blocks, cores):
    """The fewest pieces of `steps` that leave the least of the GPU idle in its last wave.

    >>> best_split(16, 32, 132), best_split(16, 132, 132)
    (4, 1)
    """
    sizes = [s for s in (1, 2, 4, 8) if steps % s == 0 and (s == 1 or steps // s >= 4)]

    def busy(split):
        work = blocks * split
        return work / (-(-work // cores) * cores)

    best = max(map(busy, sizes))
    return next(s for s in sizes if busy(s) > 0.9 * best)


def choose_grouped(m, n, k, experts, *, cores=132, largest=128, groups=2):
    """A configuration for m tokens over `experts` matrices; see `choose`.

    Tiles are as large as an expert's share of the tokens: padding costs less than rereading.
    """
    share = -(-m // experts)
    tile_m = next((size for size in (8, 16, 32, 64) if share <= size <= largest), largest)
    k_tiles = 2 if tile_m <= 64 and k % 256 == 0 else 1
    return Config(tile_m, groups=groups, k_tiles=k_tiles, cores=cores)
