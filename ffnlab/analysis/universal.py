"""A transformer of one layer that approximates a given map between sequences, by construction.

Any continuous map of sequences on a box is approximated by one layer of attention and a
feed-forward network (arXiv 2507.10581). Its proof was not at hand: the construction is our own and
shows the same for sequences of one length n.

1. Place i is told by the i-th unit vector E_i. Head h has the query beta e_1 for every place and
   the key e_1 for place h alone, so that all attend to place h, with a weight of at least
   1 / (1 + (n - 1) exp(-beta)).
2. Its values copy x_h into block h of the stream: every place then holds x_1 .. x_n and E_i, up to
   2 (n - 1) exp(-beta) max |x|.
3. What is left is a map of numbers, which a network of one hidden layer of ReLU approximates:
   columns of W_1 are drawn on the unit sphere and b_1 in -1.5..1.5, for numbers scaled to -1..1,
   and W_2 is a ridge regression in float64.

As many heads as places: fewer would want another argument.
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ffnlab import tree
from ffnlab.errors import ConfigError, at_least, check_seed
from ffnlab.layers import Linear
from ffnlab.models import SequenceConfig, SequenceTransformer
from ffnlab.weights import Dense

__all__ = ["Construction", "Errors", "construct", "corners_and_grid", "errors_of"]

Target = Callable[[np.ndarray], np.ndarray]

RIDGE = 1e-8  # for each sample
OFFSET = 1.5  # of biases
SHARPEST = 1e6  # beta above it changes no weight, and beyond 1e38 would have no end in float32


class Errors(NamedTuple):
    """How far a model is from a map.

    Attributes:
      largest: over all outputs of all points.
      rms: root of the mean square.
    """

    largest: float
    rms: float


class Construction(NamedTuple):
    """A model that was made, and where it holds.

    Attributes:
      model: the network, in float32; it is saved, jitted and trained on like any other.
      low, high: ends of the box that it was fitted on.
      gather: the largest possible error of what attention gathers, 2 (n - 1) exp(-beta) max |x|.
      fitted: errors on the samples that W_2 was fitted to, in float64.
    """

    model: SequenceTransformer
    low: float
    high: float
    gather: float
    fitted: Errors

    def __call__(self, x: Float[Array | np.ndarray, "b n d"]) -> Float[Array, "b n o"]:
        """The model's outputs; warns of inputs outside of the box, where they may be anything."""
        found = np.asarray(x)
        if found.size and not (found.min() >= self.low and found.max() <= self.high):
            warnings.warn(
                f"x lies in {found.min():g} to {found.max():g}; the model was made for "
                f"{self.low:g} to {self.high:g}",
                stacklevel=2,
            )
        return self.model(jnp.asarray(x, jnp.float32))


