"""Compressors of images, and what the layers of networks with noise know along training."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from ffnlab.analysis import (
    LossyReport,
    components_of,
    lossy_information,
    nearest_information,
    principal,
)
from ffnlab.analysis.principal import INPUT
from ffnlab.data import ArrayBatches, Labelled, as_uniform, blob_images, box_images, gaussian_pairs
from ffnlab.layers import MLP, Noisy
from ffnlab.learning import backprop, fitted_by, labelled, members
from ffnlab.losses import Moment
from ffnlab.parallel import LoopOptions, train
from ffnlab.studies.information_measure import log_spaced
from ffnlab.transform import apply, calibrate

__all__ = [
    "KINDS",
    "Compressor",
    "Course",
    "Curve",
    "autoencoder",
    "course",
    "gaussian_errors",
    "image_curve",
    "phases",
]

# Parameters of an image, and what makes it of them.
KINDS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "blobs": (2, blob_images),
    "boxes": (4, box_images),
}
ROWS = 100  # of a step of a compressor
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


class Compressor(NamedTuple):
    """An autoencoder that was learned.

    Attributes:
      encode: rows [b, d] -> [b, k].
      tried: mean squared error on rows held out, by rate; the least was chosen.
      share: of the variance of these rows that it does not give back.
    """

    encode: Callable[[Array], Array]
    tried: dict[float, float]
    share: float


def reconstruction(model: PyTree, batch: Array) -> tuple[Array, dict[str, Array]]:
    """Mean squared error."""
    return jnp.mean((model(batch) - batch) ** 2), {}


def autoencoder(
    x: Float[np.ndarray, "n d"],
    width: int,
    seed: int,
    *,
    hidden: int = 128,
    passes: int = 100,
    rates: Sequence[float] = RATES,
) -> Compressor:
    """A network d, hidden, width, hidden, d that learns most rows; the rate by the others' error.

    What it compresses to is before the nonlinearity, which would saturate.
    """
    x = np.asarray(x, np.float32)
    order = np.random.default_rng(seed).permutation(len(x))
    held = x[order[: len(x) // 6]]
    rest = x[order[len(held) :]]
    batches = list(jnp.asarray(rest[: len(rest) // ROWS * ROWS].reshape(-1, ROWS, x.shape[1])))
    net = MLP(
        (x.shape[1], hidden, width, hidden, x.shape[1]), activation="silu", key=jax.random.key(seed)
    )
    nets, tried = {}, {}
    for rate in rates:
        steps = passes * len(batches)
        rule = backprop(reconstruction, optax.adam(optax.cosine_decay_schedule(rate, steps)))
        transform = fitted_by(rule, key=jax.random.key(seed), passes=passes)
        nets[rate], _ = apply(transform, net, batches)
        tried[rate] = float(reconstruction(nets[rate], jnp.asarray(held))[0])
    best = min(tried, key=lambda rate: tried[rate])
    return Compressor(encoder_of(nets[best]), tried, tried[best] / float(held.var(0).mean()))


def encoder_of(net: MLP, maps: int = 2) -> MLP:
    """The first maps of a network, the last of them without its nonlinearity."""
    first = jax.tree.map(lambda leaf: leaf, net)
    first.maps = nnx.List(list(first.maps)[:maps])
    return first


# Information that is known.


def gaussian_errors(known: Sequence[float], count: int, seed: int) -> dict[int, list[float]]:
    """Estimates minus what is known, of Gaussians of one and of two components."""
    return {
        width: [
            nearest_information(*gaussian_pairs(count, nats, width=width, seed=seed + i)).value
            - nats
            for i, nats in enumerate(known)
        ]
        for width in (1, 2)
    }


class Curve(NamedTuple):
    """Estimates in nats from images, one for each known information.

    Attributes:
      known: [t].
      learned, linear, parameters: [t], by the autoencoder, by principal components, and from the
        parameters that images are made of.
    """

    known: Float[np.ndarray, "t"]
    learned: Float[np.ndarray, "t"]
    linear: Float[np.ndarray, "t"]
    parameters: Float[np.ndarray, "t"]


def image_curve(
    kind: str, known: Sequence[float], count: int, seed: int, **options: Any
) -> tuple[Curve, Compressor]:
    """Pairs of images of known information, compressed by what learned other images."""
    width, draw = KINDS[kind]
    others = as_uniform(np.random.default_rng(seed).standard_normal((6000, width)))
    seen = draw(others).reshape(6000, -1)
    found = autoencoder(seen, width, seed, **options)
    moments = calibrate(principal(seen, select="maps[*]"), identity(seen.shape[1]), [seen])
    axes = components_of(moments[INPUT], width)
    encode = jax.jit(found.encode)
    rows = []
    for i, nats in enumerate(known):
        pair = [as_uniform(s) for s in gaussian_pairs(count, nats, width=width, seed=seed + 1 + i)]
        images = [jnp.asarray(draw(side).reshape(count, -1)) for side in pair]
        rows.append(
            [
                nearest_information(*(np.asarray(of(side)) for side in sides)).value
                for of, sides in ((encode, images), (axes.codes, images), (np.asarray, pair))
            ]
        )
    return Curve(np.array(known, float), *np.array(rows).T), found


def identity(width: int) -> MLP:
    """A network that is looked at for its input alone."""
    return MLP((width, 1), key=jax.random.key(0))


# Networks that learn.


@dataclasses.dataclass(frozen=True)
class Case:
    """Networks with noise, and how they learn.

    Attributes:
      make: key -> the network.
      select: which layers are looked at.
      sigma: of the noise, in proportion to activations.
      batch, epochs, rate: of Adam.
    """

    make: Callable[[Array], nnx.Module]
    select: str
    sigma: float = 1e-3
    batch: int = 128
    epochs: int = 300
    rate: float = 1e-3


class Course(NamedTuple):
    """What layers knew along training, in nats.

    Attributes:
      epochs: [t].
      x, y: [t, members, layers], estimates of I(X;T) and I(T;Y).
      error: [t, members, layers], standard deviation of the estimates of I(X;T).
      accuracy: [t, members], of all rows that are looked at.
      layers: their names.
    """

    epochs: Float[np.ndarray, "t"]
    x: Float[np.ndarray, "t m layers"]
    y: Float[np.ndarray, "t m layers"]
    error: Float[np.ndarray, "t m layers"]
    accuracy: Float[np.ndarray, "t m"]
    layers: tuple[str, ...]


def noisy_loss(net: Noisy, batch: PyTree, moment: Moment) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of a network with the noise of a step."""
    return labelled(functools.partial(net, key=moment.key), batch)


