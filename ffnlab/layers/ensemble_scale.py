"""Weights of the paths of a residual network: Revisiting Vision Transformer from the View of Path
Ensemble (2023, arXiv 2308.06548).

The stream of a pre-norm network is a sum: its beginning c_0 and what every branch added, c_1, c_2,
…  The last norm and the head may read that sum with weights of its own,

    e = sum over j of kept_j scale_j c_j,        kept_j in {0, 1}

while every layer goes on reading the whole stream (`ffnlab.models.trunk`). LayerScale weighs what
enters the stream; this weighs what leaves it.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from ffnlab.errors import ConfigError, is_known
from ffnlab.layers.stacking import Statistic

__all__ = ["EnsembleScale", "weighted_sum"]

PathWeights = Float[Array, "p"] | Float[Array, "p d"]


class EnsembleScale(nnx.Module):
    """e = layer(components): the weighted sum of all paths, in the order of `models.units` behind
    the beginning of the stream.

    Attributes:
      kept: Statistic [paths] float32, 0 or 1: the mask of a pruning, never trained.
      scale: Param [paths, d] (a vector for each path) or [paths] float32, or None where all paths
        that are kept count alike.
    """

    def __init__(
        self,
        kept: Shaped[Array | np.ndarray, "*p"],
        scale: Float[Array, "..."] | None = None,
        *,
        allow_negative: bool = False,
    ):
        """Weights that are given.

        Args:
          kept: [paths], 0 or 1: which paths are read, one or more.
          scale: of every path, [paths, d] or [paths]; None for a mask alone.
          allow_negative: take a scale that holds negative numbers or NaN.
        Raises:
          ConfigError: a mask of no path or of other numbers than 0 and 1, a scale of another number
            of paths, or negative.

        Source: arXiv 2308.06548, EnsembleScale; weights of 0 are its path pruning.
        """
        kept = kept if isinstance(kept, Array) else np.asarray(kept)
        if is_known(kept):
            check_mask(np.asarray(kept))
        if scale is not None:
            check_scale(scale, len(kept), allow_negative)
        self.kept = Statistic(jnp.asarray(kept, jnp.float32), axes=(None,))
        axes = () if scale is None else (None, "embed")[: scale.ndim]
        self.scale = nnx.data(
            None if scale is None else nnx.Param(jnp.asarray(scale, jnp.float32), axes=axes)
        )

    def __call__(self, components: Float[Array, "p *s d"]) -> Float[Array, "*s d"]:
        """The sum of components that are at hand; a trunk adds them up as they come."""
        return weighted_sum(components, self.values)

    @property
    def values(self) -> PathWeights:
        """The weight of every path, [paths, d] or [paths], 0 where it is left out."""
        kept = self.kept[...]
        if self.scale is None:
            return kept
        scale = self.scale[...]
        return scale * (kept if scale.ndim == 1 else kept[:, None]).astype(scale.dtype)

    def weights(self, layers: int, slots: int) -> tuple[Float[Array, "*d"], Float[Array, "n s *d"]]:
        """(weight of the beginning of the stream, weights of all branches by layer and slot).

        Raises:
          ConfigError: a model with so many layers and slots has another number of paths.

        >>> first, rest = EnsembleScale(np.ones(7)).weights(3, 2)
        >>> first.shape, rest.shape
        ((), (3, 2))
        """
        values, paths = self.values, layers * slots + 1
        if len(values) != paths:
            raise ConfigError(
                f"ensemble has {len(values)} paths; {layers} layers of {slots} sublayers are "
                f"{paths}, the beginning of the stream among them"
            )
        return values[0], values[1:].reshape(layers, slots, *values.shape[1:])


def weighted_sum(components: Float[Array, "p *s d"], weights: PathWeights) -> Float[Array, "*s d"]:
    """sum over j of weights_j components_j, added up in float32 or wider.

    >>> weighted_sum(jnp.ones((3, 2, 4)), jnp.array([1.0, 0.0, 2.0])).shape
    (2, 4)
    """
    form = "p,p...->..." if weights.ndim == 1 else "pd,p...d->...d"
    dtype = components.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    options = {"precision": "highest", "preferred_element_type": wide}
    return jnp.einsum(form, weights.astype(dtype), components, **options).astype(dtype)


def check_mask(kept: np.ndarray) -> None:
    """Raises ConfigError for what is no mask of paths, or one that keeps none."""
    if kept.ndim != 1 or not np.isin(kept, (0, 1)).all():
        raise ConfigError(f"kept of shape {kept.shape}; numbers 0 and 1, [paths], are accepted")
    if not kept.any():
        raise ConfigError(f"kept is 0 for all {len(kept)} paths; at least one has to stay")


def check_scale(scale: Array, paths: int, allow_negative: bool) -> None:
    """Raises ConfigError for a scale of other paths, or with negative numbers or NaN."""
    if scale.ndim not in (1, 2) or scale.shape[0] != paths:
        raise ConfigError(
            f"scale of shape {scale.shape} for {paths} paths; [{paths}] and [{paths}, d] are "
            "accepted"
        )
    if not allow_negative and is_known(scale) and not (np.asarray(scale) >= 0).all():
        raise ConfigError(
            "scale holds negative numbers or NaN; allow_negative=True accepts such weights"
        )
