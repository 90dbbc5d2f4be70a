"""Precoding and power allocation by one homogeneous network.

A Homogeneous Graph Neural Network for Precoding and Power Allocation in Scalable Wireless Networks
(ICGNN, 2024; arXiv 2408.17252). The network (`ffnlab.models.ICGNN`) is the same class for both, on
nodes of one kind; what it learns by is the rate itself, without examples.

Precoding: nodes are users, [log |h_k|^2, log(P / s2)]; edges carry how alike two channels are,
c_kj = |h_k^H h_j|^2 / (|h_k|^2 |h_j|^2) and log(c_kj + 1e-4). It gives two numbers of each user,
p and q = P softmax over users, and `precoding.structured` makes V of them. All of it depends on
H H^H alone: channels may be turned by any unitary matrix, and N need not be known.

Power: nodes are links of a point and a user, [log10(beta) / 2, served, log2(n) / 4], which see
links of the same point and links of the same user. It gives a logit of each (`power.powers`).

Neither a number of users nor one of points or antennas is in the network. Arrays are padded and
masked, so one program serves networks of all sizes up to theirs.

Only the abstract was to be had, and no code. What is here is a design that fits it: the features,
widths, the loss, and the draws of `ffnlab.graphs.channels` are not the authors'.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float

from ffnlab.errors import ConfigError, at_least
from ffnlab.graphs.channels import LIMIT, CellFree, Cellular
from ffnlab.graphs.power import cell_free_rates, check_links, powers
from ffnlab.graphs.precoding import Host, Number, check_channels, gram_of, gram_rates, structured
from ffnlab.models import ICGNN, ICGNNConfig

__all__ = [
    "POWER",
    "PRECODING",
    "allocate",
    "link_features",
    "power_loss",
    "precode",
    "precoding_loss",
    "shares",
    "user_features",
]

PRECODING = ICGNNConfig(nodes=2, outputs=2, edges=2)
POWER = ICGNNConfig(nodes=3, outputs=1, axes=2, layers=3)
Metrics = dict[str, Float[Array, ""]]


def user_features(
    gram: Complex[Array, "b k k"], valid: Bool[Array, "b k"], snr: Float[Array, "b"]
) -> dict[str, Array]:
    """What the network is called with of users, by the names of its arguments.

    Args:
      gram: H H^H.
      valid: whether a user is there.
      snr: power over noise.
    Returns:
      nodes [b, k, 2], valid, edges [b, k, k, 2]; zeros for absent users.
    """
    square = jnp.where(valid, jnp.diagonal(gram, axis1=-2, axis2=-1).real, 1)
    told = jnp.broadcast_to(jnp.log(snr)[:, None], square.shape)
    nodes = jnp.where(valid[..., None], jnp.stack([jnp.log(square), told], -1), 0)
    alike = jnp.abs(gram) ** 2 / (square[:, :, None] * square[:, None])
    both = (valid[:, :, None] & valid[:, None])[..., None]
    edges = jnp.where(both, jnp.stack([alike, jnp.log(alike + 1e-4)], -1), 0)
    return {"nodes": nodes, "valid": valid, "edges": edges}


def shares(
    outputs: Float[Array, "b k 2"], valid: Bool[Array, "b k"]
) -> tuple[Float[Array, "b k"], Float[Array, "b k"]]:
    """The parts of p and of q that are each user's; exactly 0 for absent ones."""
    kept = jnp.where(valid[..., None], outputs.astype(jnp.float32), -jnp.inf)
    both = jax.nn.softmax(kept, axis=1)
    return both[..., 0], both[..., 1]


def precoding_loss(model: ICGNN, batch: Cellular) -> tuple[Float[Array, ""], Metrics]:
    """Minus the mean rate of a user, of the precoders that the network drives.

    Args:
      model: of `PRECODING`, of any width and depth.
      batch: channels; the noise is 1 and the power snr.
    Returns:
      (loss, {"rate": mean sum of rates}).
    """
    h, valid, snr = map(jnp.asarray, batch)
    gram = gram_of(h)
    p, q = (snr[:, None] * part for part in shares(model(**user_features(gram, valid, snr)), valid))
    total = gram_rates(gram, p, q, 1.0).sum(-1)
    return -jnp.mean(total / valid.sum(-1)), {"rate": total.mean()}


