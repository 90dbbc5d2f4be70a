"""Revisiting Vision Transformer from the View of Path Ensemble (2023, arXiv 2308.06548).

A pre-norm network is a sum of paths that all end at its head. Each has two jobs: to be read by the
head, and to feed longer paths. Some hurt the head: they are left out of what it reads, and of that
alone. No layer sees another input than before, and none gets cheaper, unless no path behind it is
read either.

    delta_j = mean loss without path j - mean loss,     out goes the path with the least delta

Symbols. p: paths (`ffnlab.pruning.paths.unroll`).   mask: f32 [p], 1 of what is read.

What differs from the paper, whose code is not public and of which the abstract alone was at hand:
how paths are chosen is not said there. Here the loss decides, by leaving out one path at a time:
all that are wanted by one pass ("one_out"), or one for each pass, scores taken anew ("greedy").
Where there are no labels, the distance of the outputs to those of the model as it was stands for
the loss. Decoders are taken too.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from ffnlab import tree
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.layers import EnsembleScale
from ffnlab.losses import labelled
from ffnlab.models import Decoder
from ffnlab.models.calibration import Given, given
from ffnlab.models.paths import check_ensemble, path_names, with_ensemble
from ffnlab.models.units import present as sublayers_of
from ffnlab.pruning.finercut_core import DISTANCES, Distance
from ffnlab.pruning.paths.path_search import PathSearch, decide, goal, left_out, start
from ffnlab.pruning.paths.unroll import Paths, combine, components_of, path_weights
from ffnlab.transform import Transform

__all__ = ["path_ensemble"]

FAR = tuple(name for name in DISTANCES if name != "perplexity")  # which the loss is


def path_ensemble(
    *,
    remove: int | None = None,
    rate: float | None = None,
    how: str = "one_out",
    distance: str | None = None,
) -> Transform[Any, PathSearch]:
    """Leaves paths out of what the head reads, by what the loss is without them.

    Every pass runs the layers once, and norm and head for each path that is left. It is compiled
    once for the whole search; give it batches of equal shape.

    Args:
      remove: number of paths to leave out; 0 measures all and leaves out none. Exactly one of
        `remove` and `rate` is given.
      rate: fraction of the paths, in [0, 1); rounded down.
      how: "one_out": all by one pass; "greedy": one path for each pass.
      distance: None for the loss: cross-entropy of the next token, or of the classes that come with
        images. Else of the outputs from those before, as `finercut` has them: "js", "js_textbook",
        "kl", "norm" or "angular".
    Returns:
      a transform of a ViT or a Decoder, whose batches are what the model takes
      (`ffnlab.models.calibration.given`), of a ViT with a loss pairs of images and classes; its
      stats are a `PathSearch`. `rewrite` gives the model an `EnsembleScale` with the mask; one that
      it had keeps its scale.
    Raises:
      ConfigError: an option out of range; from the transform, another model, one whose stream is no
        sum of branches (post-norm), as many paths asked for as are read, or images without classes.
      NumericalError: a loss that is not finite.

    Source: arXiv 2308.06548, path pruning.

    >>> path_ensemble(remove=2).name
    'path_ensemble'
    """
    check_options(remove, rate, how, distance)
    chunk_sums = summing(None if distance is None else DISTANCES[distance])

    def init(model: Any) -> PathSearch:
        check_ensemble(model)
        present = np.concatenate([[True], sublayers_of(model).reshape(-1)])
        if model.ensemble is not None:
            present &= np.asarray(model.ensemble.kept[...]) > 0
        goal(present, remove, rate)
        return start(present)

    def observe(stats: PathSearch, model: Any, batch: Any) -> PathSearch:
        inputs, classes = parted(model, batch, distance is None)
        inputs = given(inputs, model, least=2 if distance is None and classes is None else 1)
        open_ = np.flatnonzero(stats.left)
        drops = np.resize(open_, len(stats.step)).astype(np.int32)
        masks = (np.asarray(mask, np.float32) for mask in (stats.left, stats.present))
        found = chunk_sums(model, inputs, classes, *masks, drops, np.int32(len(open_)))
        sums, total, positions, width = (np.asarray(part, np.float64) for part in found)
        check_finite(float(total), sums[: len(open_)], [path_names(model)[j] for j in open_])
        terms = float(positions)
        if distance is not None:
            terms = DISTANCES[distance].terms(len(inputs.first), int(positions), int(width))
        new = stats.sums.copy()
        new[open_] += sums[: len(open_)]
        count = np.asarray(stats.count + terms)
        return stats._replace(sums=new, total=np.asarray(stats.total + total), count=count)

    def advance(model: Any, stats: PathSearch) -> tuple[PathSearch, bool]:
        wanted = goal(stats.present, remove, rate)
        if stats.passes == 0 or len(left_out(stats)) < wanted:
            stats = decide(stats, wanted, greedy=how == "greedy")
        return stats, len(left_out(stats)) >= wanted

    def rewrite(model: Any, stats: PathSearch) -> Paths:
        if not np.array_equal(init(model).present, stats.present):
            raise ConfigError(
                "stats are of a model with other paths; rewrite the model that was calibrated"
            )
        wanted = goal(stats.present, remove, rate)
        gone = left_out(stats, wanted)
        if len(gone) < wanted:
            raise ConfigError(
                f"stats leave {len(gone)} paths of {wanted} out; calibrate until done"
            )
        return without(model, gone) if gone else tree.copy(model)

    return Transform(
        name="path_ensemble", init=init, observe=observe, advance=advance, rewrite=rewrite
    )


def without(model: Paths, gone: list[int]) -> Paths:
    """The model whose head does not read some paths; a scale stays."""
    old = model.ensemble
    kept = np.ones(len(path_names(model))) if old is None else np.array(old.kept[...])
    kept[gone] = 0
    scale = None if old is None or old.scale is None else old.scale[...]
    return with_ensemble(model, EnsembleScale(kept, scale, allow_negative=True))


@functools.cache
def summing(metric: Distance | None) -> Callable:
    """The compiled function that every pass calls on each batch; one for all searches.

    Args:
      metric: what is summed; the loss when None.
    Returns:
      (model, batch, classes [b] or None, mask [p], mask of the model before the search [p], paths
      to leave out [p], how many of them count []) -> (sum without each of these [p], sum of the
      mask [], terms or positions [], outputs of each []).
    """

    @jax.jit
    def chunk_sums(
        model: Paths,
        batch: Given,
        classes: Int[Array | np.ndarray, "b"] | None,
        mask: Float[Array, "p"],
        present: Float[Array, "p"],
        drops: Int[Array, "p"],
        active: Int[Array, ""],
    ) -> tuple[Float[Array, "p"], Float[Array, ""], Float[Array, ""], Int[Array, ""]]:
        components = components_of(model, batch)

        def output(mask: Float[Array, "p"]) -> Float[Array, "b *s"]:
            return combine(model, components, path_weights(model, mask))

        original = output(present)
        by_token = original.shape[1:-1] == batch.first.shape[1:2]
        valid = batch.valid if by_token else None

        def value(mask: Float[Array, "p"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
            if metric is None:
                return loss_of(output(mask), batch, classes)
            positions = math.prod(original.shape[:-1]) if valid is None else jnp.sum(valid)
            total = metric.total(original, output(mask), batch.tokens, valid)
            return total, jnp.asarray(positions, jnp.float32)

        def one(i: Int[Array, ""], sums: Float[Array, "p"]) -> Float[Array, "p"]:
            return sums.at[i].set(value(mask.at[drops[i]].set(0.0))[0])

        total, count = value(mask)
        sums = jax.lax.fori_loop(0, active, one, jnp.zeros(mask.shape, jnp.float32))
        return sums, total, count, jnp.int32(original.shape[-1])

    return chunk_sums


def loss_of(
    outputs: Float[Array, "b *s"], batch: Given, classes: Array | np.ndarray | None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of the cross-entropies of classes or of next tokens, how many there are)."""
    if classes is not None:
        count = jnp.float32(len(outputs))
        return labelled(lambda x: x, (outputs, classes))[0] * count, count
    tokens = jnp.asarray(batch.tokens)
    segments = jnp.asarray(batch.options.get("segments", jnp.ones_like(tokens)))
    nats = optax.softmax_cross_entropy_with_integer_labels(outputs[:, :-1], tokens[:, 1:])
    counted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return jnp.sum(jnp.where(counted, nats, 0.0)), jnp.sum(counted).astype(jnp.float32)