def course(
    case: Case,
    rows: Labelled,
    looked_at: Labelled,
    encode: Callable[[Array], Array],
    seeds: Sequence[int],
    *,
    points: int,
) -> Course:
    """Lets members learn side by side, and looks at their layers on the way.

    Args:
      case: what learns.
      rows: what is learned.
      looked_at: what information is of.
      encode: compresses its inputs.
      seeds: of the networks; the first one also of the order of rows.
      points: about how many epochs are measured.
    """
    rule = members(lambda: backprop(noisy_loss, optax.adam(case.rate), informed=True), len(seeds))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    nets = jax.vmap(lambda key: Noisy(case.make(key), case.sigma))(keys)
    each = len(rows.x) // case.batch
    at = log_spaced(case.epochs, points)
    transform = principal(looked_at.x, select=case.select)
    found: list[list[dict[str, Any]]] = []

    def evaluate(state: PyTree) -> dict[str, float]:
        nets = rule.model(state)
        seen = [
            of_one(jax.tree.map(lambda leaf, i=i: leaf[i], nets), transform, looked_at, encode)
            for i in range(len(seeds))
        ]
        found.append(seen)
        return {"accuracy": float(np.mean([each["accuracy"] for each in seen]))}

    outcome = train(
        rule,
        nets,
        ArrayBatches(rows, case.batch, seeds[0]),
        each * case.epochs,
        key=jax.random.key(seeds[0]),
        evaluate=evaluate,
        options=LoopOptions(log_every=0, evaluate_at=tuple(e * each for e in at), progress=False),
        together=each,
    )
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position}")
    place = np.array(list(outcome.evaluations)) / each
    kept = found[: len(place)]
    stacked = {
        name: np.array([[one[name] for one in seen] for seen in kept])
        for name in ("x", "y", "error", "accuracy")
    }
    return Course(place, layers=tuple(kept[0][0]["layers"]), **stacked)


def of_one(net: Noisy, transform: Any, seen: Labelled, encode: Callable) -> dict[str, Any]:
    """Informations in nats of the layers of a network, and its accuracy."""
    stats = calibrate(transform, net, [seen.x], progress=False)
    probe = lossy_information(stats, encode=encode, key=jax.random.key(0))
    report = cast("LossyReport", probe(net, [(seen.x, seen.y)], progress=False))
    layers = list(report.layers.values())
    return {
        "layers": list(report.layers),
        "x": [at.x.value * math.log(2) for at in layers],
        "error": [at.x.error * math.log(2) for at in layers],
        "y": [at.y.value * math.log(2) for at in layers],
        "accuracy": accuracy(net, seen),
    }


def accuracy(net: Noisy, seen: Labelled) -> float:
    """Share of rows whose class is given, without noise."""
    return float(jnp.mean(jax.jit(lambda net, x: net(x).argmax(-1))(net, seen.x) == seen.y))


def phases(values: Float[np.ndarray, "t"], step: float) -> Int[np.ndarray, "p"]:
    """Signs of the phases of a curve, 1 of a rise and -1 of a fall by at least a step each.

    >>> phases(np.array([0.0, 2.0, 1.8, 0.5, 0.6, 3.0]), 1.0).tolist()
    [1, -1, 1]
    """
    found: list[int] = []
    low = high = values[0]
    for value in values[1:]:
        low, high = min(low, value), max(high, value)
        sign = 1 if value - low >= step else -1 if high - value >= step else 0
        if sign and (not found or found[-1] != sign):
            found.append(sign)
        if sign:
            low = high = value
    return np.array(found, int)
