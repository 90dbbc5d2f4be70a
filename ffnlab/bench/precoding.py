"""Precoders by a homogeneous network beside WMMSE in NumPy: many channels at once.

The peer is WMMSE as `ffnlab.graphs.wmmse` does it, of all channels in one batch, for a number of
rounds: products and solutions of [channels, users, users]. So that it is no straw man, its rates
are held against those of ours after as many rounds, else there are no figures. Both sides are given
channels and give precoders; the network's weights are drawn, which changes no time. They take
turns; a ratio is the median of the turns' ratios.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex

from ffnlab.bench.turns import Comparison, Task
from ffnlab.clock import timed
from ffnlab.errors import FFNLabError, at_least
from ffnlab.graphs import PRECODING, cellular, precode, rates, wmmse

__all__ = ["Settings", "compare", "numpy_wmmse", "ratios"]

POWER = 10.0  # over the noise, 10 dB
TOLERANCE = 1e-3  # of the mean rate, relative: complex64 in another order, over all rounds


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      channels: at once.
      users, antennas: of each.
      rounds: of WMMSE.
      turns: times that both sides run, after one to warm up.
    """

    channels: int = 1000
    users: int = 8
    antennas: int = 8
    rounds: int = 50
    turns: int = 15

    def __post_init__(self) -> None:
        at_least(1, **dataclasses.asdict(self))


def numpy_wmmse(
    h: Complex[np.ndarray, "b k n"], power: float, rounds: int
) -> Complex[np.ndarray, "b n k"]:
    """Precoders after so many rounds from RZF, the noise being 1; see `ffnlab.graphs.precoding`.

    Args:
      h: rows h_k^H.
      power: P.
      rounds: how many.
    """
    users, level = h.shape[1], 1 / power
    back, eye = h.conj().swapaxes(1, 2), np.eye(h.shape[1], dtype=h.dtype)
    gram = h @ back
    x = np.linalg.inv(gram + users * level * eye)
    size = (x.conj() * (gram @ x)).real.sum(1)
    x = x / np.sqrt(size)[:, None]
    for _ in range(rounds):
        t = gram @ x
        own = np.diagonal(t, axis1=1, axis2=2)
        noise = level * (x.conj() * t).real.sum((1, 2))
        u = own / ((np.abs(t) ** 2).sum(2) + noise[:, None])
        weight = 1 / (1 - (own.conj() * u).real)
        d = weight * np.abs(u) ** 2
        mu = level * d.sum(1)
        left = d[..., None] * gram + mu[:, None, None] * eye
        x = np.linalg.solve(left, (weight * u)[..., None] * eye)
    v = back @ x
    return v * np.sqrt(power / (np.abs(v) ** 2).sum((1, 2)))[:, None, None]


def compare(settings: Settings = Settings()) -> Comparison:
    """Measures both sides.

    Args:
      settings: sizes and turns.
    Returns:
      the task "precoders".
    Raises:
      FFNLabError: WMMSE in NumPy has other rates than ours.
    """
    s = settings
    net = PRECODING.make(key=jax.random.key(0))
    h = np.asarray(cellular(0, s.channels, (s.users,), s.antennas).h)
    placed = jnp.asarray(h)

    def ours() -> Array:
        return precode(net, placed, POWER, 1.0)[0]

    def theirs() -> np.ndarray:
        return numpy_wmmse(h, POWER, s.rounds)

    jax.block_until_ready(ours())
    here = wmmse(placed, POWER, 1.0, rounds=s.rounds, tolerance=-np.inf)
    reached = [float(rates(placed, jnp.asarray(v), 1.0).sum(-1).mean()) for v in (here, theirs())]
    difference = abs(reached[1] / reached[0] - 1)
    if not difference <= TOLERANCE:
        raise FFNLabError(f"precoders: the two sides' WMMSE differ by {difference:.1e} of the rate")
    seconds = [(timed(ours), timed(theirs)) for _ in range(s.turns)]
    form = f"WMMSE, {s.rounds} rounds"
    about = f"jax {jax.__version__}; NumPy {np.__version__}; {s.channels} channels"
    task = Task.of(seconds, difference, form)
    return Comparison("precoders by a network beside WMMSE in NumPy", {"precoders": task}, about)


def ratios() -> dict[str, float]:
    """How many times faster the network is."""
    return compare().ratios()
