"""Gradient noise: an all-zero network that plain SGD cannot move, and one that needs no help.

With every parameter zero the gradient of all but the last bias is zero, and stays so. Noise breaks
that symmetry. The same noise on a network that trains anyway costs accuracy. The paper's headline,
twenty layers, is tried at our budget and reported as found.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ffnlab.data import Labelled, gaussian_clusters
from ffnlab.errors import NumericalError
from ffnlab.files import StrPath
from ffnlab.layers import MLP
from ffnlab.learning import backprop, gradient_noise, labelled
from ffnlab.learning.noise import noise_scale
from ffnlab.studies import STUDIES
from ffnlab.studies.classify import fit
from ffnlab.studies.result import Claim, Result

__all__ = ["Setting", "run"]

WIDTH, BATCH, RATE, CLIP, GAMMA = 50, 100, 0.1, 10.0, 0.55
ETA = 0.3


class Setting(NamedTuple):
    """A network and the noise it is trained with.

    Attributes:
      depth: hidden layers.
      std: of the initial entries.
      eta: variance of the first step's noise.
      epochs: of training.
    """

    depth: int
    std: float
    eta: float
    epochs: int = 15


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    seeds = [seed] if quick else [seed, seed + 1, seed + 2]
    zero = [Setting(d, 0.0, e) for d in ((5,) if quick else (3, 5, 8)) for e in (0.0, ETA)]
    good = [Setting(d, 0.1, e) for d in ((3,) if quick else (3, 5, 8)) for e in (0.0, ETA)]
    deep = [] if quick else [Setting(20, 0.0, e, 20) for e in (0.0, 0.01, ETA)]
    found = {s: [trained(s, n) for n in (seeds[:1] if s in deep else seeds)] for s in zero + good}
    found |= {s: [trained(s, seed)] for s in deep}
    return Result(
        slug="gradient-noise",
        title=STUDIES["gradient-noise"].title,
        settings={
            "data": "gaussian_clusters: 30 centres, 10 classes, width 64, 8000 rows",
            "width": WIDTH,
            "batch": BATCH,
            "optimizer": f"SGD at {RATE}, gradients clipped to {CLIP}",
            "gamma": GAMMA,
            "seeds": seeds,
        },
        seed=seed,
        seconds=time.perf_counter() - begin,
        claims=[*training_claims(found), statistics_claim(seed)],
        table=rows_of(found),
        pictures={"accuracy": lambda figure: bars(figure, found)},
    ).write(out)


def trained(setting: Setting, seed: int) -> float:
    """Test accuracy after training; 0 where the run diverged."""
    data: tuple[Labelled, Labelled] = gaussian_clusters(seed)
    key = jax.random.key(seed)
    sizes = [data[0].x.shape[1], *[WIDTH] * setting.depth, 10]
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP),
        gradient_noise(setting.eta, GAMMA, key=key),
        optax.sgd(RATE),
    )
    steps = setting.epochs * len(data[0].x) // BATCH
    model = MLP(sizes, key=key, std=setting.std)
    try:
        return fit(backprop(labelled, optimizer), model, data, batch=BATCH, steps=steps, seed=seed)
    except NumericalError:
        return 0.0


def training_claims(found: dict[Setting, list[float]]) -> list[Claim]:
    """Where noise helps, and where it does not."""
    stuck, freed = found[Setting(5, 0.0, 0.0)], found[Setting(5, 0.0, ETA)]
    plain, noisy = found[Setting(3, 0.1, 0.0)], found[Setting(3, 0.1, ETA)]
    cost = float(np.mean(plain) - np.mean(noisy))
    claims = [
        Claim(
            "noise lets a badly initialised deep network train",
            "20 layers, all zero, MNIST: fails without noise, trains with it",
            f"5 layers, all zero: {spread(stuck)} without, {spread(freed)} with eta {ETA}",
            max(stuck) <= 0.15 and min(freed) >= 0.9,
            f"test accuracy at most .15 without and at least .90 with noise, {len(freed)} seed(s)",
        ),
        Claim(
            "a network that trains anyway loses little",
            "-",
            f"3 layers, std .1: {spread(plain)} without, {spread(noisy)} with eta {ETA}",
            cost <= 0.04,
            "mean test accuracy at most .04 lower",
        ),
    ]
    deep = {s: a for s, a in found.items() if s.depth == 20 and s.eta}
    if deep:
        best = max(max(accuracies) for accuracies in deep.values())
        claims.append(
            Claim(
                "twenty layers at zero train with noise",
                "MNIST test accuracy 94.5 % instead of 11.4 %",
                f"best {best:.3f} over eta {', '.join(str(s.eta) for s in deep)}, 20 epochs",
                best >= 0.5,
                "test accuracy at least .5; the paper trains far longer",
            )
        )
    return claims


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
    )


def spread(values: Sequence[float]) -> str:
    """Accuracies in words: one, or the range."""
    low, high = min(values), max(values)
    return f"{low:.3f}" if len(values) == 1 else f"{low:.3f} to {high:.3f}"


def rows_of(found: dict[Setting, list[float]]) -> list[dict[str, object]]:
    """Mean and range of accuracies by setting."""
    return [
        {
            "hidden layers": s.depth,
            "initial std": s.std,
            "eta": s.eta,
            "epochs": s.epochs,
            "accuracy": float(np.mean(values)),
            "lowest": min(values),
            "highest": max(values),
        }
        for s, values in found.items()
    ]


def bars(figure, found: dict[Setting, list[float]]) -> None:
    """Accuracy without and with noise, by network."""
    axes = figure.subplots()
    groups = list(dict.fromkeys((s.depth, s.std) for s in found))
    etas = sorted({s.eta for s in found})
    width = 0.8 / len(etas)
    for i, eta in enumerate(etas):
        chosen = {(s.depth, s.std): v for s, v in found.items() if s.eta == eta}
        shift = (i - (len(etas) - 1) / 2) * width
        places = [g + shift for g, at in enumerate(groups) if at in chosen]
        values = [np.mean(v) for v in chosen.values()]
        label = "without noise" if not eta else f"eta {eta}"
        color = "0.6" if not eta else f"C{i - 1}"
        drawn = axes.bar(places, values, 0.95 * width, label=label, color=color)
        axes.bar_label(drawn, fmt="%.2f", fontsize=8)
    names = [f"{d} layers\n{'all zero' if not std else f'std {std}'}" for d, std in groups]
    axes.set_xticks(range(len(groups)), names)
    axes.axhline(0.1, color="0.8", linewidth=1, zorder=0)
    axes.set_ylim(0, 1.15)
    axes.set_ylabel("test accuracy")
    axes.set_title("Noise frees networks that start at zero, and costs the others a little")
    axes.legend(frameon=False, loc="upper right", ncols=len(etas))
    axes.spines[["top", "right"]].set_visible(False)