def parted(model: Paths, batch: Any, is_loss: bool) -> tuple[Any, np.ndarray | None]:
    """(what the model is called with, classes or None).

    Raises:
      ConfigError: classes are needed and are not there, or others than the model tells apart.
    """
    is_pair = isinstance(batch, tuple) and len(batch) == 2
    if isinstance(model, Decoder):
        return batch, None
    inputs, classes = batch if is_pair else (batch, None)
    if not is_loss:
        return inputs, None
    if classes is None:
        raise ConfigError(
            "a batch without classes; (images, classes) is accepted, or images alone with "
            "distance='kl'"
        )
    classes, known = np.asarray(classes), model.config.classes
    if classes.ndim != 1 or classes.dtype.kind not in "iu" or len(classes) != len(inputs):
        raise ConfigError(
            f"classes {classes.dtype} {classes.shape} of {len(inputs)} images; integers, one for "
            "each, are accepted"
        )
    if known is None or classes.min() < 0 or classes.max() >= known:
        raise ConfigError(
            f"classes from {classes.min()} to {classes.max()}; the model tells {known} apart"
        )
    return inputs, classes.astype(np.int32)


def check_options(remove: object, rate: object, how: str, distance: str | None) -> None:
    """Refuses options that make no sense for any model."""
    if (remove is None) == (rate is None):
        raise ConfigError(f"remove={remove!r} and rate={rate!r}: give exactly one of them")
    is_count = isinstance(remove, int) and not isinstance(remove, bool) and remove >= 0
    if remove is not None and not is_count:
        raise ConfigError(f"remove={remove!r}; it is a number of paths >= 0")
    if rate is not None and not 0.0 <= rate < 1.0:
        raise ConfigError(f"rate={rate!r} is outside [0, 1): it is the fraction of paths left out")
    if how not in ("one_out", "greedy"):
        raise ConfigError(f"how={how!r}; there are 'one_out' and 'greedy'")
    if distance is not None and distance not in FAR:
        raise ConfigError(f"distance={distance!r}; None is the loss, else there are {FAR}")


def check_finite(total: float, sums: Float[np.ndarray, "c"], names: list[str]) -> None:
    """Ends a search whose scores would be meaningless."""
    if not math.isfinite(total):
        raise NumericalError(
            "the loss of the model is not finite on this batch; check its weights and dtype"
        )
    bad: Bool[np.ndarray, "c"] = ~np.isfinite(sums)
    if bad.any():
        raise NumericalError(
            f"the loss is not finite without {bad.sum()} of the paths, the first of them "
            f"{names[int(bad.argmax())]!r}; use float32, or keep what holds values in range"
        )
