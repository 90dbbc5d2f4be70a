"""Transformable architecture search on arrays: sizes drawn in pairs, channels interpolated, work
expected.

    z = (log softmax(alpha) + gumbel) / tau;   p = softmax(z_i, z_j) of a pair drawn from softmax(z)
    out = p_i M[i, m] x_i + p_j M[j, m] x_j,   m the wider of the two
    E[macs] = sum over products of  macs E[c_in] E[c_out] P(kept),   without noise

alpha: logits of a layer's sizes; tau: temperature; M[i, m]: the means that make channels of size i
into those of size m. Source: arXiv 1905.09717, sections 3.1 and 3.2, and the authors' code.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ffnlab.errors import ConfigError, is_known

__all__ = [
    "RATIOS",
    "Draw",
    "Pairs",
    "Terms",
    "averaging",
    "budget_term",
    "depth_choices",
    "interpolation",
    "mixed_pairs",
    "pairs",
    "products",
    "reached",
    "shares",
    "temperature",
    "width_choices",
    "windows",
]

RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of a layer's channels
NEVER = -1e9  # logit of a candidate that a layer does not have
EPS = 1e-7  # added to probabilities before pairs are drawn, as the authors do


def width_choices(size: int, ratios: Sequence[float] = RATIOS) -> tuple[int, ...]:
    """The numbers of channels that a layer may keep, ascending: int(size * ratio), but none of 0.

    Raises:
      ConfigError: no ratios, or one outside (0, 1].

    >>> width_choices(16), width_choices(3)
    ((4, 6, 8, 9, 11, 12, 14, 16), (1, 2, 3))
    """
    if not len(ratios) or not all(0 < ratio <= 1 for ratio in ratios):
        raise ConfigError(f"ratios={tuple(ratios)} must be one or more numbers in (0, 1]")
    found = sorted({int(size * ratio) for ratio in ratios} - {0})
    if not found:
        raise ConfigError(f"ratios={tuple(ratios)} leave none of the {size} channels of a layer")
    return tuple(found)


def depth_choices(blocks: int) -> tuple[int, ...]:
    """How many of a stage's blocks may be kept: every number up to 3, else 1, 3, 5, … and all.

    >>> depth_choices(3), depth_choices(6)
    ((1, 2, 3), (1, 3, 5, 6))
    """
    step = 1 if blocks <= 3 else 2
    return tuple(sorted({*range(1, blocks + 1, step), blocks}))


def interpolation(size: int, out: int) -> Float[np.ndarray, "out size"]:
    """The means that make `size` channels into `out`: adaptive average pooling over channels.

        M[j, a:b] = 1 / (b - a),   a = floor(j size / out),   b = ceil((j + 1) size / out)

    Returns:
      float64; the identity where the sizes are equal.

    >>> interpolation(3, 2).tolist()
    [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    """
    start, end = ends(size, out)
    channel = np.arange(size)
    inside = (channel >= start[:, None]) & (channel < end[:, None])
    return inside / (end - start)[:, None]


def ends(size: int, out: int) -> tuple[Int[np.ndarray, "out"], Int[np.ndarray, "out"]]:
    """(first channel, end) of each mean of `interpolation`."""
    j = np.arange(out)
    return j * size // out, -(-(j + 1) * size // out)


def windows(choices: Sequence[int], size: int) -> Int[np.ndarray, "n n 2 size"]:
    """A table of `interpolation` from every choice to every other, by the ends of its means.

    The matrices themselves would be n^2 size^2 numbers; `averaging` makes one where it is needed.

    Args:
      choices: numbers of channels, ascending.
      size: channels of the whole layer; means beyond a choice are empty.
    """
    table = np.zeros((len(choices), len(choices), 2, size), np.int32)
    for i, a in enumerate(choices):
        for j, b in enumerate(choices):
            table[i, j, :, :b] = ends(a, b)
    return table


def averaging(window: Int[Array, "2 size"]) -> Float[Array, "size size"]:
    """The matrix of an entry of `windows`, float32: rows of empty means are zero."""
    start, end = window[0][:, None], window[1][:, None]
    channel = jnp.arange(window.shape[1])
    inside = (channel >= start) & (channel < end)
    return inside.astype(jnp.float32) / jnp.maximum(end - start, 1).astype(jnp.float32)


def temperature(
    step: Int[Array, ""] | int, steps: int, high: float = 5.0, low: float = 0.1
) -> Float[Array, ""]:
    """tau = low + (high - low) (1 + cos(pi step / steps)) / 2, `low` from the last step on.

    >>> [round(float(temperature(step, 10)), 2) for step in (0, 5, 10, 20)]
    [5.0, 2.55, 0.1, 0.1]
    """
    part = jnp.clip(jnp.asarray(step, jnp.float32) / steps, 0.0, 1.0)
    return low + (high - low) * (1 + jnp.cos(math.pi * part)) / 2


class Pairs(NamedTuple):
    """Two candidates of every layer, and how they are mixed.

    Attributes:
      index: [rows, 2], of candidates.
      weights: [rows, 2], >= 0, rows sum to 1.
    """

    index: Int[Array, "rows 2"]
    weights: Float[Array, "rows 2"]

    @property
    def widest(self) -> Int[Array, "rows"]:
        """The larger of the two candidates, of those that count at all."""
        return jnp.where(self.weights > 0, self.index, 0).max(-1)


class Draw(NamedTuple):
    """One network of a search.

    Attributes:
      pairs: of the widths.
      depths: how much every number of blocks counts.
    """

    pairs: Pairs
    depths: Float[Array, "stages m"]


def legal(counts: Sequence[int], n: int) -> Bool[np.ndarray, "rows n"]:
    """Which of n columns are candidates of rows that have so many each."""
    return np.arange(n) < np.asarray(counts, np.int32).reshape(-1, 1)


def noisy(
    logits: Float[Array, "rows n"],
    counts: Sequence[int],
    tau: Array | float,
    noise: Float[Array, "rows n"],
) -> Float[Array, "rows n"]:
    """z = (log softmax(logits) + noise) / tau over the candidates that there are."""
    if is_known(tau) and not tau > 0:
        raise ConfigError(f"tau={tau} must be positive: sizes are drawn at a temperature")
    known = jnp.where(legal(counts, logits.shape[1]), logits, NEVER)
    return (jax.nn.log_softmax(known) + noise) / tau


def mixed_pairs(z: Float[Array, "rows n"], index: Int[Array, "rows 2"]) -> Pairs:
    """Pairs of given candidates; gradients reach the weights alone."""
    return Pairs(index, jax.nn.softmax(jnp.take_along_axis(z, index, axis=1)))


def pairs(
    logits: Float[Array, "rows n"], counts: Sequence[int], tau: Array | float, key: Array
) -> Pairs:
    """Draws two candidates of every row without putting back, of softmax(z) + 1e-7.

    Args:
      logits: alpha.
      counts: candidates of every row; a row of one has it twice, and counts it once.
      tau: > 0.
      key: of the noise in z, which weighs the pair too, and of the draw.
    Raises:
      ConfigError: tau is not positive.
    """
    noise, draw = jax.random.split(key)
    z = noisy(logits, counts, tau, jax.random.gumbel(noise, logits.shape))
    likely = jnp.log(jax.nn.softmax(jax.lax.stop_gradient(z)) + EPS)
    likely = jnp.where(legal(counts, logits.shape[1]), likely, NEVER)
    # The largest two of log p + gumbel are two draws of p without putting back.
    _, index = jax.lax.top_k(likely + jax.random.gumbel(draw, logits.shape), 2)
    found = mixed_pairs(z, index)
    return found._replace(index=jnp.minimum(index, np.asarray(counts)[:, None] - 1))


def shares(
    logits: Float[Array, "rows n"], counts: Sequence[int], tau: Array | float, key: Array
) -> Float[Array, "rows n"]:
    """softmax((log softmax(logits) + gumbel) / tau): how much every candidate counts.

    Args, Raises: as `pairs`.
    """
    return jax.nn.softmax(noisy(logits, counts, tau, jax.random.gumbel(key, logits.shape)))


def reached(probabilities: Float[Array, "stages n"]) -> Float[Array, "stages n"]:
    """P(at least choice i): the sum over this and all later ones.

    >>> reached(jnp.array([[0.5, 0.25, 0.25]])).tolist()
    [[1.0, 0.5, 0.25]]
    """
    return jnp.cumsum(probabilities[:, ::-1], axis=1)[:, ::-1]


class Terms(NamedTuple):
    """The products of a network as a sum of terms macs * size[left] * size[right] * kept[keep].

    Attributes:
      macs: [m] float64, for one channel on either side.
      left, right: [m], of sizes.
      keep: [m], of probabilities to be there.
      is_bridge: [m], a term of a shortcut that a network has only where both sizes differ.
    """

    macs: Float[np.ndarray, "m"]
    left: Int[np.ndarray, "m"]
    right: Int[np.ndarray, "m"]
    keep: Int[np.ndarray, "m"]
    is_bridge: Bool[np.ndarray, "m"]


def products(
    terms: Terms, sizes: Float[Array, "s"], kept: Float[Array, "k"], *, bridges: bool
) -> Float[Array, ""]:
    """The sum of terms, in millions of multiply-adds.

    Args:
      sizes: that terms refer to; expected ones, as sizes of different layers are independent, give
        the expected sum.
      kept: likewise, 1 for what is always there.
      bridges: count shortcuts where sizes differ; of expected sizes none is counted.
    """
    a, b = sizes[terms.left], sizes[terms.right]
    counted = jnp.where(terms.is_bridge, bridges & (a != b), True)
    each = (terms.macs / 1e6).astype(np.float32) * a * b * kept[terms.keep]
    return jnp.where(counted, each, 0.0).sum()


def budget_term(
    expected: Float[Array, ""],
    exact: Float[Array, ""],
    need: Float[Array, ""] | float,
    slack: Float[Array, ""] | float,
) -> Float[Array, ""]:
    """What pulls a search towards a budget: log expected with the sign of what is wrong.

        + log E[macs] if exact > need;   - log E[macs] if exact < need - slack;   else 0

    The test is of the network of the most likely sizes, the gradient of the expectation: with one
    quantity for both a search would end at the first draw or go to and fro.

    Args:
      expected: E[macs], > 0.
      exact: macs of the network of the most likely sizes.
      need, slack: largest macs, and how far below them nothing is wrong.
    """
    sign = jnp.where(exact > need, 1.0, jnp.where(exact < need - slack, -1.0, 0.0))
    return sign * jnp.log(expected)