def construct(
    target: Target,
    length: int,
    inputs: int = 1,
    *,
    width: int = 256,
    beta: float = 40.0,
    low: float = -1.0,
    high: float = 1.0,
    samples: int = 6000,
    positions: bool = True,
    gathers: bool = True,
    seed: int = 0,
) -> Construction:
    """The model of the module for a map.

    Args:
      target: [b, n, inputs] -> [b, n, outputs], float64 on the host.
      length, inputs: n places of so many numbers.
      width: m, units of the feed-forward network.
      beta: >= 0, how sharply heads attend; from 40 on they copy exactly.
      low, high: the box of every number.
      samples: drawn in it, to fit to.
      positions: whether places are told apart; without, heads gather the mean of all, and the
        network is equivariant.
      gathers: whether places see each other.
      seed: of the draws.
    Raises:
      ConfigError: a size, beta, seed or box out of range; a target that gives another shape, or
        numbers that are not finite.
    """
    at_least(1, length=length, inputs=inputs, width=width, samples=samples)
    check_seed(seed)
    check_box(low, high)
    if not 0 <= beta < math.inf:
        raise ConfigError(f"beta={beta} must be finite and >= 0")
    random = np.random.default_rng(seed)
    x = random.uniform(low, high, (samples, length, inputs))
    wanted = outputs_of(target, x)
    u = np.concatenate([x, features(x, positions, gathers)], -1)
    w1, b1 = drawn_features(random, (length, inputs, width), (low, high), positions and gathers)
    stream = len(w1)
    hidden = np.maximum(u.reshape(-1, stream) @ w1 + b1, 0)
    w2, b2 = ridge(hidden, wanted.reshape(len(hidden), -1))
    left = hidden @ w2 + b2 - wanted.reshape(len(hidden), -1)
    config = SequenceConfig(
        length,
        inputs,
        wanted.shape[-1],
        stream,
        width,
        heads=length if gathers else 0,
        head_dim=max(inputs, 1),
        positions=positions,
    )
    model = assembled(config, w1, b1, w2, b2, beta)
    gather = 2 * (length - 1) * math.exp(-beta) * max(abs(low), abs(high)) if gathers else 0.0
    fitted = Errors(float(np.abs(left).max()), float(np.sqrt(np.mean(left**2))))
    return Construction(model, low, high, gather, fitted)


