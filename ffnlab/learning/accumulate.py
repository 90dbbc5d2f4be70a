"""Gradients of a batch that is taken in parts, each part's activations after the other's.

    g = sum_i n_i g_i / sum_i n_i

n_i is what part i counts, `metrics["count"]` of its loss (predicted tokens, where rows hold unequal
numbers of them), or its share of the rows where a loss says nothing: the gradient, the loss and the
metrics are those of the whole batch, of a loss that is a mean over rows.

Statistics that a loss returns are averaged by the same n_i, equally where nothing counts. Each part
is normalized by its own moments, as its activations are gone when the next is computed; what is
written is of the whole batch, once: a mean by itself, anything else by what it is made of
(`ffnlab.losses.Unsettled`).
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers.logical import batch_axes, constrain
from ffnlab.learning.optimizers.masters import widened
from ffnlab.learning.statistics import settled
from ffnlab.rule import Metrics
from ffnlab.weights import AxisNames

__all__ = ["COUNT", "accumulated", "cut_rows"]

COUNT = "count"  # the metric by which a loss says how much the rows it was given weigh

Measured = tuple[Metrics, Mapping[str, PyTree]]  # and new statistics by path
Evaluated = tuple[tuple[Array, Measured], PyTree]  # (mean, what was measured), gradient


def accumulated(
    evaluate: Callable[[PyTree, Array | None], Evaluated], batch: PyTree, parts: int
) -> Evaluated:
    """What `evaluate` gives for a whole batch, from `parts` equal parts of its rows.

    Args:
      evaluate: (a batch, number of the part [] int32, or None for the batch itself) -> ((mean,
        (metrics, statistics)), gradient). Metrics are means over what is counted, but for "count"
        itself, which is added up.
      batch: a tree of arrays [rows, …], or of parts that know their own axes
        (`ffnlab.layers.logical.batch_axes`); what has no rows every part gets whole.
      parts: how many; one is the batch itself.
    Returns:
      as `evaluate`, in float32, the statistics settled and in their own dtype; a part that counts
      nothing adds nothing.
    Raises:
      ConfigError: the parts do not divide the rows.
    """
    if parts == 1:
        (value, (metrics, statistics)), gradient = evaluate(batch, None)
        return (value, (metrics, settled(statistics, 1))), jax.tree.map(widened, gradient)

    pieces, whole = cut_rows(batch, parts)
    numbered = pieces, jnp.arange(parts)

    def evaluated(piece: tuple[PyTree, Array]) -> Evaluated:
        return evaluate(tree.combine(piece[0], whole), piece[1])

    def add(total: PyTree, piece: tuple[PyTree, Array]) -> tuple[PyTree, tuple]:
        (value, (metrics, statistics)), gradient = evaluated(piece)
        share = jnp.asarray(metrics.get(COUNT, 1), jnp.float32)
        weighed = jax.tree.map(lambda leaf: times(share, widened(leaf)), gradient)
        return jax.tree.map(jnp.add, total, weighed), (share, value, metrics, statistics)

    first = jax.tree.map(lambda leaf: leaf[0], numbered)
    like = jax.eval_shape(lambda piece: jax.tree.map(widened, evaluated(piece)[1]), first)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    gradient, (shares, values, metrics, statistics) = jax.lax.scan(add, zero, numbered)
    total = shares.sum()
    weights = jnp.where(total == 0, 1.0, shares)  # of statistics, which rows have in any case
    total = jnp.where(total == 0, 1.0, total)
    mean = lambda each: times(shares, each.astype(jnp.float32)).sum() / total  # noqa: E731
    figures = {name: each.sum() if name == COUNT else mean(each) for name, each in metrics.items()}
    statistics = jax.tree.map(lambda each: averaged(weights, each), statistics)
    gradient = jax.tree.map(lambda leaf: leaf / total, gradient)
    return (mean(values), (figures, settled(statistics, parts))), gradient


def averaged(weights: Float[Array, "n"], each: Float[Array, "n *d"]) -> Float[Array, "*d"]:
    """The weighed mean of a statistic over parts, in its dtype."""
    by_part = weights.reshape(-1, *[1] * (each.ndim - 1))
    total = times(by_part, each.astype(jnp.float32)).sum(0)
    return (total / weights.sum()).astype(each.dtype)


def times(share: Array, value: Array) -> Array:
    """share * value, but 0 where the share is 0: a mean over nothing may be NaN."""
    return jnp.where(share == 0, 0.0, share * value)


def cut_rows(batch: PyTree, parts: int) -> tuple[PyTree, PyTree]:
    """A batch [rows, …] as [parts, rows / parts, …]; every device keeps the rows it has.

    Row r is in part r modulo `parts`.

    Returns:
      (what is cut, what has no rows): two trees of the batch's structure, None where a leaf is in
      the other.
    Raises:
      ConfigError: the parts do not divide the rows, there are none, or the mesh does not divide
        those of a part.
    """

    def of_leaf(path: tuple, leaf: Array, names: AxisNames) -> Array | None:
        if "batch" not in names:
            return None
        where = f"batch{jax.tree_util.keystr(path)}"
        axis, shape = names.index("batch"), leaf.shape
        rows = shape[axis]
        if not rows or rows % parts:
            raise ConfigError(f"{where}: microbatches={parts} do not divide {rows} rows")
        folded = leaf.reshape(*shape[:axis], rows // parts, parts, *shape[axis + 1 :])
        cut = constrain(folded, (*names[: axis + 1], None, *names[axis + 1 :]), path=where)
        return jnp.moveaxis(cut, axis + 1, 0)

    batch = jax.tree.map(jnp.asarray, batch)
    pieces = jax.tree_util.tree_map_with_path(of_leaf, batch, batch_axes(batch))
    if not jax.tree.leaves(pieces):
        raise ConfigError(f"microbatches={parts}: nothing in the batch has rows to cut")
    is_none = lambda node: node is None  # noqa: E731
    whole = jax.tree.map(
        lambda piece, leaf: leaf if piece is None else None, pieces, batch, is_leaf=is_none
    )
    return pieces, whole
