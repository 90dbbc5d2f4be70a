"""Channels of wireless networks, drawn: what `ffnlab.graphs.icgnn` learns from and is judged on.

Cellular: K users with one antenna each, a transmitter with N; entries of H are CN(0, 1).

Cell-free: L access points of n antennas and K users in a square of 1 km that is wrapped at its
edges, 10 m apart in height. Of a link at distance d the mean gain is

    beta_dB = -30.5 - 36.7 log10(d / 1 m) + N(0, 4^2)      over a noise of -94 dBm

and a user is served by its M strongest points. Gains are in units of the noise per mW, so that
powers are in mW and the noise is 1. Smaller networks are padded: absent users have zero rows and a
mask, absent links a gain of 0, so that one program serves networks of all sizes.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Complex, Float

from ffnlab.errors import ConfigError, at_least, check_seed

__all__ = [
    "LIMIT",
    "CellFree",
    "CellFreeBatches",
    "Cellular",
    "CellularBatches",
    "cell_free",
    "cellular",
]

Host = Array | np.ndarray
LIMIT = 200.0  # mW of an access point
SIDE, HEIGHT, NOISE, SHADOW = 1000.0, 10.0, -94.0, 4.0  # m, m, dBm, dB


class Cellular(NamedTuple):
    """Channels of one transmitter to its users.

    Attributes:
      h: rows h_k^H, [b, k, n] complex64; zero for absent users.
      valid: [b, k], whether a user is there.
      snr: power over noise, [b], linear.
    """

    h: Complex[Host, "b k n"]
    valid: Bool[Host, "b k"]
    snr: Float[Host, "b"]


class CellFree(NamedTuple):
    """Mean gains of the links of cell-free networks.

    Attributes:
      gains: [b, l, k] float32, over the noise, per mW; 0 where a point or a user is absent.
      served: [b, l, k], whether a point serves a user.
      antennas: of every point of a network, [b] float32.
    """

    gains: Float[Host, "b l k"]
    served: Bool[Host, "b l k"]
    antennas: Float[Host, "b"]


def cellular(
    seed: int | Sequence[int],
    channels: int,
    users: Sequence[int],
    antennas: int,
    *,
    snr_db: tuple[float, float] = (10.0, 10.0),
) -> Cellular:
    """Rayleigh channels.

    Args:
      seed: of the draw.
      channels: how many (b).
      users: numbers of users (K), drawn among these for each channel; the largest is k.
      antennas: N, which is n.
      snr_db: ends of the power over noise in dB, drawn uniformly for each channel.
    Raises:
      ConfigError: a size below 1, or ends that are not ordered.

    >>> found = cellular(0, 3, (2, 4), 8)
    >>> found.h.shape, found.valid.sum(1).tolist()
    ((3, 4, 8), [4, 4, 4])
    """
    at_least(1, channels=channels, antennas=antennas, users=min(users, default=0))
    if not snr_db[0] <= snr_db[1]:
        raise ConfigError(f"snr_db={snr_db} must be a lower and an upper end")
    random = np.random.default_rng(seed)
    count = random.choice(np.asarray(users), channels)
    snr = 10 ** (random.uniform(*snr_db, channels) / 10)
    parts = random.standard_normal((2, channels, max(users), antennas), np.float32)
    valid = np.arange(max(users)) < count[:, None]
    h = (parts[0] + 1j * parts[1]) * np.float32(0.5**0.5) * valid[..., None]
    return Cellular(h.astype(np.complex64), valid, snr.astype(np.float32))


def cell_free(
    seed: int | Sequence[int],
    networks: int,
    points: int,
    users: int,
    serving: int,
    antennas: int,
    *,
    padded: tuple[int, int] | None = None,
) -> CellFree:
    """Cell-free networks of one size.

    Args:
      seed: of the draw.
      networks: how many (b).
      points, users: L and K.
      serving: M, strongest points that serve a user, at most L.
      antennas: of every point.
      padded: (l, k) of the arrays; (points, users) when None.
    Raises:
      ConfigError: a size below 1, more serving points than there are, or arrays too small.

    >>> found = cell_free(0, 2, 4, 3, 2, 1, padded=(5, 3))
    >>> found.served.sum(1).tolist(), float(found.gains[:, 4].max())
    ([[2, 2, 2], [2, 2, 2]], 0.0)
    """
    at_least(1, networks=networks, points=points, users=users, serving=serving, antennas=antennas)
    rows, columns = (points, users) if padded is None else padded
    if serving > points or rows < points or columns < users:
        raise ConfigError(
            f"points={points}, users={users}, serving={serving}, padded={padded}: at most as many "
            "serving points as there are, and arrays that hold all, are accepted"
        )
    random = np.random.default_rng(seed)
    places = [random.uniform(0, SIDE, (networks, count, 2)) for count in (points, users)]
    apart = np.abs(places[0][:, :, None] - places[1][:, None])
    flat = np.minimum(apart, SIDE - apart)
    distance = np.sqrt((flat**2).sum(-1) + HEIGHT**2)
    db = -30.5 - 36.7 * np.log10(distance) + random.normal(0, SHADOW, distance.shape)
    gains = 10 ** ((db - NOISE) / 10)
    rank = np.argsort(np.argsort(-gains, axis=1), axis=1)
    room = ((0, 0), (0, rows - points), (0, columns - users))
    return CellFree(
        np.pad(gains, room).astype(np.float32),
        np.pad(rank < serving, room),
        np.full(networks, antennas, np.float32),
    )


@dataclasses.dataclass(frozen=True)
class CellularBatches:
    """Batches of `cellular` by position, every one drawn anew.

    Attributes:
      users, antennas, snr_db: as there.
      batch: channels of a batch.
      seed: of all draws.
    """

    users: tuple[int, ...] = (4, 6)
    antennas: int = 8
    snr_db: tuple[float, float] = (5.0, 15.0)
    batch: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        cellular(0, self.batch, self.users, self.antennas, snr_db=self.snr_db)

    def __call__(self, position: int) -> Cellular:
        """The batch of a position."""
        draw = (self.seed, position)
        return cellular(draw, self.batch, self.users, self.antennas, snr_db=self.snr_db)


@dataclasses.dataclass(frozen=True)
class CellFreeBatches:
    """Batches of `cell_free` by position: sizes in turns, in arrays of one size.

    Attributes:
      sizes: (points, users, serving, antennas) each.
      batch: networks of a batch.
      seed: of all draws.
    """

    sizes: tuple[tuple[int, int, int, int], ...] = (
        (16, 6, 6, 4),
        (20, 8, 8, 2),
        (12, 5, 5, 4),
    )
    batch: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not self.sizes or any(len(size) != 4 for size in self.sizes):
            raise ConfigError(
                f"sizes={self.sizes}: one or more of (points, users, serving, antennas)"
            )
        for i in range(len(self.sizes)):
            self(i)

    @property
    def padded(self) -> tuple[int, int]:
        """(points, users) of the arrays."""
        return max(size[0] for size in self.sizes), max(size[1] for size in self.sizes)

    def __call__(self, position: int) -> CellFree:
        """The batch of a position."""
        size = self.sizes[position % len(self.sizes)]
        return cell_free((self.seed, position), self.batch, *size, padded=self.padded)
