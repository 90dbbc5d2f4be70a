"""Batch norms with the moments of all the data, as a transform.

A running average follows the last batches of training, and of weights that have since moved. Here
the data are run through the model that is there, moments are streamed and merged exactly, however
unequal the batches, and each norm becomes a fixed affine map (arXiv 1502.03167, algorithm 2).

The moments of a norm depend on the norms before it: every pass measures all of them, with what the
last pass found in use. After k passes those with fewer than k others before them are exact, and the
passes end when one changes nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers import BatchNorm, FixedAffine, Moments
from ffnlab.layers.batch_norm import joined
from ffnlab.transform import Transform

__all__ = ["PopulationStats", "population_norms"]


class PopulationStats(NamedTuple):
    """What was measured, by the path of a norm.

    Attributes:
      mean, variance: [d] float32, of the last whole pass; the running ones before it.
      seen: moments of the pass so far.
      passes: [] int32, whole passes.
    """

    mean: dict[str, Float[Array, "d"]]
    variance: dict[str, Float[Array, "d"]]
    seen: dict[str, Moments]
    passes: Int[Array, ""]


def population_norms(*, passes: int | None = None) -> Transform[nnx.Module, PopulationStats]:
    """The transform that rewrites every `BatchNorm` into a `FixedAffine` map.

    Its batches are whatever the model takes; it is called as `model(batch)`. Every norm is divided
    by the square root of its variance over all positions of all batches (of sums divided by their
    count) and its eps.

    Args:
      passes: at most so many; with fewer than the model has norms one after the other the later
        ones are approximate. As many as it takes when None.
    Raises:
      ConfigError: passes below 1; from `init`, norms in a scanned stack.
      SelectionError: from `init`, a model without batch norms.
    """
    if passes is not None and passes < 1:
        raise ConfigError(f"passes={passes} must be at least 1")
    is_norm = tree.of_type(BatchNorm)

    def init(model: nnx.Module) -> PopulationStats:
        norms = tree.select(model, is_norm)
        mean, variance = (
            {path: getattr(norm, name).get_value() for path, norm in norms.items()}
            for name in ("mean", "variance")
        )
        stacked = [path for path, value in mean.items() if value.ndim > 1]
        if stacked:
            raise ConfigError(f"{stacked[0]} lies in a scanned stack; models.unstack first")
        return PopulationStats(mean, variance, nothing_seen(mean), jnp.int32(0))

    @jax.jit
    def observe(stats: PopulationStats, model: nnx.Module, batch: PyTree) -> PopulationStats:
        found = {
            p: norm.with_statistics(stats.mean[p], stats.variance[p])
            for p, norm in tree.select(model, is_norm).items()
        }
        _, records = tree.capture(tree.replace(model, found), is_norm, batch, calls="all")
        seen = {
            path: joined([stats.seen[path], *(Moments.of(call.input[0]) for call in calls)])
            for path, calls in records.items()
        }
        return stats._replace(seen=seen)

    def advance(model: nnx.Module, stats: PopulationStats) -> tuple[PopulationStats, bool]:
        mean = {path: moments.mean for path, moments in stats.seen.items()}
        variance = {path: moments.variance for path, moments in stats.seen.items()}
        settled = all(
            np.array_equal(new[path], old[path])
            for new, old in ((mean, stats.mean), (variance, stats.variance))
            for path in new
        )
        count = int(stats.passes) + 1
        new = PopulationStats(mean, variance, nothing_seen(mean), jnp.int32(count))
        return new, settled or count >= min(len(mean), passes or len(mean))

    def rewrite(model: nnx.Module, stats: PopulationStats) -> nnx.Module:
        def fixed(path: str, norm: BatchNorm) -> FixedAffine:
            settled = norm.with_statistics(stats.mean[path], stats.variance[path])
            return FixedAffine(*settled.affine(), axis=norm.mean.axes[0])

        return tree.map_at_path(model, is_norm, fixed)

    return Transform("population_norms", init, observe, rewrite, advance)


def nothing_seen(mean: dict[str, Float[Array, "d"]]) -> dict[str, Moments]:
    """The moments of no data."""
    zero = jnp.float32(0)
    return {p: Moments(zero, jnp.zeros_like(m), jnp.zeros_like(m)) for p, m in mean.items()}
