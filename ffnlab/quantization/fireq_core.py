"""FireQ's quantizers and scales as functions of arrays.

FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM Inference Acceleration (2025,
arXiv 2505.20839). Weights are INT4 with one e4m3 scale per group of rows; scales that would leave
e4m3's range are brought back by one power of two per matrix; outliers are moved between matrices
by scalings that leave the network's function as it is.

Symbols:
  q: codes -8..7, [in, out].   s: scale of a group of G rows.   c: per-tensor scale, a power of 2.
  lam: channel-wise scale, [in].   n[kv, D]: largest norm of a pre-RoPE key channel and its partner.
  m[kv, D]: largest absolute post-RoPE key.   alpha, beta: targets of the RoPE scales.

What differs from the authors' code (mcomp, torch) and why:
  - Weights are [in, out] and groups run along axis 0; theirs are [out, in].
  - A weight of bfloat16 is quantized in float32 arithmetic. Theirs divides in bfloat16, where 6.496
    becomes 6.5 and rounds to 6 or 7 by luck.
  - A group above 7 * 448 saturates its scale at 448; their cast to e4m3 gives NaN there. They also
    clamp weights above +448 (not below -448); a clamp that changes the weights is left out.
  - A pair or channel of keys that is always zero gets scale 1; theirs divides by zero.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int8

from ffnlab.errors import ConfigError
from pallas_kernels.numerics import E4M3, E4M3_MAX, E4M3_TINY, divide

SCALE_DTYPES = {"e4m3": E4M3, "bfloat16": jnp.bfloat16, "float32": jnp.float32}
ABSMAX_FLOOR = 1e-5
SMALLEST_GROUP = 7 * E4M3_TINY  # absmax below which a group's scale underflows e4m3
# Candidates 2^0 .. 2^14, made by the host: XLA's exp2 on a CPU gives 8192.0039 for 2^13.
TENSOR_SCALES = np.ldexp(np.float32(1), np.arange(15))
CHANNEL_KINDS = ("absmean", "absmax", "constant")


class Quantized(NamedTuple):
    """A quantized matrix: w is close to codes * scales[row // group] / divisor.

    Attributes:
      codes: [in, out] int8, -8..7.
      scales: [in / group, out] float8_e4m3fn, bfloat16 or float32, > 0.
      divisor: [] float32, the per-tensor scale c.
    """

    codes: Int8[Array, "in out"]
    scales: Float[Array, "groups out"]
    divisor: Float[Array, ""]


def quantize(
    w: Float[Array, "in out"], *, group: int, scales: str = "e4m3", tensor_scale: bool = False
) -> Quantized:
    """Symmetric INT4 with one scale per group of rows and column.

    m = max(absmax of a group of c w, 1e-5)
    s = max(round(m / 7), 2^-9)
    q = clip(round(c w / s), -8, 7)

    where round(m / 7) rounds to the scales' dtype (the floor 2^-9 is e4m3's) and the other rounds
    half to even. s is rounded before q, so q reaches -8 where s is an e4m3 subnormal.

    Args:
      w: [in, out], any float dtype; a row count that is no multiple of `group` counts as padded
        with zero rows.
      group: rows that share a scale, >= 1.
      scales: "e4m3", "bfloat16" or "float32".
      tensor_scale: search c (`search_tensor_scale`); else c = 1.
    Returns:
      codes [in, out], scales [ceil(in / group), out], divisor c. A NaN or infinity in w makes its
      group's codes meaningless: check before.
    Raises:
      ConfigError: unknown scales, group < 1.
    Source:
      FireQ (arXiv 2505.20839), weight quantizer.

    >>> quantize(jnp.array([[7.0], [-3.0]]), group=2, scales="float32").codes.tolist()
    [[7], [-3]]
    """
    if scales not in SCALE_DTYPES:
        raise ConfigError(f"scales={scales!r}; accepted: {', '.join(SCALE_DTYPES)}")
    grouped = by_group(w.astype(jnp.float32), group)
    c = search_tensor_scale(w, group=group) if tensor_scale else jnp.float32(1)
    grouped = grouped * c
    s = group_scale(jnp.max(jnp.abs(grouped), axis=1), scales)
    q = jnp.clip(jnp.round(grouped / s.astype(jnp.float32)[:, None]), -8, 7)
    return Quantized(q.astype(jnp.int8).reshape(-1, w.shape[1])[: w.shape[0]], s, c)


def group_scale(absmax: Float[Array, "*g"], scales: str) -> Float[Array, "*g"]:
    """The scale of groups with this absmax: absmax / 7, clamped, in the scales' dtype."""
    s = divide(jnp.maximum(absmax, ABSMAX_FLOOR), 7)
    if scales == "e4m3":
        s = jnp.clip(s, E4M3_TINY, E4M3_MAX)
    return s.astype(SCALE_DTYPES[scales])


