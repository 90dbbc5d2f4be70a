"""What the study of SNNK measures besides trained networks: errors of kernels, and closed forms."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from ffnlab.data import Labelled
from ffnlab.layers import MLP, FourierFeatures, ReluFeatures
from ffnlab.layers.random_features import arc_cosine, projections, relu_features
from ffnlab.learning import backprop
from ffnlab.structure.snnk import least_squares
from ffnlab.studies.classify import learned

__all__ = ["COUNTS", "Fit", "DAMPINGS", "bias_of", "errors", "fitted", "slope", "smooth"]

COUNTS = (16, 64, 256, 1024, 4096)  # features
WIDTH, PAIRS = 16, 64
DAMPINGS = (0.0, 0.02, 0.1)


def unit_vectors(seed: int) -> Float[Array, "2 n d"]:
    """Pairs of unit vectors."""
    drawn = jax.random.normal(jax.random.key(seed), (2, PAIRS, WIDTH))
    return drawn / jnp.linalg.norm(drawn, axis=-1, keepdims=True)


def errors(kind: str, *, orthogonal: bool, draws: int, seed: int) -> Float[np.ndarray, "counts"]:
    """Root mean square error of products of features, over pairs of unit vectors and draws.

    Args:
      kind: "relu", against the arc-cosine kernel, or "cos", against cos(w . x + b).
      orthogonal: whether projections are.
      draws: of projections, for each count.
      seed: of vectors and draws.
    """
    x, w = unit_vectors(seed)
    b = jnp.linspace(0, 2 * math.pi, PAIRS)
    wanted = arc_cosine(x, w) if kind == "relu" else jnp.cos((x * w).sum(-1) + b)

    def one(key: Array, count: int) -> Float[Array, ""]:
        g = projections(key, count, WIDTH, orthogonal=orthogonal)
        if kind == "relu":
            found = (relu_features(x, g) * relu_features(w, g)).sum(-1)
        else:
            phi = FourierFeatures(g, jnp.ones(count))
            found = (phi(x) * phi.weights(w.T, b).T).sum(-1)
        return jnp.mean((found - wanted) ** 2)

    every = jax.jit(
        lambda keys, count: jax.lax.map(lambda key: one(key, count), keys).mean(), static_argnums=1
    )
    keys = jax.random.split(jax.random.key(seed + 1), draws)
    return np.array([math.sqrt(every(keys, count)) for count in COUNTS])


def bias_of(damping: float, *, draws: int, seed: int) -> tuple[float, float]:
    """(mean, standard error) of what a cosine layer of 256 features gives too much, for one pair.

    Args:
      damping: M, which shall leave the mean as it is.
      draws, seed: as `errors`.
    """
    x, w = unit_vectors(seed)[:, :1]

    def one(key: Array) -> Float[Array, ""]:
        phi = FourierFeatures(projections(key, 256, WIDTH), jnp.ones(256), damping=damping)
        return (phi(x) @ phi.weights(w.T))[0, 0] - jnp.cos((x * w).sum())

    found = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), draws)))
    return float(found.mean()), float(found.std() / math.sqrt(draws))


def slope(counts: Sequence[int], found: Float[np.ndarray, "n"]) -> float:
    """Of the line through the logarithms of errors over those of counts."""
    return float(np.polyfit(np.log(counts), np.log(found), 1)[0])


class Fit(NamedTuple):
    """Two ways to the last matrix of a bundled network.

    Attributes:
      r2: share of the test targets' variance that the closed form explains.
      closed, adam: mean squared error on training rows, of the closed form and of Adam.
      gradient: largest entry of the gradient of that error at the closed form.
    """

    r2: float
    closed: float
    adam: float
    gradient: float


def smooth(rows: int, width: int, seed: int) -> Labelled:
    """Inputs of U(-1, 1), and sin(x . u) + cos(2 (x . v)^2) / 2 for two directions."""
    draw = np.random.default_rng(seed)
    u, v = np.random.default_rng(width).standard_normal((2, width)) / math.sqrt(width)
    x = draw.uniform(-1, 1, (rows, width))
    y = np.sin(x @ u) + 0.5 * np.cos(2 * (x @ v) ** 2)
    return Labelled(x.astype(np.float32), y[:, None].astype(np.float32))


def fitted(width: int, *, features: int, steps: int, rates: Sequence[float], seed: int) -> Fit:
    """A network of two bundled layers on a smooth function, in closed form and by Adam.

    Features of features are fixed; the one matrix behind them is what is found, from a triangle in
    float64. Adam takes the rate of the least training error.

    Args:
      width: of the inputs.
      features: of either layer.
      steps, rates: of Adam, on batches of 256 rows.
      seed: of rows and projections.
    """
    train, test = smooth(2048, width, seed), smooth(1024, width, seed + 1)
    keys = jax.random.split(jax.random.key(seed), 2)
    first = ReluFeatures(projections(keys[0], features, width + 1))
    second = ReluFeatures(projections(keys[1], features, features), floor=-0.5)

    def phi(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n m"]:
        return np.asarray(second(first(jnp.concatenate([x, jnp.ones((len(x), 1))], 1))))

    rows = phi(train.x)
    whole = np.hstack([rows, np.ones((len(rows), 1)), train.y]).astype(np.float64)
    w, b = least_squares(np.linalg.qr(whole, mode="r"), features, 0.0)
    off = rows.astype(np.float64) @ w + b - train.y
    gradient = 2 * whole[:, : features + 1].T @ off / len(off)
    left = phi(test.x).astype(np.float64) @ w + b - test.y
    return Fit(
        1 - float((left**2).mean() / test.y.var()),
        float((off**2).mean()),
        min(by_adam(rows, train.y, steps, rate, seed) for rate in rates),
        float(np.abs(gradient).max()),
    )


def squared(model: MLP, batch: tuple[Array, Array]) -> tuple[Array, dict[str, Array]]:
    """Mean squared error."""
    x, y = batch
    return jnp.mean((model(x) - y) ** 2), {}


def by_adam(
    rows: Float[np.ndarray, "n m"], y: Float[np.ndarray, "n k"], steps: int, rate: float, seed: int
) -> float:
    """Training error of a linear map after Adam, on all rows."""
    model = MLP((rows.shape[1], y.shape[1]), key=jax.random.key(seed))
    rule = backprop(squared, optax.adam(optax.cosine_decay_schedule(rate, steps)))
    state = learned(rule, model, (rows, y), batch=256, steps=steps, seed=seed)
    return float(jnp.mean((rule.model(state)(jnp.asarray(rows)) - y) ** 2))