def drawn_features(
    random: np.random.Generator,
    sizes: tuple[int, int, int],
    box: tuple[float, float],
    is_told: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """(W_1, b_1) of random features of the stream.

    Args:
      random: of the draws.
      sizes: places, numbers of each, features.
      box: ends of the numbers, which features see scaled to -1..1.
      is_told: whether a place knows which it is and all are gathered; what it has of its own is
        among that, and not looked at again.
    """
    n, d, width = sizes
    stream = d + n + n * d
    w = np.zeros((stream, width))
    seen = slice(d if is_told else 0, None)
    drawn = random.standard_normal((stream - seen.start, width))
    w[seen] = drawn / np.linalg.norm(drawn, axis=0)
    b = random.uniform(-OFFSET, OFFSET, width)
    numbers = np.r_[:d, d + n : stream]
    middle, half = (box[0] + box[1]) / 2, (box[1] - box[0]) / 2
    b = b - middle / half * w[numbers].sum(0)
    w[numbers] /= half
    return w, b


def features(x: np.ndarray, positions: bool, gathers: bool) -> np.ndarray:
    """[E_i, x_1 .. x_n] of every place, zeros in place of what is left out."""
    b, n, d = x.shape
    told = np.broadcast_to(np.eye(n) * positions, (b, n, n))
    if not gathers:
        return np.concatenate([told, np.zeros((b, n, n * d))], -1)
    if positions:
        seen = np.broadcast_to(x.reshape(b, 1, n * d), (b, n, n * d))
    else:  # no head can find a place: each gathers the mean
        seen = np.broadcast_to(np.tile(x.mean(1, keepdims=True), (1, 1, n)), (b, n, n * d))
    return np.concatenate([told, seen], -1)


def ridge(hidden: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(W_2, b_2) of a ridge regression, RIDGE for each sample; b_2 is not held down."""
    means = hidden.mean(0), wanted.mean(0)
    h, y = hidden - means[0], wanted - means[1]
    w = np.linalg.solve(h.T @ h + RIDGE * len(h) * np.eye(h.shape[1]), h.T @ y)
    return w, means[1] - means[0] @ w


def outputs_of(target: Target, x: np.ndarray) -> np.ndarray:
    """What a target gives; raises ConfigError for another shape and for what is not finite."""
    found = np.asarray(target(x), np.float64)
    if found.ndim != 3 or found.shape[:2] != x.shape[:2] or not found.shape[2]:
        raise ConfigError(
            f"target gives {list(found.shape)} for {list(x.shape)}; [{x.shape[0]}, {x.shape[1]}, "
            "outputs] is needed"
        )
    if not np.isfinite(found).all():
        raise ConfigError("target gives NaN or infinity in the box")
    return found


def assembled(
    config: SequenceConfig,
    w1: np.ndarray,
    b1: np.ndarray,
    w2: np.ndarray,
    b2: np.ndarray,
    beta: float,
) -> SequenceTransformer:
    """The model of these weights, and of attention that copies."""
    n, d, width = config.length, config.inputs, config.width
    model = config.make(key=jax.random.key(0))
    embed = np.zeros((d, width))
    embed[:, :d] = np.eye(d)
    new: dict[str, object] = {
        "embed": with_weight(model.embed, embed),
        "mlp.maps[0]": with_weight(model.mlp.maps[0], w1, b1),
        "mlp.maps[1]": with_weight(model.mlp.maps[1], w2, b2),
    }
    if config.positions:
        new["positions"] = with_table(model, np.eye(n, width, d))
    if config.heads:
        k = config.head_dim
        q, keys, values = (np.zeros((width, n * k)) for _ in range(3))
        out = np.zeros((n * k, width))
        for head in range(n):
            q[d : d + n, head * k] = min(beta, SHARPEST) * math.sqrt(k)  # whatever the place
            keys[d + head, head * k] = 1
            values[:d, head * k : head * k + d] = np.eye(d)
            out[head * k : head * k + d, d + n + head * d : d + n + (head + 1) * d] = np.eye(d)
        parts = {"q": q, "k": keys, "v": values, "o": out}
        new |= {
            f"attn.{name}": with_weight(getattr(model.attn, name), w) for name, w in parts.items()
        }
    return tree.replace(model, new)


def with_weight(linear: Linear, w: np.ndarray, b: np.ndarray | None = None) -> Linear:
    """The map of other numbers."""
    bias = None if b is None else jnp.asarray(b, jnp.float32)
    return linear.replace(Dense(jnp.asarray(w, jnp.float32)), bias)


def with_table(model: SequenceTransformer, table: np.ndarray) -> object:
    """The model's positions as other numbers."""
    return jax.tree.map(lambda leaf: jnp.asarray(table, leaf.dtype), model.positions)


def errors_of(
    model: Callable[[Array], Array], target: Target, points: Float[np.ndarray, "b n d"]
) -> Errors:
    """How far a model is from a map at some points.

    Args:
      model: a `SequenceTransformer`, a `Construction`, or any function alike.
      target: as of `construct`.
      points: `corners_and_grid`, for instance: the theorem is of the largest error.
    Raises:
      ConfigError: the model gives another shape than the target, or the target no finite numbers.
    """
    wanted = outputs_of(target, np.asarray(points, np.float64))
    found = np.asarray(model(jnp.asarray(points, jnp.float32)), np.float64)
    if found.shape != wanted.shape:
        raise ConfigError(f"model gives {list(found.shape)}, target {list(wanted.shape)}")
    apart = found - wanted
    return Errors(float(np.abs(apart).max()), float(np.sqrt(np.mean(apart**2))))


def corners_and_grid(
    length: int, inputs: int = 1, *, steps: int = 15, low: float = -1.0, high: float = 1.0
) -> Float[np.ndarray, "b n d"]:
    """A grid over a box, its corners among the points.

    Raises:
      ConfigError: fewer than 2 steps, more than ten million points, or a box out of range.
    """
    check_box(low, high)
    at_least(2, steps=steps)
    at_least(1, length=length, inputs=inputs)
    numbers = length * inputs
    if steps**numbers > 10**7:
        raise ConfigError(f"steps={steps} of {numbers} numbers are {steps**numbers:.0e} points")
    axes = np.meshgrid(*[np.linspace(low, high, steps)] * numbers, indexing="ij")
    return np.stack(axes, -1).reshape(-1, length, inputs)


def check_box(low: float, high: float) -> None:
    """Raises ConfigError for a box of no width, or without end."""
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"low={low} must lie below high={high}, and both be finite")