def by_group(w: Float[Array, "in out"], group: int) -> Float[Array, "g group out"]:
    """Rows in groups, the last one padded with zeros."""
    if group < 1:
        raise ConfigError(f"group={group}; it takes a number of rows >= 1")
    padded = jnp.pad(w, ((0, -w.shape[0] % group), (0, 0)))
    return padded.reshape(-1, group, w.shape[1])


def search_tensor_scale(w: Float[Array, "in out"], *, group: int) -> Float[Array, ""]:
    """The power of two that brings group scales into e4m3's range.

    slack(c) = sum over groups of max(0, 7 * 2^-9 - absmax(c w)) / (7 * 2^-9)

    is how far groups stay below the smallest one that e4m3 scales can express. Candidates are
    c = 2^0 .. 2^14, up to the first for which a group of c w exceeds 448; of these the smallest
    (slack, c) is taken.

    Args:
      w: [in, out], any float dtype.
      group: rows that share a scale.
    Returns:
      c, [] float32; 1 if already w itself exceeds 448.
    Source:
      FireQ (arXiv 2505.20839), per-tensor scale; the search is the official code's.

    >>> float(search_tensor_scale(jnp.full((8, 1), 1e-3), group=8))
    16.0
    """
    absmax = jnp.max(jnp.abs(by_group(w.astype(jnp.float32), group)), axis=1)

    def measure(c: Float[Array, ""]) -> tuple[Float[Array, ""], Bool[Array, ""]]:
        missing = jnp.maximum(SMALLEST_GROUP - absmax * c, 0)
        return divide(jnp.sum(missing), SMALLEST_GROUP), jnp.any(absmax * c > E4M3_MAX)

    candidates = jnp.asarray(TENSOR_SCALES)
    slack, over = jax.lax.map(measure, candidates)
    # over is monotone in c, so "up to the first" is "all that are not over".
    best = jnp.argmin(jnp.where(over, jnp.inf, slack))
    return candidates[best]


def dequantize(quantized: Quantized, *, group: int) -> Float[Array, "in out"]:
    """codes * scales / divisor, [in, out] float32."""
    s = jnp.repeat(quantized.scales.astype(jnp.float32), group, axis=0)
    codes = quantized.codes.astype(jnp.float32)
    return codes * s[: codes.shape[0]] / quantized.divisor


def channel_scale(
    w: Float[Array, "in out"], constant: float, *, kind: str = "absmean"
) -> Float[Array, " in"]:
    """Scale of each input channel of the matrices that read one activation.

    lam_j = constant / mean_n |w[j, n]|     ("absmean"; "absmax": / max_n; "constant": as it is)

    w' = lam[:, None] * w with the activation divided by lam computes the same.

    Args:
      w: [in, out], all matrices that read the activation side by side.
      constant: > 0.
      kind: "absmean", "absmax" or "constant".
    Returns:
      lam, [in] float32, > 0; 1 for a channel whose weights are all zero.
    Raises:
      ConfigError: constant <= 0, unknown kind.
    Source:
      FireQ (arXiv 2505.20839), channel-wise scales.
    """
    positive("constant", constant)
    if kind not in CHANNEL_KINDS:
        raise ConfigError(f"kind={kind!r}; accepted: {', '.join(CHANNEL_KINDS)}")
    size = jnp.abs(w.astype(jnp.float32))
    if kind == "constant":
        return jnp.full(w.shape[0], constant, jnp.float32)
    reduced = jnp.mean(size, axis=1) if kind == "absmean" else jnp.max(size, axis=1)
    return safe_ratio(constant, reduced)


