"""Precoders of one transmitter for many users: baselines, and what a network drives.

    H: [k, n], rows h_k^H;  V: [n, k], columns v_k;  P: power, sum |v_k|^2 <= P;  s2: noise
    SINR_k = |h_k^H v_k|^2 / (sum over j != k of |h_k^H v_j|^2 + s2),   rate_k = log2(1 + SINR_k)

MRT, ZF and RZF give every user P / K along H^H, H^H G^-1 and H^H (G + K s2 / P)^-1, G = H H^H.
WMMSE (Shi et al. 2011) climbs to a stationary point of the sum of rates. It is taken in the form
without a search for a multiplier (Zhao et al. 2022, "Rethinking WMMSE"): as more power for all
never hurts, s2 may be s2 / P sum |v|^2 and V be scaled once in the end; and as V = H^H X, all of it
is K x K. The best V have the form (Björnson et al. 2014)

    v_k = sqrt(p_k) d_k / |d_k|,   d_k = (s2 + sum_j q_j h_j h_j^H)^-1 h_k,   sum p = sum q = P

`structured` makes V of p and q, with d by conjugate gradients over users, not antennas:
(S G S + s2) X = S^-1 with S = diag sqrt q, and D = H^H S X. `ascent.ascended_precoder` searches p
and q.

Everything takes a batch of channels, is jitted, and knows absent users by a mask: no power is
theirs. Steps of conjugate gradients must grow with K and the power: two of them lose a quarter of
the rate at 10 dB.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float

from ffnlab.errors import ConfigError, at_least, is_known
from ffnlab.graphs.conjugate import conjugate_gradients

__all__ = [
    "check_channels",
    "gram_of",
    "gram_rates",
    "mrt",
    "rates",
    "rzf",
    "structured",
    "wmmse",
    "zf",
]

Host = Array | np.ndarray
Number = Float[Host, "*#b"] | float
TOLERANCE, MOST = 1e-5, 1000  # of WMMSE: relative gain of a round, rounds


def check_channels(
    h: Complex[Host, "*b k n"], power: Number, noise: Number, valid: Bool[Host, "*b k"] | None
) -> tuple[Array, Array, Array, Array]:
    """(h, power, noise, valid) as arrays, with zero rows for absent users.

    What is traced is not looked at but for its shape.

    Raises:
      ConfigError: a power or a noise that is not positive, a user that is there without a channel,
        values that are not finite, no user at all.
    """
    h = jnp.asarray(h)
    there = jnp.ones(h.shape[:-1], bool) if valid is None else jnp.asarray(valid)
    if h.ndim < 2 or there.shape != h.shape[:-1] or not jnp.issubdtype(h.dtype, jnp.inexact):
        raise ConfigError(f"h is {h.dtype}{list(h.shape)}, valid {list(there.shape)}: [b, k, n]")
    if is_known(h, there):
        if not np.isfinite(h).all():
            raise ConfigError("h is not finite")
        lost = np.asarray(there & ~(h != 0).any(-1))
        if lost.any():
            raise ConfigError(
                f"h{np.argwhere(lost)[0].tolist()} is a row of zeros, a user without a channel; "
                "leave it out by valid"
            )
        if not np.asarray(there).any(-1).all():
            raise ConfigError("valid: a channel has no user at all")
    for name, value in (("power", power), ("noise", noise)):
        if is_known(value) and not (np.isfinite(value).all() and np.min(value) > 0):
            raise ConfigError(f"{name}={value} must be positive")
    power, noise = (
        jnp.broadcast_to(jnp.asarray(x, jnp.float32), h.shape[:-2]) for x in (power, noise)
    )
    return jnp.where(there[..., None], h, 0), power, noise, there


def gram_of(h: Complex[Array, "*b k n"]) -> Complex[Array, "*b k k"]:
    """H H^H."""
    return jnp.einsum("...kn,...jn->...kj", h, h.conj())


@jax.jit
def rates(
    h: Complex[Array, "*b k n"], v: Complex[Array, "*b n k"], noise: Number
) -> Float[Array, "*b k"]:
    """Of every user, bit per use of the channel.

    Args:
      h: rows h_k^H.
      v: columns v_k.
      noise: s2, [*b] or one for all.
    """
    return heard(jnp.abs(h @ v) ** 2, noise)


def heard(gains: Float[Array, "*b k k"], noise: Number) -> Float[Array, "*b k"]:
    """log2(1 + SINR) of |h_k^H v_j|^2."""
    own = jnp.diagonal(gains, axis1=-2, axis2=-1)
    others = jnp.where(jnp.eye(own.shape[-1], dtype=bool), 0, gains).sum(-1)
    return jnp.log2(1 + own / (others + jnp.asarray(noise)[..., None]))


def mrt(
    h: Complex[Host, "*b k n"], power: Number, *, valid: Bool[Host, "*b k"] | None = None
) -> Complex[Array, "*b n k"]:
    """Maximum-ratio transmission: v_k along h_k, equal powers.

    Args:
      h: rows h_k^H.
      power: P, [*b] or one for all.
      valid: whether a user is there; all when None.
    Returns:
      V; columns of absent users are zero.
    Raises:
      ConfigError: as `check_channels`.
    """
    h, power, _, there = check_channels(h, power, 1.0, valid)
    return equal(hermitian(h), power, there)


def zf(
    h: Complex[Host, "*b k n"], power: Number, *, valid: Bool[Host, "*b k"] | None = None
) -> Complex[Array, "*b n k"]:
    """Zero forcing: no user hears what is for another; equal powers. Arguments as `mrt`.

    Raises:
      ConfigError: as `check_channels`, or more users than antennas.
    """
    h, power, _, there = check_channels(h, power, 1.0, valid)
    users = h.shape[-2] if not is_known(there) else int(there.sum(-1).max())
    if users > h.shape[-1]:
        raise ConfigError(
            f"h has {users} users and {h.shape[-1]} antennas: zero forcing needs an antenna for "
            "each; use rzf"
        )
    return inverted(h, power, jnp.zeros_like(power), there)


def rzf(
    h: Complex[Host, "*b k n"],
    power: Number,
    noise: Number,
    *,
    valid: Bool[Host, "*b k"] | None = None,
) -> Complex[Array, "*b n k"]:
    """Regularized zero forcing, H^H (G + K s2 / P)^-1, equal powers. Arguments as `wmmse`."""
    h, power, noise, there = check_channels(h, power, noise, valid)
    return inverted(h, power, there.sum(-1) * noise / power, there)


@jax.jit
def inverted(h: Array, power: Array, ridge: Array, there: Array) -> Array:
    """H^H (G + ridge)^-1 with equal powers; absent users are rows of the identity."""
    return equal(hermitian(h) @ ridged(gram_of(h), ridge, there), power, there)


def ridged(gram: Array, ridge: Array, there: Array) -> Array:
    """(G + ridge)^-1, and 0 for absent users."""
    size = gram.shape[-1]
    diagonal = jnp.where(there, ridge[..., None], 1)
    eye = jnp.broadcast_to(jnp.eye(size, dtype=gram.dtype), gram.shape)
    found = jnp.linalg.solve(gram + diagonal[..., None] * eye, eye)
    return jnp.where(there[..., None, :], found, 0)


def hermitian(a: Complex[Array, "*b k n"]) -> Complex[Array, "*b n k"]:
    """A^H."""
    return jnp.swapaxes(a, -1, -2).conj()


@jax.jit
def equal(directions: Array, power: Array, there: Array) -> Array:
    """Columns of the directions, each with P / K; nothing for absent users."""
    length = jnp.linalg.norm(directions, axis=-2)
    each = jnp.sqrt(power / there.sum(-1))[..., None]
    scale = jnp.where(there, each / jnp.where(length > 0, length, 1), 0)
    return directions * scale[..., None, :]


def wmmse(
    h: Complex[Host, "*b k n"],
    power: Number,
    noise: Number,
    *,
    valid: Bool[Host, "*b k"] | None = None,
    rounds: int = MOST,
    tolerance: float = TOLERANCE,
) -> Complex[Array, "*b n k"]:
    """Weighted minimum mean square error, from RZF until no channel gains any more.

    Args:
      h: rows h_k^H.
      power, noise: P and s2, [*b] or one for all.
      valid: whether a user is there; all when None.
      rounds: at most.
      tolerance: relative gain of the sum of rates in a round, below which a channel is done; all
        are gone on with until the last one is; -inf for all rounds.
    Returns:
      V; columns of absent users are zero.
    Raises:
      ConfigError: as `check_channels`, or fewer rounds than 0.
    """
    at_least(0, rounds=rounds)
    h, power, noise, there = check_channels(h, power, noise, valid)
    return climbed(h, power, noise, there, rounds, tolerance)


@functools.partial(jax.jit, static_argnames="rounds")
def climbed(
    h: Array, power: Array, noise: Array, there: Array, rounds: int, tolerance: float | Array
) -> Array:
    """`wmmse`, checked."""
    gram, level = gram_of(h), noise / power
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    start = ridged(gram, there.sum(-1) * level, there)
    length = jnp.sqrt(jnp.maximum(lengths(start, gram @ start), 1e-30))
    start = jnp.where(there[..., None, :], start / length[..., None, :], 0)

    def one(carry: tuple) -> tuple:
        x, before, _, i = carry
        t = gram @ x
        noisy = level * lengths(x, t).sum(-1)
        own = jnp.diagonal(t, axis1=-2, axis2=-1)
        total = (jnp.abs(t) ** 2).sum(-1) + noisy[..., None]
        u = own / total
        weight = 1 / jnp.maximum(1 - (own.conj() * u).real, 1e-7)
        d = weight * jnp.abs(u) ** 2
        mu = level * d.sum(-1)
        left = d[..., None] * gram + mu[..., None, None] * eye
        new = jnp.linalg.solve(left, (weight * u)[..., None] * eye)
        found = jnp.log2(weight).sum(-1)  # the rates of x
        return new, found, jnp.any(found - before > tolerance * found), i + 1

    def goes_on(carry: tuple) -> Array:
        return carry[2] & (carry[3] < rounds)

    none = jnp.full(level.shape, -jnp.inf, level.dtype)
    x = jax.lax.while_loop(goes_on, one, (start, none, jnp.bool_(True), 0))[0]
    v = hermitian(h) @ x
    size = jnp.sqrt(power / (jnp.abs(v) ** 2).sum((-1, -2)))
    return v * size[..., None, None]


def lengths(x: Complex[Array, "*b k j"], t: Complex[Array, "*b k j"]) -> Float[Array, "*b j"]:
    """|H^H x|^2 of every column, t being G x."""
    return (x.conj() * t).real.sum(-2)


def structured(
    h: Complex[Array, "*b k n"],
    p: Float[Array, "*b k"],
    q: Float[Array, "*b k"],
    noise: Number,
    *,
    steps: int | None = None,
) -> Complex[Array, "*b n k"]:
    """V of the powers p and q, without an inverse.

    Args:
      h: rows h_k^H; those of absent users zero.
      p, q: down and (virtual) up; 0 for absent users.
      noise: s2, [*b] or one for all.
      steps: of conjugate gradients; as many as users when None, which are exact.
    """
    d = hermitian(h) @ user_space(gram_of(h), q, noise, steps)
    square = (jnp.abs(d) ** 2).sum(-2)  # of d as it is, rounding included: the limit holds
    return d * scaling(square, p)[..., None, :]


def gram_rates(
    gram: Complex[Array, "*b k k"],
    p: Float[Array, "*b k"],
    q: Float[Array, "*b k"],
    noise: Number,
    *,
    steps: int | None = None,
) -> Float[Array, "*b k"]:
    """Rates of what `structured` makes, of H H^H alone; arguments as there."""
    y = user_space(gram, q, noise, steps)
    t = gram @ y
    return heard(jnp.abs(t * scaling(lengths(y, t), p)[..., None, :]) ** 2, noise)


def user_space(gram: Array, q: Array, noise: Number, steps: int | None) -> Array:
    """Y = S X, of which D = H^H Y."""
    users = gram.shape[-1]
    # Not 0, so that each column can be divided by its own: directions are of one size.
    root = jnp.sqrt(jnp.maximum(q, 1e-12 * q.sum(-1, keepdims=True)))
    inner = root[..., :, None] * gram * root[..., None, :]
    left = inner + jnp.asarray(noise)[..., None, None] * jnp.eye(users, dtype=gram.dtype)
    right = jnp.eye(users, dtype=gram.dtype) / root[..., None]
    flat = (a.reshape(-1, users, users) for a in (left, right))
    solve = lambda a, b: conjugate_gradients(  # noqa: E731
        lambda x: a @ x, b, steps=users if steps is None else steps
    )
    return root[..., None] * jax.vmap(solve)(*flat).reshape(gram.shape)


def scaling(square: Array, p: Array) -> Array:
    """sqrt(p_k) / |d_k| of |d_k|^2; 0 where there is no d_k."""
    is_there = (square > 0) & (p > 0)
    size = jnp.where(is_there, p, 1) / jnp.where(is_there, square, 1)
    return jnp.where(is_there, jnp.sqrt(size), 0)
