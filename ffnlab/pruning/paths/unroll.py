"""A pre-norm network unrolled into the paths that its last norm adds up (arXiv 2308.06548).

    c_0 = h_0,   c_j = what unit j - 1 adds,   outputs = head(norm(sum of w_j c_j))

With w = 1 these are the model's outputs. Components never depend on w: the layers read the stream
as it is.

Symbols. p: paths, s n + 1 of n layers with s sublayers each.   c: [p, b, t, d].   w: [p] or [p, d].
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.layers.ensemble_scale import PathWeights, weighted_sum
from ffnlab.models import Decoder, ViT
from ffnlab.models.calibration import Given, given
from ffnlab.models.paths import check_ensemble, sizes_of

__all__ = ["combine", "components_of", "exits", "path_weights", "unroll"]

Paths = ViT | Decoder


def unroll(model: Any, batch: Any) -> Float[Array, "p b t d"]:
    """The component of every path.

    Args:
      model: a ViT or a Decoder, its layers in a list or stacked; weights of its paths play no part.
      batch: what the model is called with (`ffnlab.models.calibration.given`).
    Returns:
      the beginning of the stream, then what each sublayer adds to it, layer by layer; 0 of one that
      was removed.
    Raises:
      ConfigError: another model, or one whose stream is no sum of branches (post-norm).

    >>> from ffnlab.testing import batches, tiny
    >>> unroll(tiny(), batches()[0]).shape
    (7, 2, 12, 16)
    """
    check_ensemble(model)
    return components_of(model, given(batch, model))


def components_of(model: Paths, batch: Given) -> Float[Array, "p b t d"]:
    """`unroll` of a batch that was looked at."""
    batch = jax.tree.map(jnp.asarray, batch)
    _, outputs = model.run(*batch.args, **batch.options, branches=True)
    is_vit = isinstance(model, ViT)
    start = model.embed_images(batch.first) if is_vit else model.embed_tokens(batch.first)
    return jnp.concatenate([start[None], outputs.branches.reshape(-1, *start.shape)])


def combine(
    model: Paths, components: Float[Array, "p b t d"], weights: Float[Array, "q ..."]
) -> Float[Array, "b *s"]:
    """What the model's norm and head make of a weighted sum of paths.

    Args:
      model: whose components they are.
      components: of `unroll`.
      weights: of all paths, [p] or [p, d]; those of the model itself are not used.
    Returns:
      what the model returns: scores [b, classes] or logits [b, t, v], float32.
    Raises:
      ConfigError: another number of weights.
    """
    if weights.shape[0] != components.shape[0]:
        raise ConfigError(f"{weights.shape[0]} weights for {components.shape[0]} paths")
    e = weighted_sum(components, weights)
    return model.output(model.norm(e)) if isinstance(model, ViT) else model.logits(e)


def path_weights(model: Paths, mask: Float[Array, "p"]) -> PathWeights:
    """The model's own weights of those paths that a mask keeps."""
    if model.ensemble is None:
        return mask
    values = model.ensemble.values
    return values * (mask if values.ndim == 1 else mask[:, None])


def exits(model: Any, batch: Any, depths: Sequence[int]) -> Float[Array, "m b *s"]:
    """What norm and head make of the paths through the first layers, for several depths.

    Args:
      model: see `unroll`; its own weights count.
      batch: see `unroll`.
      depths: numbers of layers, 1 to n each.
    Returns:
      the outputs of every depth; those of n are the model's.
    Raises:
      ConfigError: see `unroll`; or a depth out of range.
    """
    check_ensemble(model)
    layers, slots = sizes_of(model.layers)
    if not depths or min(depths) < 1 or max(depths) > layers:
        raise ConfigError(f"depths={tuple(depths)}: one or more of 1 to {layers} are accepted")
    components = components_of(model, given(batch, model))
    last = slots * jnp.asarray(depths)
    masks = (jnp.arange(len(components)) <= last[:, None]).astype(jnp.float32)
    return jax.vmap(lambda mask: combine(model, components, path_weights(model, mask)))(masks)
