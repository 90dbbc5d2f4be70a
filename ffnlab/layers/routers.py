"""Routers: which expert, or which branch, each token is sent to, and with what weight.

All are pure functions that give one `Routing`, whatever they decide by: scores (`softmax_top_k`,
`sigmoid_top_k`, `expert_choice`), the token itself (`by_hash`, `by_modality`), a choice made
elsewhere (`fixed`), chance (`random`). `thinned` and `limited` drop some of the choices. Losses and
counts of what was decided are in `ffnlab.layers.balance`.

A choice of `experts`, one past the last, is none: padding has only such, and so has a token of
which a score is NaN or infinite, which argmax would send to wherever the NaN is.

Sources: Switch (arXiv 2101.03961), GShard (2006.16668), expert choice (2202.09368), batch priority
(2106.05974), hash layers (2106.04426), sigmoid scores (2408.15664).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ffnlab.errors import ConfigError
from ffnlab.layers.context import TokenFacts
from ffnlab.layers.logical import row_names, rowwise

__all__ = [
    "Routing",
    "by_hash",
    "by_modality",
    "capacity_of",
    "check_k",
    "expert_choice",
    "fixed",
    "limited",
    "random",
    "sigmoid_top_k",
    "softmax_top_k",
    "straight",
    "thinned",
]

Valid = Bool[Array, "*b"] | None
TINY = float(np.finfo(np.float32).tiny)
POLICIES = ("all", "none", "threshold", "random")  # of later choices
DROPS = ("last", "random", "lightest")


class Routing(NamedTuple):
    """Where tokens go; of a whole model every shape has an axis of layers before it.

    Attributes:
      chosen: [*b, k] int32, an expert each, `experts` for none.
      weight: [*b, k] float32, of the expert's output; 0 where it is not kept.
      scores: [*b, e] float32, what was chosen by: probabilities of a softmax, affinities of a
        sigmoid, or the certain choice; 0 for a token that is not routed.
      kept: [*b, k] bool, False for no choice and for one that was dropped.
      valid: [*b] bool, False for padding.
      log_norm: [*b] float32, log of the sum of exp(logits); 0 where there are no logits.
    """

    chosen: Int[Array, "*b k"]
    weight: Float[Array, "*b k"]
    scores: Float[Array, "*b e"]
    kept: Bool[Array, "*b k"]
    valid: Bool[Array, "*b"]
    log_norm: Float[Array, "*b"]

    @property
    def experts(self) -> int:
        """How many there are to choose from (e)."""
        return self.scores.shape[-1]


def check_k(k: int, experts: int) -> None:
    """Raises ConfigError unless 1 <= k <= experts."""
    if experts < 1 or not 1 <= k <= experts:
        raise ConfigError(f"k={k} of experts={experts}: 1 <= k <= experts is accepted")


def softmax_top_k(
    logits: Float[Array, "*b e"], k: int, *, normalize: bool = True, valid: Valid = None
) -> Routing:
    """The k experts of largest probability, p = softmax(logits); on a tie the first.

    Args:
      logits: [*b, e]; computed with in float32.
      k: experts of a token, 1 <= k <= e.
      normalize: weights are p over the sum of the chosen (Mixtral, GShard) or p itself (Switch).
      valid: [*b], False for padding; None where all are tokens.
    Raises:
      ConfigError: k outside 1..e.

    >>> found = softmax_top_k(jnp.array([[0.0, 2.0, 1.0]]), 2)
    >>> found.chosen, found.kept
    (Array([[1, 2]], dtype=int32), Array([[ True,  True]], dtype=bool))
    """
    seen, valid, routed = _usable(logits, valid)
    scores = jax.nn.softmax(seen, axis=-1)
    return _top_k(scores, seen, k, normalize, valid, routed)


def sigmoid_top_k(
    logits: Float[Array, "*b e"], k: int, *, normalize: bool = True, valid: Valid = None
) -> Routing:
    """The k experts of largest affinity, s = sigmoid(logits); see `softmax_top_k`."""
    seen, valid, routed = _usable(logits, valid)
    return _top_k(jax.nn.sigmoid(seen), seen, k, normalize, valid, routed)


def _usable(logits: Array, valid: Valid) -> tuple[Array, Array, Array]:
    """float32 logits with 0 in place of rows that cannot be read; who is a token; who is routed.

    The rows are replaced before anything is computed of them, so that gradients are finite too.
    """
    logits = logits.astype(jnp.float32)
    valid = jnp.ones(logits.shape[:-1], bool) if valid is None else valid
    # -inf excludes an expert; NaN and inf, or -inf for all, say nothing.
    routed = valid & jnp.isfinite(jnp.max(logits, axis=-1))
    return jnp.where(routed[..., None], logits, 0.0), valid, routed


def _top_k(
    scores: Array, logits: Array, k: int, normalize: bool, valid: Array, routed: Array
) -> Routing:
    experts = scores.shape[-1]
    check_k(k, experts)
    top, chosen = rowwise(lambda s: jax.lax.top_k(s, k), scores, row_names(scores.ndim))
    if normalize:
        top = top / jnp.maximum(jnp.sum(top, axis=-1, keepdims=True), TINY)
    log_norm = jnp.where(routed, jax.nn.logsumexp(logits, axis=-1), 0.0)
    scores = jnp.where(routed[..., None], scores, 0.0)
    kept = routed[..., None] & jnp.isfinite(jnp.take_along_axis(logits, chosen, axis=-1))
    return _routing(chosen, top, scores, kept, valid, log_norm)


def _routing(
    chosen: Array,
    weight: Array,
    scores: Array,
    kept: Array,
    valid: Array,
    log_norm: Array | None = None,
) -> Routing:
    """A Routing in which what is not kept is no choice and weighs nothing."""
    kept = jnp.broadcast_to(kept, chosen.shape)
    return Routing(
        jnp.where(kept, chosen, scores.shape[-1]).astype(jnp.int32),
        jnp.where(kept, weight, 0.0).astype(jnp.float32),
        scores,
        kept,
        valid,
        jnp.zeros(valid.shape, jnp.float32) if log_norm is None else log_norm,
    )


def expert_choice(
    logits: Float[Array, "*b t e"], capacity: int, *, valid: Bool[Array, "*b t"] | None = None
) -> Routing:
    """Each expert takes the `capacity` tokens of largest probability (arXiv 2202.09368).

    A token may have any number of experts, none included: k is e here, choice j is expert j. What
    becomes of a token depends on later ones, so a decoder that is trained so cannot generate.

    Args:
      logits: [*b, t, e]; tokens of one t compete.
      capacity: tokens of an expert, >= 1; where there are fewer, it takes all.
      valid: [*b, t], False for padding, which no expert takes.
    Raises:
      ConfigError: capacity below 1.
    """
    _check_capacity(capacity)
    seen, valid, routed = _usable(logits, valid)
    scores = jnp.where(routed[..., None], jax.nn.softmax(seen, axis=-1), 0.0)
    offered = jnp.swapaxes(jnp.where(routed[..., None], scores, -1.0), -1, -2)
    most = min(capacity, offered.shape[-1])

    def largest(offered: Array) -> Array:
        kept, taken = jnp.zeros(offered.shape, bool), jax.lax.top_k(offered, most)[1]
        return jnp.put_along_axis(kept, taken, True, axis=-1, inplace=False)

    kept = rowwise(largest, offered, ("batch", *(None,) * (offered.ndim - 1)))
    kept = jnp.swapaxes(kept, -1, -2) & routed[..., None]
    chosen = jnp.broadcast_to(jnp.arange(scores.shape[-1]), scores.shape)
    log_norm = jnp.where(routed, jax.nn.logsumexp(seen, axis=-1), 0.0)
    return _routing(chosen, scores, scores, kept, valid, log_norm)


def fixed(choice: Int[Array, "*b"], experts: int, *, valid: Valid = None) -> Routing:
    """One expert each, of weight 1, as told; a number that no expert has chooses nothing.

    >>> fixed(jnp.array([1, 7]), 2).kept
    Array([[ True],
           [False]], dtype=bool)
    """
    check_k(1, experts)
    valid = jnp.ones(choice.shape, bool) if valid is None else valid
    kept = valid & (choice >= 0) & (choice < experts)
    scores = jnp.where(kept[..., None], jax.nn.one_hot(choice, experts), 0.0)
    one = jnp.ones((*choice.shape, 1), jnp.float32)
    return _routing(choice[..., None], one, scores, kept[..., None], valid)


def by_modality(facts: TokenFacts | None, experts: int) -> Routing:
    """Expert m for tokens of modality m.

    Raises:
      ConfigError: the modality of tokens is not known.
    """
    if facts is None or facts.modality is None:
        raise ConfigError(
            "tokens have no modality; give facts=TokenFacts(modality=...), [b, t] int"
        )
    return fixed(facts.modality, experts, valid=facts.valid)


def by_hash(
    tokens: Int[Array, "*b"], experts: int, *, salt: int = 0, valid: Valid = None
) -> Routing:
    """One expert each by a hash of the token's id (hash layers, arXiv 2106.04426).

    Args:
      tokens: ids.
      experts: how many, >= 1.
      salt: tells the hashes of several layers apart.
      valid: False for padding.
    """
    x = tokens.astype(jnp.uint32) + jnp.uint32((salt * 0x9E3779B9) % 2**32)
    for multiplier in (0x7FEB352D, 0x846CA68B):  # every bit of the id reaches every bit of x
        x = (x ^ (x >> 16)) * jnp.uint32(multiplier)
    x = x ^ (x >> 16)
    return fixed((x % jnp.uint32(experts)).astype(jnp.int32), experts, valid=valid)


def random(
    key: Key[Array, ""],
    shape: tuple[int, ...],
    experts: int,
    k: int = 1,
    *,
    shares: Sequence[float] | None = None,
    valid: Valid = None,
) -> Routing:
    """k different experts each, drawn anew for every token, of weight 1 / k.

    Args:
      key: of the draw.
      shape: of the tokens, [*b].
      experts, k: 1 <= k <= experts.
      shares: [experts] how often each is drawn, >= 0 with a positive sum; all alike when None.
      valid: [*b], False for padding.
    Raises:
      ConfigError: k or shares out of range.
    """
    check_k(k, experts)
    p = np.ones(experts) if shares is None else np.asarray(shares, np.float64)
    if p.shape != (experts,) or not np.isfinite(p).all() or (p < 0).any() or (p > 0).sum() < k:
        raise ConfigError(
            f"shares={shares}: {experts} numbers >= 0 are accepted, {k} or more of them positive"
        )
    p = jnp.asarray(p / p.sum(), jnp.float32)
    noisy = jnp.log(p) + jax.random.gumbel(key, (*shape, experts))
    chosen = rowwise(lambda x: jax.lax.top_k(x, k)[1], noisy, row_names(noisy.ndim))
    valid = jnp.ones(shape, bool) if valid is None else valid
    scores = jnp.where(valid[..., None], p, 0.0)
    weight = jnp.full(chosen.shape, 1.0 / k)
    return _routing(chosen, weight, scores, valid[..., None], valid)


def thinned(
    routing: Routing,
    policy: str,
    *,
    threshold: float = 0.2,
    key: Key[Array, ""] | None = None,
) -> Routing:
    """A routing without some of the choices after each token's first (GShard, section 2.2).

    Args:
      policy: which of them stay: "all", "none", "threshold" (those of larger weight), or "random"
        (each with probability weight / threshold).
      threshold: > 0.
      key: for "random" and only for it.
    Raises:
      ConfigError: unknown policy, threshold <= 0, or a key too few or too many.
    """
    if policy not in POLICIES:
        raise ConfigError(f"policy={policy!r} is not 'all', 'none', 'threshold' or 'random'")
    if not threshold > 0:
        raise ConfigError(f"threshold={threshold} must be positive")
    if (key is not None) != (policy == "random"):
        raise ConfigError(f"policy={policy!r}: a key belongs to 'random' and only to it")
    later = routing.weight[..., 1:]
    if policy == "all":
        return routing
    if policy == "none":
        stays = jnp.zeros(later.shape, bool)
    elif policy == "threshold":
        stays = later > threshold
    else:
        stays = jax.random.uniform(key, later.shape) < later / threshold
    first = jnp.ones((*later.shape[:-1], 1), bool)
    return _without(routing, jnp.concatenate([first, stays], axis=-1))


def straight(routing: Routing) -> Routing:
    """The routing with weights of 1 that learn as their scores do: w / stop_gradient(w).

    >>> straight(softmax_top_k(jnp.zeros((1, 2)), 1, normalize=False)).weight
    Array([[1.]], dtype=float32)
    """
    fixed = jax.lax.stop_gradient(jnp.where(routing.kept, routing.weight, 1.0))
    return routing._replace(weight=routing.weight / jnp.maximum(fixed, TINY))


def _without(routing: Routing, stays: Bool[Array, "*b k"]) -> Routing:
    """The choice is still told of what is dropped: losses count what was asked for."""
    kept = routing.kept & stays
    return routing._replace(kept=kept, weight=jnp.where(kept, routing.weight, 0.0))


def capacity_of(tokens: int, experts: int, factor: float, *, least: int = 1) -> int:
    """How many tokens an expert takes: factor * tokens / experts, rounded down, >= least.

    Args:
      tokens: in one queue, padding included, since shapes do not know of it.
      experts: how many share them.
      factor: capacity factor, > 0.
      least: GShard and its descendants have 4.
    Raises:
      ConfigError: factor <= 0.

    >>> capacity_of(64, 8, 1.25), capacity_of(8, 8, 1.25, least=4)
    (10, 4)
    """
    if not (factor > 0 and math.isfinite(factor)):
        raise ConfigError(f"factor={factor} must be a positive number")
    return max(least, min(tokens, int(tokens * factor / experts)))


def limited(
    routing: Routing,
    capacity: int,
    *,
    drop: str = "last",
    key: Key[Array, ""] | None = None,
) -> Routing:
    """A routing in which no expert has more than `capacity` tokens of each queue.

    The tokens of axis t are a queue, first choices before second ones. Flatten the tokens of a
    batch first where all are to share one.

    Args:
      routing: shapes [*b, t, ...].
      capacity: tokens of an expert, >= 1.
      drop: who is dropped of equal choices: the "last" to come, a "random" one, or the "lightest".
      key: for "random" and only for it.
    Raises:
      ConfigError: capacity below 1, an unknown policy, or a key too few or too many.
    """
    _check_capacity(capacity)
    if drop not in DROPS:
        raise ConfigError(f"drop={drop!r} is not 'last', 'random' or 'lightest'")
    if (key is not None) != (drop == "random"):
        raise ConfigError(f"drop={drop!r}: a key belongs to 'random' and only to it")
    turned = lambda x: jnp.swapaxes(x, -1, -2)  # noqa: E731 - choices before tokens
    chosen = turned(jnp.where(routing.kept, routing.chosen, routing.experts))
    if drop == "last":
        order = jnp.broadcast_to(jnp.arange(chosen.shape[-1]), chosen.shape)
    elif drop == "random":
        order = jnp.argsort(jax.random.uniform(key, chosen.shape), axis=-1)
    else:
        order = jnp.argsort(turned(routing.weight), axis=-1, descending=True, stable=True)
    queued = jnp.take_along_axis(chosen, order, axis=-1)
    joined = queued.reshape(*queued.shape[:-2], -1)
    asks = joined[..., None] == jnp.arange(routing.experts)
    before = jnp.cumsum(asks, axis=-2, dtype=jnp.int32) - asks
    stays = jnp.any(asks & (before < capacity), axis=-1).reshape(queued.shape)
    stays = jnp.put_along_axis(jnp.zeros_like(stays), order, stays, axis=-1, inplace=False)
    return _without(routing, turned(stays))


def _check_capacity(capacity: int) -> None:
    if capacity < 1:
        raise ConfigError(f"capacity={capacity}: tokens of an expert, 1 or more, are accepted")
