"""Gradient noise: all-zero networks that plain SGD cannot move, and some that need no help.

With every parameter zero the gradient of all but the last bias is zero, and stays so. Noise breaks
that symmetry. The same noise on networks that train anyway costs accuracy. SGD without noise tries
as many settings as SGD with it. The paper's headline, twenty layers, is tried at our budget and
reported as found.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from ffnlab.layers import MLP
from ffnlab.learning import BackpropState, backprop, gradient_noise, labelled
from ffnlab.learning.optimizers.noise import noise_scale
from ffnlab.rule import Rule
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES, tuning
from ffnlab.studies.classify import CLUSTERS, at_rate, clusters, grouped_bars, paced
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.tuning import Found, Side, Splits

__all__ = ["Network", "run"]

WIDTH, BATCH, CLIP, GAMMA = 50, 100, 10.0, 0.55
ETA = 0.3
RATES = (0.01, 0.03, 0.1, 0.3)
PLAIN, NOISY, STRONG = "no noise", "noise", f"noise, eta {ETA}"
GRIDS = {
    PLAIN: tuning.grid(eta=(0.0,), rate=RATES),
    NOISY: tuning.grid(eta=(0.01, ETA), rate=(0.03, 0.1)),
    STRONG: tuning.grid(eta=(ETA,), rate=RATES),
}
EPOCHS = 15


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and for how long it is trained.

    Attributes:
      depth: hidden layers.
      std: of the initial entries.
      epochs: of training.
    """

    depth: int
    std: float
    epochs: int = EPOCHS

    @property
    def name(self) -> str:
        """In the results."""
        return f"{self.depth} layers, {f'std {self.std}' if self.std else 'all zero'}"


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    seeds = [seed] if quick else [seed, seed + 1, seed + 2]
    data = tuning.splits(clusters(seed))
    zero = [Network(d, 0.0) for d in ((5,) if quick else (3, 5, 8))]
    good = [Network(d, 0.1) for d in ((3,) if quick else (3, 5, 8))]
    deep = [] if quick else [Network(20, 0.0, 20)]
    rule = functools.cache(rule_of)
    found = [
        {net.name: tuning.compare(sides(net, rule, data, quick), data, seeds) for net in nets}
        for nets in (zero, good, deep)
    ]
    every: Found = {name: reached for part in found for name, reached in part.items()}
    return Result(
        slug="gradient-noise",
        title=STUDIES["gradient-noise"].title,
        settings={
            "data": CLUSTERS,
            "width": WIDTH,
            "batch": BATCH,
            "epochs": {net.name: net.epochs for net in (*zero, *good, *deep)},
            "optimizer": f"SGD, gradients clipped to {CLIP}, then noise",
            "gamma": GAMMA,
            "validation": tuning.trials(every),
            "seeds": seeds,
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[*training_claims(*found), statistics_claim(seed)],
        table=tuning.table(every),
        pictures={"accuracy": lambda figure: bars(figure, every)},
    ).write(out)


def rule_of(eta: float) -> Rule:
    """SGD on clipped gradients with noise, at rate 1; its noise is drawn by the key of `init`."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP),
        gradient_noise(eta, GAMMA, key=jax.random.key(0)),
        paced(optax.sgd(1.0)),
    )
    rule = backprop(labelled, optimizer)

    def init(model: PyTree, key: Array) -> BackpropState:
        state = rule.init(model, key)
        drawn = optax.tree.set(state.optimizer, key=jax.random.fold_in(key, 1))
        return state._replace(optimizer=drawn)

    return dataclasses.replace(rule, init=init)


def sides(net: Network, rule: Callable[[float], Rule], data: Splits, quick: bool) -> list[Side]:
    """Without noise, with noise, and with noise that frees zero networks; half of each if quick."""
    sizes = [data.train.x.shape[1], *[WIDTH] * net.depth, 10]
    steps = net.epochs * len(data.train.x) // BATCH
    start = lambda seed: MLP(sizes, key=jax.random.key(seed), std=net.std)  # noqa: E731
    return [
        Side(
            name,
            tried[1:3] if quick else tried,
            lambda setting: at_rate(rule(setting["eta"]), setting["rate"]),
            start,
            BATCH,
            steps,
        )
        for name, tried in GRIDS.items()
    ]


def training_claims(zero: Found, good: Found, deep: Found) -> list[Claim]:
    """Where noise helps, and where it does not.

    Args:
      zero, good: networks that start at zero, and at random; one or more.
      deep: the deepest, at zero; may be empty.
    """
    claims = [
        freed_claim(zero, 0.9, "noise lets an all-zero network train"),
        cost_claim(good, NOISY, "the eta chosen on validation rows too"),
        cost_claim(good, STRONG, f"eta {ETA}, by which networks at zero are freed"),
    ]
    if deep:
        claims.append(freed_claim(deep, 0.5, "noise lets twenty layers at zero train"))
    return claims


def freed_claim(found: Found, least: float, claim: str) -> Claim:
    """Whether networks at zero train with noise alone."""
    return tuning.tuned_claim(
        f"{claim} ({'; '.join(found)})",
        "20 layers, all zero, MNIST: 94.5 % instead of 11.4 %, after far more steps",
        f"test accuracy at most .15 without noise and at least {least} with it, for each network "
        "with each seed",
        max(tuning.scores(found, PLAIN)) <= 0.15 and min(tuning.scores(found, NOISY)) >= least,
        found,
        PLAIN,
        NOISY,
    )


def cost_claim(found: Found, name: str, which: str) -> Claim:
    """Whether noise costs little where it is not needed."""
    cost = tuning.deficit(found, name, PLAIN)
    return tuning.tuned_claim(
        f"networks that train anyway ({'; '.join(found)}) lose at most .04 by noise; {which}",
        "-",
        f"test accuracy at most .04 lower, for each network with each seed (most: {cost:.3f})",
        cost <= 0.04,
        found,
        PLAIN,
        name,
    )


def statistics_claim(seed: int) -> Claim:
    """Whether what is added has the variance of the formula."""
    noise = gradient_noise(ETA, GAMMA, key=jax.random.key(seed))
    zero = {"w": jnp.zeros(1_000_000)}
    state, errors, z = noise.init(zero), [], []
    for t in range(3):
        updates, state = noise.update(zero, state)
        added, sigma = np.asarray(jax.tree.leaves(updates)[0]), float(noise_scale(ETA, GAMMA, t))
        errors.append(abs(float(added.var()) / sigma**2 - 1))
        z.append(abs(float(added.mean())) / (sigma / 1000))
    return Claim(
        "the variance at step t is eta / (1 + t)^gamma",
        f"gamma {GAMMA}",
        f"relative error at most {max(errors):.1e}; mean within {max(z):.1f} standard errors of 0",
        max(errors) < 0.01 and max(z) < 4,
        "a million entries at each of three steps",
        seeds=1,
    )


def bars(figure, found: Found) -> None:
    """Accuracy without and with noise, by network."""
    axes = figure.subplots()
    grouped_bars(axes, tuning.values(found))
    axes.axhline(0.1, color="0.8", linewidth=1, zorder=0)
    axes.set_ylim(0, 1.2)
    axes.set_ylabel("test accuracy")
    axes.set_title("SGD without and with noise, each at its best setting by validation")
