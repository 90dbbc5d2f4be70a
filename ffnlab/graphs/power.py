"""Powers of the links of cell-free networks, the rates they give, and what to beat.

    rho_lk: power of point l for user k, mW, 0 where it does not serve k;  beta: gains over noise
    n: antennas of a point;  M_k: the points that serve k

Points transmit by maximum ratio with long-term normalization and perfect knowledge of channels. The
use-and-then-forget bound of the rates is closed:

    rate_k = log2(1 + (sum over l in M_k of sqrt(rho_lk n beta_lk))^2
                      / (sum over i and l in M_i of rho_li beta_lk + 1))

The double sum holds the user's own uncertainty of gain too, at i = k. `fractional` splits the power
of a point by gains to an exponent, 0 being equal parts; `ascended` climbs the sum of rates, for
each network by itself. `powers` makes rho of one logit for each link, with a slack of logit 0, so
that the limit of a point holds whatever the logits are.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ffnlab.errors import ConfigError, is_known
from ffnlab.graphs.ascent import ascend
from ffnlab.graphs.channels import LIMIT
from ffnlab.graphs.precoding import Host, Number

__all__ = ["ascended", "cell_free_rates", "check_links", "fractional", "powers"]


def check_links(
    gains: Float[Host, "*b l k"], served: Bool[Host, "*b l k"], antennas: Number
) -> tuple[Array, Array, Array]:
    """(gains, served, antennas) as arrays.

    Raises:
      ConfigError: gains that are negative or not finite, antennas below 1, a link that is not there
        and serves, or a user that no point serves.
    """
    gains, served = jnp.asarray(gains), jnp.asarray(served)
    if gains.ndim < 2 or gains.shape != served.shape:
        raise ConfigError(f"gains {list(gains.shape)}, served {list(served.shape)}: [b, l, k] each")
    if is_known(gains, served):
        there, serves = np.asarray(gains) > 0, np.asarray(served)
        if not np.isfinite(gains).all() or np.min(gains) < 0:
            raise ConfigError(
                "gains must be finite and not negative; 0 is a link that is not there"
            )
        if (serves & ~there).any():
            raise ConfigError("served: a link serves whose gain is 0, which is not there")
        alone = there.any(-2) & ~serves.any(-2)
        if alone.any():
            where = np.argwhere(alone)[0].tolist()
            raise ConfigError(f"served: user {where} is served by no point; one at least is needed")
    if is_known(antennas) and np.min(antennas) < 1:
        raise ConfigError(f"antennas={antennas} must be at least 1")
    return gains, served, jnp.broadcast_to(jnp.asarray(antennas, gains.dtype), gains.shape[:-2])


@jax.jit
def cell_free_rates(
    rho: Float[Array, "*b l k"],
    gains: Float[Array, "*b l k"],
    antennas: Number,
) -> Float[Array, "*b k"]:
    """Rates of the closed bound, bit per use of the channel; 0 for absent users.

    Args:
      rho: powers, mW.
      gains: over the noise, per mW.
      antennas: of every point, [*b] or one for all.
    """
    power = rho * gains
    # sqrt has no slope at 0, where links do not serve.
    amplitude = jnp.where(power > 0, jnp.sqrt(jnp.where(power > 0, power, 1)), 0).sum(-2)
    signal = jnp.asarray(antennas)[..., None] * amplitude**2
    loud = (rho.sum(-1, keepdims=True) * gains).sum(-2)
    return jnp.log2(1 + signal / (loud + 1))


def powers(
    logits: Float[Array, "*b l k"], served: Bool[Array, "*b l k"], *, limit: float | Array = LIMIT
) -> Float[Array, "*b l k"]:
    """A softmax over what a point serves and a slack, times its limit; exactly 0 for other links.

    >>> powers(jnp.zeros((1, 2)), jnp.array([[True, False]]), limit=2.0).tolist()
    [[1.0, 0.0]]
    """
    slack = jnp.zeros((*logits.shape[:-1], 1), logits.dtype)
    kept = jnp.where(served, logits, -jnp.inf)
    return limit * jax.nn.softmax(jnp.concatenate([kept, slack], -1), axis=-1)[..., :-1]


def fractional(
    gains: Float[Host, "*b l k"],
    served: Bool[Host, "*b l k"],
    *,
    exponent: float = 0.0,
    limit: float = LIMIT,
) -> Float[Array, "*b l k"]:
    """All power of a point, split by gain^exponent over what it serves; 0 gives equal parts.

    >>> fractional(jnp.array([[4.0, 1.0]]), jnp.array([[True, True]]), exponent=0.5, limit=3.0)
    Array([[2., 1.]], dtype=float32)
    """
    gains, served, _ = check_links(gains, served, 1.0)
    share = jnp.where(served, jnp.where(served, gains, 1) ** exponent, 0)
    total = share.sum(-1, keepdims=True)
    return limit * share / jnp.where(total > 0, total, 1)


def ascended(
    gains: Float[Host, "*b l k"],
    served: Bool[Host, "*b l k"],
    antennas: Number,
    *,
    steps: int = 300,
    rate: float = 0.1,
    limit: float = LIMIT,
) -> Float[Array, "*b l k"]:
    """The oracle: Adam climbs the sum of rates by the logits of `powers`, from zeros.

    Args:
      gains, served, antennas: see `cell_free_rates`.
      steps, rate: of Adam.
      limit: of a point, mW.
    Raises:
      ConfigError: as `check_links`.
    """
    return climbed(*check_links(gains, served, antennas), steps, rate, limit)


@functools.partial(jax.jit, static_argnames="steps")
def climbed(
    gains: Array,
    served: Array,
    antennas: Array,
    steps: int,
    rate: float | Array,
    limit: float | Array,
) -> Array:
    """`ascended`, checked."""

    def value(logits: Array) -> Array:
        return cell_free_rates(powers(logits, served, limit=limit), gains, antennas).sum(-1)

    found = ascend(value, jnp.zeros_like(gains), steps=steps, rate=rate)
    return powers(found, served, limit=limit)