def partner(head_dim: int, rotated: int | None = None) -> np.ndarray:
    """The channel that RoPE rotates each channel with, [D] int.

    Pairs are (f, f + rotated / 2); channels from `rotated` on do not rotate and are their own.

    Args:
      head_dim: D, even.
      rotated: channels that rotate, even, <= D; D when None.
    Raises:
      ConfigError: odd or too many channels.

    >>> partner(6, rotated=4).tolist()
    [2, 3, 0, 1, 4, 5]
    """
    rotated = head_dim if rotated is None else rotated
    if head_dim % 2 or rotated % 2 or not 0 <= rotated <= head_dim:
        raise ConfigError(
            f"head_dim={head_dim} with {rotated} rotating channels: RoPE pairs channel f with "
            "f + rotated / 2, so both are even and rotated <= head_dim"
        )
    channels = np.arange(head_dim)
    return np.concatenate([np.roll(channels[:rotated], rotated // 2), channels[rotated:]])


def pair_norms(
    keys: Float[Array, "*b kv D"], *, rotated: int | None = None
) -> Float[Array, "kv D"]:
    """n: largest norm over tokens of each channel with its RoPE partner, [kv, D] float32.

    n[kv, f] = n[kv, f + D/2] = max sqrt(k_f^2 + k_(f + D/2)^2), for keys before RoPE; the largest
    |k_f| where a channel does not rotate.

    Args:
      keys: [..., kv, D].
      rotated: see `partner`.
    """
    other = partner(keys.shape[-1], rotated)
    squares = keys.astype(jnp.float32) ** 2
    alone = jnp.asarray(other == np.arange(len(other)))
    norms = jnp.sqrt(squares + jnp.where(alone, 0, squares[..., other]))
    return jnp.max(norms.reshape(-1, *norms.shape[-2:]), axis=0)


def largest_pairs(
    absmax: Float[Array, "kv D"], top_k: int, *, rotated: int | None = None
) -> Bool[Array, "kv D"]:
    """Which channels are among the top_k of their head, or partners of one; see `partner`."""
    head_dim = absmax.shape[-1]
    other = partner(head_dim, rotated)
    if not 0 <= 2 * top_k <= head_dim:
        raise ConfigError(
            f"top_k={top_k} channels and their RoPE partners do not fit head_dim={head_dim}; "
            f"top_k takes 0 to {head_dim // 2}"
        )
    index = jax.lax.top_k(absmax, top_k)[1]
    chosen = jax.nn.one_hot(index, head_dim, dtype=jnp.bool_).any(axis=-2)
    return chosen | chosen[..., other]


def post_rope_scale(
    absmax: Float[Array, "kv D"],
    *,
    beta: float = 8.0,
    top_k: int = 8,
    rotated: int | None = None,
) -> Float[Array, "kv D"]:
    """Online scale of keys after RoPE: beta / m on the largest channels and their RoPE partners.

    Keys are multiplied and queries divided by it. It differs inside a RoPE pair, so it cannot be
    folded into the projections.

    Args:
      absmax: m, largest |key| after RoPE per KV head and channel, [kv, D], D even.
      beta: target size, > 0.
      top_k: channels per head; each brings its partner; 0 <= 2 top_k <= D.
      rotated: see `partner`.
    Returns:
      [kv, D] float32, 1 where untouched.
    Raises:
      ConfigError: odd D, 2 top_k > D, beta <= 0.
    Source:
      FireQ (arXiv 2505.20839), post-RoPE scales.
    """
    chosen = largest_pairs(absmax, top_k, rotated=rotated)
    scale = safe_ratio(positive("beta", beta), absmax.astype(jnp.float32))
    return jnp.where(chosen, scale, 1)


def pre_rope_scale(
    norms: Float[Array, "kv D"],
    *,
    alpha: float = 8.0,
    untouched: Bool[Array, "kv D"] | None = None,
) -> Float[Array, "kv D"]:
    """Offline scale of keys before RoPE: alpha / n, the same for both members of a pair.

    Multiplying keys and dividing queries by it leaves every score as it is, and the rotation keeps
    the bound: |key| <= alpha at each position for keys within the calibrated norms.

    Args:
      norms: n of `pair_norms`, [kv, D].
      alpha: target size, > 0.
      untouched: channels that keep scale 1 (those with a post-RoPE scale), [kv, D].
    Returns:
      [kv, D] float32.
    Raises:
      ConfigError: alpha <= 0.
    Source:
      FireQ (arXiv 2505.20839), RoPE-preserving normalization.
    """
    scale = safe_ratio(positive("alpha", alpha), norms.astype(jnp.float32))
    return scale if untouched is None else jnp.where(untouched, 1, scale)


def safe_ratio(target: float, size: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """target / size, and 1 where size is 0."""
    return jnp.where(size > 0, target / jnp.where(size > 0, size, 1), 1)


def positive(name: str, value: float) -> float:
    """`value`, or ConfigError unless it is a number > 0."""
    if not 0 < value < math.inf:
        raise ConfigError(f"{name}={value}; it takes a number > 0")
    return value
