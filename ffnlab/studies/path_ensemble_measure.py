"""What the study of path ensembles measures: digits by vision transformers, bytes by a decoder."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from ffnlab import models, transform
from ffnlab.data import ArrayBatches, Labelled
from ffnlab.formats.embedded import embedded
from ffnlab.layers import EnsembleScale
from ffnlab.layers.ensemble_scale import weighted_sum
from ffnlab.learning import backprop, members
from ffnlab.losses import Loss, labelled, next_token
from ffnlab.models import ViT
from ffnlab.models.account import parameters
from ffnlab.models.paths import with_ensemble
from ffnlab.pruning import (
    PathSearch,
    combine,
    ensemble_scale,
    exits,
    path_ensemble,
    self_distilled,
    unroll,
)
from ffnlab.pruning.paths.path_search import left_out
from ffnlab.pruning.paths.unroll import path_weights
from ffnlab.rule import Rule
from ffnlab.studies.digit_images import vit
from ffnlab.studies.side_by_side import learned_members
from ffnlab.studies.tuning import Splits, Tuned
from ffnlab.transform import calibrate

__all__ = [
    "DEPTHS",
    "DROPPED",
    "FULL",
    "LAYERS",
    "QUICK",
    "SIDES",
    "Cut",
    "Found",
    "Run",
    "Sizes",
    "Text",
    "compared",
    "cut_of",
    "frequencies",
    "gap_of",
    "of_text",
    "of_unrolled",
    "right_at_exits",
    "start_gap",
]

WIDTH, LAYERS, DEEP, BATCH = 32, 6, 12, 32
DEPTHS = (2, 4)  # layers of the paths that are taught
DROPPED = (1, 2, 3, 4)  # the first four branches: of the first two layers
GREEDY, GREEDY_TEXT = 4, 3  # paths left out without training
PLAIN, PRUNED, VECTOR, SCALAR, TAUGHT = SIDES = (
    "all alike",
    "first four left out",
    "weighed by vectors",
    "weighed by numbers",
    "distilled",
)
DEEP_SIDES = (PLAIN, VECTOR)
LENGTH = 256  # bytes in a window of text


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      seeds: of every side, with the rate that the first one chose.
      rates: of AdamW, that every side tries.
      steps: of training.
      deep: whether networks of twice the layers are trained too.
      calibration, held_out: windows of text.
    """

    seeds: int
    rates: tuple[float, ...]
    steps: int
    deep: bool
    calibration: int
    held_out: int


FULL = Sizes(3, (1e-3, 3e-3, 1e-2, 3e-2), 600, True, 16, 48)
QUICK = Sizes(1, (3e-3,), 150, False, 4, 8)


class Run(NamedTuple):
    """What one side reached.

    Attributes:
      tuned: rate and accuracies.
      models: by seed.
    """

    tuned: Tuned
    models: tuple[ViT, ...]


Found = Mapping[str, Run]  # by side


def start(side: str, layers: int, seed: int) -> ViT:
    """A network, drawn; its layers are stacked."""
    model = vit(WIDTH, layers, jax.random.key(seed))
    if side == PRUNED:
        kept = np.ones(2 * layers + 1)
        kept[list(DROPPED)] = 0
        model = with_ensemble(model, EnsembleScale(kept))
    elif side in (VECTOR, SCALAR):
        change = ensemble_scale(kind="vector" if side == VECTOR else "scalar")
        model, _ = transform.apply(change, model)
    return models.stack(model)


def loss_of(side: str) -> Loss:
    """What a side learns by."""
    return self_distilled(DEPTHS, weight=0.5, temperature=2.0) if side == TAUGHT else labelled


def compared(sizes: Sizes, data: Splits, seed: int, layers: int = LAYERS) -> dict[str, Run]:
    """Every side, tuned alike: the rate by the first seed, then the other seeds with that."""
    sides = SIDES if layers == LAYERS else DEEP_SIDES
    return {side: run_of(side, layers, sizes, data, seed) for side in sides}


def run_of(side: str, layers: int, sizes: Sizes, data: Splits, seed: int) -> Run:
    """One side."""
    rates, seeds = list(sizes.rates), tuple(range(seed, seed + sizes.seeds))
    train = functools.partial(learned, side, layers, data.train, steps=sizes.steps)
    found = train(rates, [seed] * len(rates))
    scores = [right(model, data.validation) for model in found]
    best = int(np.argmax(scores))
    kept = [found[best]]
    if len(seeds) > 1:
        kept += train([rates[best]] * (len(seeds) - 1), seeds[1:])
    tuned = Tuned(
        setting={"rate": rates[best]},
        tried=tuple(({"rate": rate}, score) for rate, score in zip(rates, scores, strict=True)),
        parameters=parameters(kept[0]),
        mirror=0,
        seeds=seeds,
        scores=tuple(right(model, data.test) for model in kept),
    )
    return Run(tuned, tuple(kept))


def learned(
    side: str,
    layers: int,
    rows: Labelled,
    rates: Sequence[float],
    seeds: Sequence[int],
    *,
    steps: int,
) -> list[ViT]:
    """Networks trained side by side, on the same batches."""

    def one(rate: float | Array) -> Rule:
        schedule = lambda step: rate * jnp.minimum(1.0, (step + 1) / 20)  # noqa: E731
        return backprop(loss_of(side), optax.adamw(schedule))

    drawn = [start(side, layers, seed) for seed in seeds]
    joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)
    rule = members(one, len(rates), vary={"rate": list(rates)})
    arrays = Labelled(np.asarray(rows.x), np.asarray(rows.y))
    batches = ArrayBatches(arrays, BATCH, seeds[0])
    return learned_members(rule, joined, batches, steps, seeds[0], len(rates))