def precode(
    model: ICGNN,
    h: Complex[Host, "b k n"],
    power: Number,
    noise: Number,
    *,
    valid: Bool[Host, "b k"] | None = None,
    steps: int | None = None,
) -> tuple[Complex[Array, "b n k"], Float[Array, "b k"], Float[Array, "b k"]]:
    """Precoders of channels.

    Args:
      model: of `PRECODING`, trained by `precoding_loss`.
      h: rows h_k^H.
      power, noise: P and s2, [b] or one for all.
      valid: whether a user is there; all when None.
      steps: of conjugate gradients; as many as rows of h when None, which are exact.
    Returns:
      (V, p, q): the columns v_k, and the powers that they were made of, each adding up to P.
    Raises:
      ConfigError: as `precoding.check_channels`, steps below 1, or a network of other features.
    """
    at_least(1, steps=steps)
    check_network(model.config, PRECODING)
    h, power, noise, there = check_channels(h, power, noise, valid)
    return driven(model, h, power, noise, there, steps)


@functools.partial(jax.jit, static_argnames="steps")
def driven(
    model: ICGNN, h: Array, power: Array, noise: Array, there: Array, steps: int | None
) -> tuple[Array, Array, Array]:
    """`precode`, checked."""
    given = user_features(gram_of(h), there, power / noise)
    p, q = (power[:, None] * part for part in shares(model(**given), there))
    return structured(h, p, q, noise, steps=steps), p, q


def link_features(
    gains: Float[Array, "b l k"], served: Bool[Array, "b l k"], antennas: Float[Array, "b"]
) -> dict[str, Array]:
    """What the network is called with of links, by the names of its arguments.

    Args:
      gains: over the noise, per mW; 0 for absent links.
      served: whether a point serves a user.
      antennas: of every point.
    Returns:
      nodes [b, l, k, 3], valid [b, l, k].
    """
    there = gains > 0
    size = jnp.broadcast_to(jnp.log2(antennas)[:, None, None] / 4, gains.shape)
    parts = (jnp.log10(jnp.where(there, gains, 1)) / 2, served.astype(gains.dtype), size)
    return {"nodes": jnp.where(there[..., None], jnp.stack(parts, -1), 0), "valid": there}


def power_loss(model: ICGNN, batch: CellFree) -> tuple[Float[Array, ""], Metrics]:
    """Minus the mean rate of a user, of the powers that the network gives.

    Args:
      model: of `POWER`, of any width and depth.
      batch: networks.
    Returns:
      (loss, {"rate": mean sum of rates}).
    """
    rho = given_powers(model, *batch)
    total = cell_free_rates(rho, batch.gains, batch.antennas).sum(-1)
    users = jnp.any(jnp.asarray(batch.gains) > 0, axis=1).sum(-1)
    return -jnp.mean(total / users), {"rate": total.mean()}


def allocate(
    model: ICGNN,
    gains: Float[Host, "b l k"],
    served: Bool[Host, "b l k"],
    antennas: Number,
    *,
    limit: float = LIMIT,
) -> Float[Array, "b l k"]:
    """Powers of the links of cell-free networks, mW.

    Args:
      model: of `POWER`, trained by `power_loss`.
      gains, served, antennas: as `link_features`; antennas [b] or one for all.
      limit: of a point.
    Returns:
      rho: at most the limit in all for each point, exactly 0 where it does not serve.
    Raises:
      ConfigError: as `power.check_links`, or a network of other features.
    """
    check_network(model.config, POWER)
    return given_powers(model, *check_links(gains, served, antennas), limit)


@jax.jit
def given_powers(
    model: ICGNN, gains: Array, served: Array, antennas: Array, limit: float | Array = LIMIT
) -> Array:
    """`allocate`, checked."""
    logits = model(**link_features(gains, served, antennas))[..., 0]
    return powers(logits.astype(jnp.float32), served, limit=limit)


def check_network(found: ICGNNConfig, wanted: ICGNNConfig) -> None:
    """Raises ConfigError unless a network takes and gives as many numbers as another."""
    names = ("nodes", "edges", "axes", "outputs")
    given, accepted = ({name: getattr(each, name) for name in names} for each in (found, wanted))
    if given != accepted:
        raise ConfigError(f"model: a network of {given}; {accepted} is accepted")
