"""Groups of tokens on whole tiles: where each token of a grouped product lies."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Padding(NamedTuple):
    """Tokens sorted by group, each group padded to whole tiles.

    Attributes:
      tile_group: [tiles] int32, the group of each tile, -1 for tiles that no group needs.
      token: [tiles * tile_m] int32, the token in each padded row (any token in padding).
      place: [m] int32, the padded row of each token.
      expert: [m] int32, the group of each token (any group where it has none).
      used: [m] bool, whether a token belongs to a group.
    """

    tile_group: jax.Array
    token: jax.Array
    place: jax.Array
    expert: jax.Array
    used: jax.Array

    @classmethod
    def of(cls, group_sizes, m, tile_m):
        """The layout of m tokens, of which the first `group_sizes[0]` are group 0's, and so on.

        Args:
          group_sizes: [e] int32, with a sum of at most m.
          m, tile_m: tokens, and tokens per tile.
        Returns:
          a `Padding` of ceil(m / tile_m) + e tiles, which always suffice.
        """
        experts = group_sizes.shape[0]
        sizes = group_sizes.astype(jnp.int32)
        ends, tiles = jnp.cumsum(sizes), -(-sizes // tile_m)
        tile_ends = jnp.cumsum(tiles)
        all_tiles = jnp.arange(-(-m // tile_m) + experts, dtype=jnp.int32)
        group = jnp.searchsorted(tile_ends, all_tiles, side="right").astype(jnp.int32)
        live = jnp.minimum(group, experts - 1)
        # From a padded row to its token, and back.
        rows = jnp.arange(len(all_tiles) * tile_m, dtype=jnp.int32)
        shift = (ends - sizes) - (tile_ends - tiles) * tile_m
        token = jnp.clip(rows + jnp.repeat(shift[live], tile_m), 0, max(m - 1, 0))
        numbers = jnp.arange(m, dtype=jnp.int32)
        expert = jnp.searchsorted(ends, numbers, side="right").astype(jnp.int32)
        used, expert = expert < experts, jnp.minimum(expert, experts - 1)
        place = jnp.where(used, numbers - shift[expert], 0)
        return cls(jnp.where(group < experts, group, -1), token, place, expert, used)
