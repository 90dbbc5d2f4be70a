"""Thresholds of CHESS and CATS from activations: arrays in, arrays out.

Symbols: a gate activations after the non-linearity [t, h]; u outputs of the up projection [t, h];
k target sparsity; s_i a channel's statistic E[u_i^2] ("sq") or E|u_i| ("abs"); T the k-quantile of
the importance over all tokens and channels; t_i the threshold of channel i.

    importance   a_i^2 s_i  ("sq")        |a_i| s_i  ("abs")
    t_i          sqrt(T / s_i)            T / s_i

Sources: CHESS (arXiv 2409.01366) and its two official versions, mean square (2024) and absolute
mean (2025); CATS (arXiv 2404.08763) is one t per layer, the k-quantile of |a|.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from ffnlab.errors import ConfigError

Importance = Literal["sq", "abs"]
BINS = 1 << 16


def rank(size: int, q: float) -> int:
    """The 1-based rank that stands for the q-quantile of `size` numbers: int(size * q).

    Raises:
      ConfigError: q outside (0, 1), or a rank of 0 because there are too few numbers.
    """
    if not 0 < q < 1:
        raise ConfigError(f"q={q} is outside (0, 1)")
    if int(size * q) < 1:
        raise ConfigError(
            f"the {q}-quantile of {size} numbers is undefined: at least {1 / q:.0f} are needed; "
            "calibrate on more tokens"
        )
    return int(size * q)


def quantile(x: Float[Array, "*shape"], q: float) -> Float[Array, ""]:
    """The q-quantile over all elements as the authors take it: the int(n q)-th smallest.

    No interpolation; NaN counts as larger than any number.

    Args:
      x: any shape, n elements, float32.
      q: 0 < q < 1.
    Returns:
      [] float32, an element of x.
    Raises:
      ConfigError: q out of range, or n < 1 / q.

    >>> float(quantile(jnp.array([4.0, 1.0, 3.0, 2.0]), 0.5))
    2.0
    """
    return order_statistic(x, rank(x.size, q))


def order_statistic(
    x: Float[Array, "*shape"], k: int | Int[Array | np.generic, ""]
) -> Float[Array, ""]:
    """The k-th smallest element, exactly.

    Found by counting the upper and then the lower 16 bits, in O(n); a sort takes 150 times as long
    on a CPU.

    Args:
      x: any shape, float32; NaN counts as larger than any number.
      k: 1-based rank, 1 to the number of elements; may be traced.
    Returns:
      [] float32, an element of x.
    """
    bits = ordered_bits(x.astype(jnp.float32).reshape(-1))
    upper = (bits >> 16).astype(jnp.int32)
    counts = jnp.cumsum(jnp.zeros(BINS, jnp.int32).at[upper].add(1))
    high = jnp.argmax(counts >= k).astype(jnp.int32)
    below = jnp.where(high > 0, counts[high - 1], 0)
    lower = jnp.where(upper == high, (bits & 0xFFFF).astype(jnp.int32), BINS)
    counts = jnp.cumsum(jnp.zeros(BINS, jnp.int32).at[lower].add(1, mode="drop"))
    low = jnp.argmax(counts >= k - below)
    return from_ordered_bits((high.astype(jnp.uint32) << 16) | low.astype(jnp.uint32))


def ordered_bits(x: Float[Array, "n"]) -> Shaped[Array, "n"]:
    """The float32 numbers as uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def from_ordered_bits(bits: Shaped[Array, "*n"]) -> Float[Array, "*n"]:
    """The inverse of `ordered_bits`."""
    bits = jnp.where(bits >> 31 == 1, bits ^ jnp.uint32(1 << 31), ~bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def histogram(x: Float[Array, "*shape"]) -> Int[Array, "bins"]:
    """How many elements fall into each of 65,536 bins of equal relative width (1 / 256).

    Histograms add up over batches, and `histogram_quantile` reads the quantile of all of them.

    Args:
      x: any shape, >= 0, float32.
    Returns:
      [65536] int32.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32).reshape(-1), jnp.uint32)
    return jnp.zeros(BINS, jnp.int32).at[((bits & 0x7FFFFFFF) >> 15).astype(jnp.int32)].add(1)


def histogram_quantile(counts: Int[Array | np.ndarray, "bins"], q: float) -> float:
    """The q-quantile of the numbers counted, to a relative error of at most 1 / 512.

    Args:
      counts: a sum of `histogram`s.
      q: 0 < q < 1.
    Returns:
      the middle of the bin that holds the int(n q)-th smallest of all n numbers.
    Raises:
      ConfigError: q out of range, or n < 1 / q.
    """
    totals = np.cumsum(np.asarray(counts), dtype=np.int64)
    found = np.searchsorted(totals, rank(int(totals[-1]), q))
    return float(np.uint32((found << 15) | (1 << 14)).view(np.float32))


def statistic(up: Float[Array, "*b h"], importance: Importance) -> Float[Array, "h"]:
    """s_i, the mean over tokens of u_i^2 ("sq") or |u_i| ("abs"), in float32.

    Args:
      up: outputs of the up projection, [..., h].
      importance: "sq" or "abs".
    """
    up = up.astype(jnp.float32).reshape(-1, up.shape[-1])
    return jnp.mean(up * up if importance == "sq" else jnp.abs(up), axis=0)


def scores(
    gate: Float[Array, "*b h"], s: Float[Array, "h"], importance: Importance
) -> Float[Array, "*b h"]:
    """a_i^2 s_i ("sq") or |a_i| s_i ("abs"), in float32.

    Args:
      gate: gate activations after the non-linearity, [..., h].
      s: from `statistic`.
      importance: "sq" or "abs".
    """
    gate = gate.astype(jnp.float32)
    return (gate * gate if importance == "sq" else jnp.abs(gate)) * s


def thresholds(
    cut: float | np.floating, s: Float[Array | np.ndarray, "h"], importance: Importance
) -> Float[np.ndarray, "h"]:
    """t_i = sqrt(T / s_i) ("sq") or T / s_i ("abs"). On the host.

    Args:
      cut: T, quantile of the importance.
      s: from `statistic`, >= 0.
      importance: "sq" or "abs".
    Returns:
      [h] float32, >= 0; inf, which drops the channel always, where s_i is 0.

    >>> thresholds(0.5, np.float32([2.0, 0.0]), "sq")
    array([0.5, inf], dtype=float32)
    """
    s = np.asarray(s, np.float32)
    t = np.float32(cut) / np.where(s == 0, np.float32(1), s)
    return np.where(s == 0, np.float32(np.inf), np.sqrt(t) if importance == "sq" else t)


def keep_mask(
    gate: Float[Array, "*b h"], threshold: Float[Array | np.ndarray, "*h"], *, strict: bool
) -> Bool[Array, "*b h"]:
    """Which activations are kept: |a| > t (strict) or |a| >= t.

    Args:
      gate: [..., h].
      threshold: [h], or [] for one threshold per layer.
      strict: True for "sq" (2024 code), False for "abs" (2025 code) and for CATS, whose authors
        drop where |a| < t.
    """
    magnitude = jnp.abs(gate.astype(jnp.float32))
    return magnitude > threshold if strict else magnitude >= threshold


def inclusive(threshold: float | np.floating) -> np.float32:
    """The next smaller float32: |x| > inclusive(t) is |x| >= t."""
    return np.nextafter(np.float32(threshold), np.float32(-np.inf))