@jax.jit
def scores_of(model: ViT, x: Array) -> Float[Array, "b c"]:
    """Scores of images."""
    return model(x)


def right(model: ViT, rows: Labelled) -> float:
    """The fraction of images whose class has the largest score."""
    found = np.asarray(scores_of(model, jnp.asarray(rows.x)))
    return float(np.mean(found.argmax(-1) == rows.y))


@jax.jit
def exit_scores(model: ViT, x: Array) -> Float[Array, "m b c"]:
    """Scores of the paths through the first layers."""
    return exits(model, x, DEPTHS)


def right_at_exits(model: ViT, rows: Labelled) -> Float[np.ndarray, "m"]:
    """`right` of the paths through `DEPTHS` layers."""
    found = np.asarray(exit_scores(model, jnp.asarray(rows.x)))
    return (found.argmax(-1) == rows.y).mean(1)


@jax.jit
def of_unrolled(model: ViT, x: Array) -> Float[Array, "b c"]:
    """Scores of all components, added up behind the last layer."""
    parts = unroll(model, x)
    return combine(model, parts, jnp.ones(len(parts)))


def gap_of(model: ViT, x: Float[np.ndarray, "b h w c"]) -> float:
    """The largest difference of scores from those of the unrolled network, over the largest."""
    images = jnp.asarray(x)
    plain, other = (np.asarray(f(model, images)) for f in (scores_of, of_unrolled))
    return float(np.abs(plain - other).max() / np.abs(plain).max())


def start_gap(rows: Labelled, seeds: Sequence[int]) -> float:
    """How far losses lie apart at step 0, with and without weights of paths."""
    batch = (jnp.asarray(rows.x), jnp.asarray(rows.y))
    loss = jax.jit(lambda model: labelled(model, batch)[0])
    values = [[float(loss(start(s, LAYERS, i))) for s in (PLAIN, VECTOR, SCALAR)] for i in seeds]
    return float(np.ptp(values, axis=1).max())


class Cut(NamedTuple):
    """What is left out of a trained network, without training it again.

    Attributes:
      chosen: the search on validation rows.
      tested: deltas on test rows, all paths.
      loss: of test rows with all paths.
      after: accuracy on test rows without the paths that the search left out.
    """

    chosen: PathSearch
    tested: Float[np.ndarray, "p"]
    loss: float
    after: float


def cut_of(nets: Sequence[ViT], data: Splits) -> list[Cut]:
    """Every network's paths, each left out alone, and several of them by greedy search."""
    greedy, look = path_ensemble(remove=GREEDY, how="greedy"), path_ensemble(remove=0)
    found = []
    for net in nets:
        chosen = calibrate(greedy, net, [tuple(data.validation)], progress=False)
        tested = calibrate(look, net, [tuple(data.test)], progress=False)
        after = right(greedy.rewrite(net, chosen), data.test)
        found.append(Cut(chosen, tested.deltas, float(tested.whole[0]), after))
    return found


@jax.jit
def amplitudes(model: ViT, x: Array) -> Float[Array, "2 f"]:
    """Log amplitudes of the token map along the diagonal of frequencies, less that of frequency 0.

    Of what the last norm reads: of all paths alike, and of the weighed ones; means over images and
    channels.
    """
    parts = unroll(model, x)
    side = round(parts.shape[2] ** 0.5)

    def of(e: Float[Array, "b t d"]) -> Float[Array, "f"]:
        grid = e.reshape(len(e), side, side, -1)
        size = jnp.log(jnp.abs(jnp.fft.fft2(grid, axes=(1, 2))) + 1e-6).mean((0, 3))
        diagonal = jnp.diagonal(size)[: side // 2 + 1]
        return diagonal - diagonal[0]

    weights = path_weights(model, jnp.ones(len(parts)))
    return jnp.stack([of(parts.sum(0)), of(weighted_sum(parts, weights))])


def frequencies(nets: Sequence[ViT], rows: Labelled) -> Float[np.ndarray, "n 2 f"]:
    """`amplitudes` of every network, before and after its weights."""
    return np.stack([np.asarray(amplitudes(net, jnp.asarray(rows.x))) for net in nets])


class Text(NamedTuple):
    """The paths of the embedded decoder, in bits per byte.

    Attributes:
      chosen: the search on windows of training text; its losses are in nats.
      tested: on held-out windows, with nothing left out.
      bits: held-out bits per byte without the first 0, 1, … of the paths that the search chose.
    """

    chosen: PathSearch
    tested: PathSearch
    bits: tuple[float, ...]


def of_text(calibration: Int[np.ndarray, "b t"], held_out: Int[np.ndarray, "c t"]) -> Text:
    """What the embedded decoder's head needs."""
    model = models.stack(embedded()[0])
    greedy = path_ensemble(remove=GREEDY_TEXT, how="greedy")
    chosen = calibrate(greedy, model, [calibration], progress=False)
    tested = calibrate(path_ensemble(remove=0), model, [held_out], progress=False)
    rows = jnp.asarray(held_out)
    bits = jax.jit(lambda model: next_token(model, rows)[1]["bits"])
    order, found = left_out(chosen), []
    for k in range(len(order) + 1):
        kept = np.ones(len(chosen.step))
        kept[order[:k]] = 0
        found.append(float(bits(with_ensemble(model, EnsembleScale(kept)))))
    return Text(chosen, tested, tuple(found))
