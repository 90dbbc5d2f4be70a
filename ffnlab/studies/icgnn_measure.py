"""What the study of homogeneous networks measures: trained networks beside baselines, by size.

Everything is padded to the largest size, so that each method is one program for all of them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from ffnlab.clock import compiled, in_turns
from ffnlab.graphs import (
    POWER,
    PRECODING,
    CellFree,
    CellFreeBatches,
    Cellular,
    CellularBatches,
    allocate,
    ascended,
    cell_free,
    cell_free_rates,
    cellular,
    conjugate_gradients,
    fractional,
    mrt,
    power_loss,
    precode,
    precoding_loss,
    rates,
    rzf,
    wmmse,
    zf,
)
from ffnlab.graphs.channels import LIMIT
from ffnlab.graphs.icgnn import driven
from ffnlab.graphs.precoding import climbed, gram_of, inverted
from ffnlab.learning import backprop, members
from ffnlab.models import ICGNN, ICGNNConfig
from ffnlab.studies.side_by_side import learned_members

__all__ = [
    "CELLS",
    "FREE",
    "RISING",
    "Cell",
    "Free",
    "Settings",
    "Solved",
    "Symmetry",
    "cells",
    "free",
    "learn",
    "limits",
    "rho_of",
    "seconds",
    "solved",
    "symmetry",
]

CELLS = ((4, 8), (6, 8), (8, 8), (8, 16), (12, 16))  # (users, antennas); the first two are seen
WIDE = (12, 16)
FREE = ((16, 6, 6, 4), (24, 8, 6, 4), (30, 12, 10, 2), (16, 6, 16, 4))  # the first is seen
WIDE_FREE = (30, 12)
EXPONENTS = (0.5, 1.0)
DRAW = 1_000_000  # of test channels; no seed of training begins there
STEPS = tuple(range(9))  # of conjugate gradients, for errors
RISING = (1, 2, 4, 8)  # and for rates

Rates = Mapping[str, Sequence[float]]  # mean sum of rates by method; of the network, by seed


class Settings(NamedTuple):
    """What is run.

    Attributes:
      seeds: of networks.
      steps: of training, for precoding and for power.
      channels, networks: that are tested, of each size.
      climb: steps of the oracle of powers.
    """

    seeds: tuple[int, ...]
    steps: tuple[int, int]
    channels: int
    networks: int
    climb: int


class Cell(NamedTuple):
    """Rates of precoders of one size, or at one power.

    Attributes:
      users, antennas, db: what it is.
      rates: by method.
    """

    users: int
    antennas: int
    db: float
    rates: Rates


class Free(NamedTuple):
    """Rates of powers of one size.

    Attributes:
      size: (points, users, serving, antennas).
      rates: by method.
    """

    size: tuple[int, int, int, int]
    rates: Rates


class Solved(NamedTuple):
    """Conjugate gradients of 8 users, and what their truncation costs.

    Attributes:
      error: the largest from a dense solve, over the largest of that, after 8 steps, float64.
      norms: mean over channels of the error's norm of A over that at the start, by steps from 0.
      falls: whether it falls in every step of every channel.
      rates: mean sum of rates of the first network after `RISING` steps.
    """

    error: float
    norms: Sequence[float]
    falls: bool
    rates: Sequence[float]


class Symmetry(NamedTuple):
    """How far a network is from its symmetries, by seed: the largest of p and q over the power.

    Attributes:
      renumbered: of users renumbered.
      turned: of antennas turned by a unitary matrix, and of the sum of rates, relative.
    """

    renumbered: Sequence[float]
    turned: Sequence[float]


def learn(
    config: ICGNNConfig,
    loss: Callable,
    batches: Callable[[int], PyTree],
    rate: float,
    seeds: Sequence[int],
    steps: int,
) -> list[ICGNN]:
    """Networks that learned by Adam, one for each seed; batches are shared."""
    rule = members(lambda: backprop(loss, optax.adam(rate)), len(seeds))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    nets = jax.vmap(lambda key: config.make(key=key))(keys)
    return learned_members(rule, nets, batches, steps, seeds[0], len(seeds))


def learned_precoders(settings: Settings) -> list[ICGNN]:
    """As on the card: 4 and 6 users, 8 antennas, 5 to 15 dB."""
    seeds, (steps, _) = settings.seeds, settings.steps
    return learn(PRECODING, precoding_loss, CellularBatches(seed=seeds[0]), 2e-3, seeds, steps)


def learned_powers(settings: Settings) -> list[ICGNN]:
    """As on the card: three sizes in turns."""
    seeds, (_, steps) = settings.seeds, settings.steps
    return learn(POWER, power_loss, CellFreeBatches(seed=seeds[0]), 1e-3, seeds, steps)


def drawn_cell(users: int, antennas: int, channels: int) -> tuple[Array, Array]:
    """(h, valid) of test channels in arrays of the largest size."""
    case: Cellular = cellular((DRAW, users, antennas), channels, (users,), antennas)
    k, n = WIDE
    h = np.pad(case.h, ((0, 0), (0, k - users), (0, n - antennas)))
    return jnp.asarray(h), jnp.asarray(np.pad(case.valid, ((0, 0), (0, k - users))))


def cell(nets: Sequence[ICGNN], users: int, antennas: int, db: float, settings: Settings) -> Cell:
    """All methods on channels of one size."""
    h, valid = drawn_cell(users, antennas, settings.channels)
    power = np.full(len(h), 10 ** (db / 10), np.float32)
    total = lambda v: float(rates(h, v, 1.0).sum(-1).mean())  # noqa: E731
    found: dict[str, Sequence[float]] = {
        "MRT": [total(mrt(h, power, valid=valid))],
        "ZF": [total(zf(h, power, valid=valid))],
        "RZF": [total(rzf(h, power, 1.0, valid=valid))],
        "WMMSE": [total(wmmse(h, power, 1.0, valid=valid))],
        "ICGNN": [total(precode(net, h, power, 1.0, valid=valid)[0]) for net in nets],
    }
    return Cell(users, antennas, db, found)


def cells(nets: Sequence[ICGNN], settings: Settings, levels: Sequence[float]) -> list[Cell]:
    """Every size at 10 dB, and 8 users of 8 antennas at other powers."""
    sizes = [cell(nets, *size, 10.0, settings) for size in CELLS]
    return sizes + [cell(nets, 8, 8, db, settings) for db in levels]


def drawn_free(size: tuple[int, int, int, int], networks: int) -> CellFree:
    """Test networks of one size in arrays of the largest."""
    return cell_free((DRAW, *size), networks, *size, padded=WIDE_FREE)


def rho_of(net: ICGNN, case: CellFree, climb: int) -> dict[str, Array]:
    """Powers of every method."""
    splits = {f"gain^{e:g}": fractional(*case[:2], exponent=e) for e in EXPONENTS}
    own = {"ICGNN": allocate(net, *case), "oracle": ascended(*case, steps=climb)}
    return {"equal": fractional(*case[:2])} | splits | own


def free(nets: Sequence[ICGNN], settings: Settings) -> list[Free]:
    """All methods on networks of every size."""
    found = []
    for size in FREE:
        case = drawn_free(size, settings.networks)
        total = functools.partial(mean_rate, case)
        values: dict[str, Sequence[float]] = {
            name: [total(rho)] for name, rho in rho_of(nets[0], case, settings.climb).items()
        }
        values["ICGNN"] = [total(allocate(net, *case)) for net in nets]
        found.append(Free(size, values))
    return found


def mean_rate(case: CellFree, rho: Array) -> float:
    """Mean over networks of the sum of rates."""
    return float(cell_free_rates(rho, case.gains, case.antennas).sum(-1).mean())


def solved(net: ICGNN, channels: int) -> Solved:
    """Conjugate gradients on (S G S + s2) X = S at 10 dB, q equal; 8 users, 8 antennas."""
    case = cellular((DRAW, 8, 8, 8), channels, (8,), 8)
    with jax.enable_x64(True):
        h = jnp.asarray(case.h, jnp.complex128)
        a = 10 / 8 * gram_of(h) + jnp.eye(8)
        b = jnp.broadcast_to(jnp.eye(8, dtype=a.dtype) * (10 / 8) ** 0.5, a.shape)
        exact = jnp.linalg.solve(a, b)
        run = lambda steps: jax.vmap(  # noqa: E731
            lambda a, b: conjugate_gradients(lambda x: a @ x, b, steps=steps)
        )
        found = [run(steps)(a, b) for steps in STEPS]
        apart = jnp.stack(found) - exact
        norms = jnp.einsum("sbkj,bkl,sblj->sb", apart.conj(), a, apart).real
        error = float(jnp.abs(apart[-1]).max() / jnp.abs(exact).max())
        share = np.sqrt(np.maximum(np.asarray(norms / norms[0]), 0))
    value = lambda steps: rates(case.h, precode(net, case.h, 10.0, 1.0, steps=steps)[0], 1.0)  # noqa: E731
    by_steps = [float(value(steps).sum(-1).mean()) for steps in RISING]
    falls = bool((np.diff(share, axis=0) < 0).all())
    return Solved(error, share.mean(1).tolist(), falls, by_steps)


def symmetry(nets: Sequence[ICGNN], channels: int) -> Symmetry:
    """Users renumbered, and antennas turned, of 6 users and 8 antennas at 10 dB."""
    h = cellular((DRAW, 6, 8, 6), channels, (6,), 8).h
    random = np.random.default_rng(0)
    order = random.permutation(6)
    turn = np.linalg.qr(random.standard_normal((8, 8)) + 1j * random.standard_normal((8, 8)))[0]
    there = h @ turn.astype(np.complex64)
    renumbered, turned = [], []
    for net in nets:
        v, *powers = precode(net, h, 10.0, 1.0)
        _, *moved = precode(net, h[:, order], 10.0, 1.0)
        other, *same = precode(net, there, 10.0, 1.0)
        apart = [jnp.abs(p[:, order] - q) for p, q in zip(powers, moved, strict=True)]
        renumbered.append(float(jnp.stack(apart).max()) / 10)
        own, also = rates(h, v, 1.0).sum(-1), rates(there, other, 1.0).sum(-1)
        shift = jnp.stack([jnp.abs(p - q) for p, q in zip(powers, same, strict=True)])
        turned.append(max(float(shift.max()) / 10, float(jnp.abs(also / own - 1).max())))
    return Symmetry(renumbered, turned)


def limits(precoders: Sequence[ICGNN], powers: Sequence[ICGNN], settings: Settings) -> list[float]:
    """By seed: the most by which a limit of power is passed, relative; 1 where a link that does not
    serve has any power."""
    found = []
    h, valid = drawn_cell(*WIDE, settings.channels)
    for one, other in zip(precoders, powers, strict=True):
        v, *_ = precode(one, h, 10.0, 1.0, valid=valid)
        over = [float((jnp.abs(v) ** 2).sum((1, 2)).max()) / 10 - 1]
        for size in FREE:
            case = drawn_free(size, settings.networks)
            rho = np.asarray(allocate(other, *case))
            over.append(float(rho.sum(-1).max()) / LIMIT - 1)
            over.append(1.0 if rho[~np.asarray(case.served)].any() else 0.0)
        found.append(max(over))
    return found


def seconds(net: ICGNN, channels: int, turns: int) -> dict[str, float]:
    """Seconds for so many channels of 8 users and 8 antennas at 10 dB, compiled, in turns."""
    h = jnp.asarray(cellular((DRAW, 8, 8), channels, (8,), 8).h)
    power, noise = jnp.full(channels, 10.0), jnp.ones(channels)
    there = jnp.ones(h.shape[:2], bool)
    calls = {
        "ICGNN": compiled(lambda *given: driven(*given, None)[0], net, h, power, noise, there),
        "RZF": compiled(inverted, h, power, 8 * noise / power, there),
        "WMMSE": compiled(lambda *given: climbed(*given, 1000, 1e-5), h, power, noise, there),
        "WMMSE, 50 rounds": compiled(
            lambda *given: climbed(*given, 50, -jnp.inf), h, power, noise, there
        ),
    }
    times = in_turns(calls, turns)
    return {name: times.of(name).median for name in calls} | {
        "over": times.over("ICGNN", "WMMSE, 50 rounds").median
    }
