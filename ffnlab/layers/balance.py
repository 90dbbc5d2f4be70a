"""Losses and counts of a `Routing`: how even it is, how sure, and how dear.

Shapes are [*n, b, t, ...] as a model reports them, [b, t, ...] of one layer or [m, ...] of tokens
in a row. Means are over tokens: padding has no part in them, and a batch of nothing else has a loss
of 0. A routing made without `valid` counts every row, as the published code of Switch and GShard
does.
"""

from collections.abc import Sequence
from math import inf

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ffnlab.errors import ConfigError, is_known
from ffnlab.layers.routers import Routing

__all__ = [
    "budget_loss",
    "counts",
    "entropy",
    "load_balance",
    "specialization",
    "unrouted",
    "upkeep",
    "z_loss",
]


def load_balance(
    routing: Routing, *, choices: int | None = None, per_sequence: bool = False
) -> Float[Array, ""]:
    """e * sum_i f_i p_i: 1 where tokens are spread evenly, e where all go to one expert.

    f_i is the share of choices that ask for expert i, dropped ones too and without a gradient; p_i
    is the mean of a token's scores over their sum (Switch, arXiv 2101.03961, eq. 4-6; DeepSeek-V3,
    arXiv 2412.19437, eq. 17-20, where scores are sigmoids).

    Args:
      routing: of the tokens.
      choices: how many of a token's choices f counts; all when None, GShard counts 1.
      per_sequence: f and p are means over the tokens of a sequence, as GShard's are, instead of all
        of a layer.
    Returns:
      the mean over layers, and over sequences.
    Raises:
      ConfigError: choices outside 1..k.
    """
    k = routing.chosen.shape[-1]
    choices = k if choices is None else choices
    if not 1 <= choices <= k:
        raise ConfigError(f"choices={choices}: 1..{k} are accepted")
    axes = (-2,) if per_sequence or routing.valid.ndim < 2 else (-3, -2)
    asked = jax.nn.one_hot(routing.chosen[..., :choices], routing.experts).sum(-2)
    f = jax.lax.stop_gradient(asked.sum(axes))
    f = f / _at_least_one(f.sum(-1, keepdims=True))
    tokens = _routed(routing)[..., None].sum(axes)
    p = _shares(routing).sum(axes) / _at_least_one(tokens)
    each = routing.experts * jnp.sum(f * p, axis=-1)
    return jnp.sum(each) / _at_least_one(jnp.sum(tokens > 0))


def z_loss(routing: Routing) -> Float[Array, ""]:
    """Mean over tokens and layers of log(sum exp(logits))^2 (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return _mean(routing.log_norm**2, _routed(routing))


def entropy(routing: Routing) -> Float[Array, ""]:
    """Mean over tokens and layers of -sum_i p_i log p_i, nats: log e where all are alike.

    p_i are a token's scores over their sum.
    """
    p = _shares(routing)
    logs = jnp.log(jnp.where(p > 0, p, 1.0))  # p log p is 0 at 0, with a finite gradient
    return _mean(-jnp.sum(p * logs, axis=-1), _routed(routing))


def specialization(
    routing: Routing,
    *,
    balance: float | Float[Array, ""] = 1e-2,
    certainty: float | Float[Array, ""] = 1e-3,
) -> Float[Array, ""]:
    """balance * sum_i f_i p_i + certainty * entropy (LoRA-Mixer, arXiv 2507.00029).

    Args:
      routing: of the tokens.
      balance: >= 0, spreads all tokens over the experts.
      certainty: > 0 makes each token sure of few, which is what the paper says it does, < 0 of
        many, which is what its formula does.
    Raises:
      ConfigError: a balance below 0, or a weight that is not finite.
    """
    if is_known(balance, certainty) and not (0 <= balance < inf and abs(certainty) < inf):
        raise ConfigError(f"balance={balance}, certainty={certainty}: >= 0, and any, both finite")
    return balance * load_balance(routing) / routing.experts + certainty * entropy(routing)


def budget_loss(
    routing: Routing, costs: Float[Array, "e"], budget: float | Float[Array, ""]
) -> Float[Array, ""]:
    """(mean cost - budget)^2, of the mean over layers and tokens of a sequence (Duo-LLM, arXiv
    2410.10846): layers may differ, their sum may not.

    Args:
      routing: shapes [*n, b, t, ...].
      costs: of each branch, [1, 0] for a share of big ones.
      budget: the mean cost asked for, within those of the branches.
    Returns:
      the mean over sequences.
    Raises:
      ConfigError: costs of another number of branches, or tokens without an axis of sequences.
    """
    if costs.shape != (routing.experts,):
        raise ConfigError(f"costs has shape {costs.shape}, there are {routing.experts} branches")
    if routing.valid.ndim < 2:
        raise ConfigError("routing is of tokens [m]; a budget is kept by each sequence of [b, t]")
    axes = (*range(routing.valid.ndim - 2), -1)
    routed = _routed(routing)
    tokens = routed.sum(axes)
    mean = (routing.scores @ costs).sum(axes) / _at_least_one(tokens)
    return _mean((mean - budget) ** 2, tokens > 0)


def counts(routing: Routing, *, dropped: bool = False) -> Int[Array, "*n e"]:
    """How many choices each expert has, by layer.

    Args:
      routing: shapes [*n, b, t, ...] or [m, ...].
      dropped: count what was asked for, else what was kept.
    """
    chosen = routing.chosen
    chosen = chosen if dropped else jnp.where(routing.kept, chosen, routing.experts)
    asked = chosen[..., None] == jnp.arange(routing.experts)
    axes = (-3, -2) if routing.valid.ndim < 2 else (-4, -3, -2)
    return asked.sum(axes, dtype=jnp.int32)


def unrouted(routing: Routing) -> Int[Array, ""]:
    """How many tokens have no expert: their scores held a NaN, or no expert has their number."""
    return jnp.sum(routing.valid & ~_routed(routing), dtype=jnp.int32)


def upkeep(
    routings: Sequence[Routing], *, choices: int | None = None, per_sequence: bool = False
) -> dict[str, Float[Array, ""]]:
    """What keeps routers in order, over all routings that a model reports.

    Args:
      routings: one or more, as they are reported.
      choices, per_sequence: see `load_balance`.
    Returns:
      {"balance": mean load balance, "z": mean z-loss, "unrouted": share of tokens that chose
      nothing}.
    Raises:
      ConfigError: there is none.
    """
    if not routings:
        raise ConfigError("model reports no routing; one with mixtures of experts is accepted")
    even = [load_balance(r, choices=choices, per_sequence=per_sequence) for r in routings]
    lost = jnp.mean(jnp.stack([unrouted(r) / _at_least_one(r.valid.sum()) for r in routings]))
    large = jnp.mean(jnp.stack([z_loss(r) for r in routings]))
    return {"balance": jnp.mean(jnp.stack(even)), "z": large, "unrouted": lost}


def _routed(routing: Routing) -> Array:
    """[*b] which tokens chose something, whether it was kept or dropped."""
    return routing.valid & jnp.any(routing.chosen < routing.experts, axis=-1)


def _shares(routing: Routing) -> Array:
    """[*b e] scores that add up to 1; 0 where a token chose nothing."""
    total = routing.scores.sum(-1, keepdims=True)
    return routing.scores / jnp.where(total > 0, total, 1.0)


def _at_least_one(n: Array) -> Array:
    return jnp.maximum(n.astype(jnp.float32), 1.0)


def _mean(x: Array, where: Array) -> Array:
    return jnp.sum(jnp.where(where, x, 0.0)) / _at_least_one(jnp.sum(where))
