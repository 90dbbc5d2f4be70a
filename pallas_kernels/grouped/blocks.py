"""Grouped products on a CPU: each group's rows in blocks, one dense product for each block.

`lax.ragged_dot` multiplies every row by every matrix there. Here a loop goes over the groups and,
inside it, one over the blocks of a group's rows, as many as it has: a group without rows costs
nothing. A group need not end where a block does: its last block reaches into the rows of the next,
of which it changes nothing, so that no row is padded or moved. Few rows are taken one by one.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped.reference import experts_of

SIZES = (128, 64, 32, 16, 8)  # rows of a block
BLOCKS = 4  # of an average group, of the last of which half the rows are in vain
FEW = 16  # rows that are taken one by one


def block_size(rows, groups):
    """Rows of a block: the more the faster a product, as long as few of them are in vain."""
    fits = (size for size in SIZES if size * BLOCKS * groups <= rows)
    return next(fits, min(rows, SIZES[-1]))


def multiply(x, w, scale, group_sizes, *, transposed, out_dtype):
    """Same contract as `reference.multiply`; float32 sums in another order."""
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    w = w.swapaxes(1, 2) if transposed else w
    y = (by_row if len(x) <= FEW else by_block)(x, w, group_sizes)
    return y if scale is None else y * scale[:, None]


def outer(x, dy, group_sizes):
    """Same contract as `reference.outer`."""
    return outer_by_block(x.astype(jnp.float32), dy.astype(jnp.float32), group_sizes)


@jax.custom_batching.sequential_vmap
def by_row(x, w, group_sizes):
    """Each row times its matrix."""

    def one(row):
        x, group = row
        y = x @ lax.dynamic_index_in_dim(w, jnp.minimum(group, len(w) - 1), 0, keepdims=False)
        return jnp.where(group < len(w), y, 0)

    return lax.map(one, (x, experts_of(group_sizes, len(x))))


@jax.custom_batching.sequential_vmap
def by_block(x, w, group_sizes):
    """Each block of rows times its group's matrix."""
    size, ends = block_size(len(x), len(w)), jnp.cumsum(group_sizes)

    def of_group(group, y):
        matrix = lax.dynamic_index_in_dim(w, group, 0, keepdims=False)

        def of_block(block, y):
            start, own = rows_of(block, ends[group] - group_sizes[group], ends[group], size, len(x))
            new, old = part(x, start, size) @ matrix, part(y, start, size)
            return lax.dynamic_update_slice_in_dim(y, jnp.where(own, new, old), start, 0)

        return lax.fori_loop(0, -(-group_sizes[group] // size), of_block, y)

    return lax.fori_loop(0, len(w), of_group, jnp.zeros((len(x), w.shape[2]), jnp.float32))


@jax.custom_batching.sequential_vmap
def outer_by_block(x, dy, group_sizes):
    """The sum over each group's blocks of x^T dy."""
    groups, ends = len(group_sizes), jnp.cumsum(group_sizes)
    size = block_size(len(x), groups)

    def of_group(group, dw):
        def of_block(block, total):
            start, own = rows_of(block, ends[group] - group_sizes[group], ends[group], size, len(x))
            return total + jnp.where(own, part(x, start, size), 0).T @ part(dy, start, size)

        blocks = -(-group_sizes[group] // size)
        total = lax.fori_loop(0, blocks, of_block, jnp.zeros(dw.shape[1:], jnp.float32))
        return lax.dynamic_update_index_in_dim(dw, total, group, 0)

    zeros = jnp.zeros((groups, x.shape[1], dy.shape[1]), jnp.float32)
    return lax.fori_loop(0, groups, of_group, zeros)


def rows_of(block, first, end, size, rows):
    """Where a block of a group's rows starts, and [size, 1] which of its rows it is there for.

    The last rows of all are read from further up, so that a block does not reach beyond them: rows
    of the block before, which did them already, or of another group.
    """
    wanted = first + block * size
    start = jnp.minimum(wanted, rows - size)
    numbers = start + jnp.arange(size)
    return start, ((numbers >= wanted) & (numbers < end))[:, None]


def part(x, start, size):
    """`size` rows of x."""
    return lax.dynamic_slice_in_dim(x, start, size)
