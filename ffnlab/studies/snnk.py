"""SNNK: what random features approximate, what they save, and what has a closed form.

Vision transformers on digits get them in place of an FFN's first map, or of both maps bundled into
one, and are trained beside plain networks and beside plain ones as small. MiniLM gets them as
adapters in the full run, where it and the reviews are there.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Float

from ffnlab import transform
from ffnlab.learning import backprop, labelled
from ffnlab.models import ViT, ViTConfig
from ffnlab.rule import Rule
from ffnlab.storage.files import StrPath
from ffnlab.structure.snnk import bundle, snnk
from ffnlab.studies import STUDIES, snnk_polarity, tuning
from ffnlab.studies.classify import at_rate, grouped_bars, paced
from ffnlab.studies.digit_images import DIGITS, digit_images
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.snnk_measure import COUNTS, DAMPINGS, Fit, bias_of, errors, fitted, slope
from ffnlab.studies.snnk_polarity import KERNEL, NETWORK
from ffnlab.studies.tuning import CLOSE, Found, Side, Tuned

__all__ = ["run"]

PLAIN, FIRST, BOTH, NARROW = "plain", "first map", "both maps", "narrow"
WIDTH, HIDDEN, LAYERS, BATCH, STEPS = 64, 256, 3, 64, 400
# Numbers of a fifth: of the first map (64 x 256), and of both.
FIRST_FEATURES, BOTH_FEATURES, NARROW_HIDDEN = 13, 102, 51
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
HALF, ERRORS = 0.1, 3  # of the slope; standard errors of a mean
R2, FLAT = 0.95, 1e-6

Errors = Mapping[tuple[str, bool], Float[np.ndarray, "counts"]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
      draws: of projections, for each error.
      rates: tried for every network.
      steps: of every network.
      seeds: of networks and order of rows.
      adam: steps beside the closed form.
      texts: whether MiniLM is trained, where it is there.
    """

    draws: int
    rates: tuple[float, ...]
    steps: int
    seeds: tuple[int, ...]
    adam: int
    texts: bool


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    sizes = Sizes(100, RATES, STEPS, (seed, seed + 1, seed + 2), 2000, True)
    if quick:
        sizes = Sizes(20, RATES[2:3], 150, (seed,), 500, False)
    wrong = {
        (kind, is_even): errors(kind, orthogonal=is_even, draws=sizes.draws, seed=seed)
        for kind in ("relu", "cos")
        for is_even in (False, True)
    }
    biases = {m: bias_of(m, draws=200, seed=seed) for m in DAMPINGS}
    rates = (1e-2, 3e-2, 1e-1)
    fits = {d: fitted(d, features=256, steps=sizes.adam, rates=rates, seed=seed) for d in (1, 8)}
    found = {"digits": tuning.compare(sides(sizes), digit_images(seed), sizes.seeds)}
    texts: dict[str, Tuned] = {}
    if sizes.texts and snnk_polarity.is_there():
        texts = snnk_polarity.polarity((seed, seed + 1))
    return Result(
        slug="snnk",
        title=STUDIES["snnk"].title,
        settings={
            "data": DIGITS,
            "network": f"ViT of {LAYERS} blocks of width {WIDTH}, hidden layers of {HIDDEN}",
            "optimizer": "AdamW, decay 0.05, a tenth of warm-up, then cosine",
            "batch": BATCH,
            "steps": sizes.steps,
            "draws": sizes.draws,
            "validation": tuning.trials(found | ({"polarity": texts} if texts else {})),
            "seeds": list(sizes.seeds),
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            *kernel_claims(wrong, biases, sizes.draws),
            *closed_claims(fits, sizes.adam),
            *size_claims(found),
            *text_claims(texts),
        ],
        table=tuning.table(found | ({"polarity": texts} if texts else {})),
        pictures={
            "errors": lambda figure: lines(figure, wrong),
            "accuracy": lambda figure: bars(figure, found),
        },
    ).write(out)


def sides(sizes: Sizes) -> list[Side]:
    """The plain network, both uses of random features, and a plain one as small as they are."""

    def side(name: str, start: Any) -> Side:
        rates = tuning.grid(rate=sizes.rates)
        rule = rule_of(sizes.steps)
        return Side(name, rates, lambda s: at_rate(rule, s["rate"]), start, BATCH, sizes.steps)

    return [
        side(PLAIN, functools.partial(plain, HIDDEN)),
        side(FIRST, first_replaced),
        side(BOTH, both_replaced),
        side(NARROW, functools.partial(plain, NARROW_HIDDEN)),
    ]


@functools.cache
def rule_of(steps: int) -> Rule:
    """AdamW at a rate of 1 times a schedule."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)
    return backprop(labelled, paced(optax.adamw(schedule, weight_decay=0.05)))


def plain(hidden: int, seed: int) -> ViT:
    """A plain network."""
    config = ViTConfig((8, 8), 2, WIDTH, hidden, LAYERS, 4, channels=1, classes=10, pool="mean")
    return ViT(config, key=jax.random.key(seed))


def first_replaced(seed: int) -> ViT:
    """The network with features in place of each FFN's first map."""
    change = snnk(features=FIRST_FEATURES, floor=0.0, seed=seed)
    return transform.apply(change, plain(HIDDEN, seed))[0]


def both_replaced(seed: int) -> ViT:
    """The network with one matrix on features in place of each FFN."""
    change = transform.chain(snnk(features=BOTH_FEATURES, floor=0.0, seed=seed), bundle())
    return transform.apply(change, plain(HIDDEN, seed))[0]


def kernel_claims(
    wrong: Errors, biases: Mapping[float, tuple[float, float]], draws: int
) -> list[Claim]:
    """What products of features are, on average and from draw to draw."""
    names = {"relu": "arc-cosine kernel", "cos": "cosine"}
    slopes = {kind: slope(COUNTS, wrong[kind, False]) for kind in names}
    said = "; ".join(
        f"{names[kind]}: slope {slopes[kind]:.3f}, "
        + ", ".join(f"{e:.4f} at {m}" for m, e in zip(COUNTS, wrong[kind, False], strict=True))
        for kind in names
    )
    how = f"64 pairs of unit vectors in 16 dimensions, {draws} draws of independent projections"
    ratios = {kind: wrong[kind, True] / wrong[kind, False] for kind in names}
    worst = max(float(r.max()) for r in ratios.values())
    shares = "; ".join(
        f"{names[kind]}: " + ", ".join(f"{r:.3f}" for r in ratios[kind]) for kind in names
    )
    most = max(abs(mean) / error for mean, error in biases.values())
    means = ", ".join(f"{m:+.4f} ± {e:.4f} at M = {k:g}" for k, (m, e) in biases.items())
    return [
        Claim(
            "errors of the approximation halve with four times the features",
            "-",
            said,
            all(abs(s + 0.5) <= HALF for s in slopes.values()),
            f"{how}; slopes of the logarithms within {HALF} of -0.5",
            seeds=1,
        ),
        Claim(
            "orthogonal projections err less than independent ones",
            "-",
            f"error over that of independent ones, {COUNTS[0]} to {COUNTS[-1]} features: {shares}",
            worst < 1,
            f"{how}, as many orthogonal ones; below 1 for every number of features",
            seeds=1,
        ),
        Claim(
            "the damping M changes the variance of exponential features and not their mean",
            "-",
            f"mean of what is too much: {means}",
            most <= ERRORS,
            f"cosine of one pair, 256 features, 200 draws; within {ERRORS} standard errors of 0",
            seeds=1,
        ),
    ]


def closed_claims(fits: Mapping[int, Fit], steps: int) -> list[Claim]:
    """What bundled networks have in closed form."""
    errors = ", ".join(
        f"{f.closed:.2e} against {f.adam:.2e} in {d} dimensions" for d, f in fits.items()
    )
    steepest = max(f.gradient for f in fits.values())
    shares = ", ".join(f"{f.r2:.4f} in {d} dimensions" for d, f in fits.items())
    return [
        Claim(
            "a fully bundled network has explicit optimal parameters for squared errors",
            "closed form",
            f"largest gradient there {steepest:.1e}; training error {errors} after {steps} steps "
            "of Adam",
            steepest < FLAT and all(f.closed <= f.adam for f in fits.values()),
            f"two layers of 256 rectified features, 2048 rows; gradient below {FLAT:g}, the error "
            "no larger than Adam's at the best of three rates",
            seeds=1,
        ),
        Claim(
            "a fully bundled network in closed form predicts a smooth function",
            "-",
            f"R² {shares}",
            min(f.r2 for f in fits.values()) >= R2,
            f"1024 held-out rows of a sine and a cosine; at least {R2}",
            seeds=1,
        ),
    ]


def size_claims(found: Found) -> list[Claim]:
    """What fewer numbers cost."""
    claims = []
    for name, what in ((FIRST, "an FFN's first map"), (BOTH, "an FFN")):
        lost = max(sides[PLAIN].mean - sides[name].mean for sides in found.values())
        claims.append(
            tuning.tuned_claim(
                f"random features with a fifth of the trained numbers stand for {what}",
                "up to 5 times fewer parameters, competitive accuracy",
                f"mean accuracy at most {CLOSE} below that of plain networks; parameters count the "
                "projections too, which are drawn",
                lost <= CLOSE,
                found,
                PLAIN,
                name,
            )
        )
    better = min(sides[BOTH].mean - sides[NARROW].mean for sides in found.values())
    claims.append(
        tuning.tuned_claim(
            "random features are better than a plain FFN with as few trained numbers",
            "-",
            "mean accuracy higher",
            better > 0,
            found,
            BOTH,
            NARROW,
        )
    )
    return claims


def text_claims(texts: Mapping[str, Tuned]) -> list[Claim]:
    """What adapters of a fifth of the numbers cost; nothing where they were not trained."""
    if not texts:
        return []
    found = {"polarity": texts}
    lost = texts[NETWORK].mean - texts[KERNEL].mean
    more = texts[KERNEL].mean - texts[snnk_polarity.NOTHING].mean
    return [
        tuning.tuned_claim(
            "adapters of random features with a fifth of the numbers do as well as small networks",
            "GLUE with BERT: up to 5 times fewer trainable parameters",
            f"MiniLM on sentences of reviews: mean accuracy at most {CLOSE} lower",
            lost <= CLOSE,
            found,
            KERNEL,
            NETWORK,
        ),
        tuning.tuned_claim(
            "adapters of random features learn more than a head alone",
            "-",
            "mean accuracy higher",
            more > 0,
            found,
            KERNEL,
            snnk_polarity.NOTHING,
        ),
    ]


def lines(figure: Any, wrong: Errors) -> None:
    """Errors over the number of features."""
    figure.set_size_inches(8, 3.2)
    both = figure.subplots(1, 2)
    titles = {"relu": "arc-cosine kernel", "cos": "cosine"}
    for axes, (kind, title) in zip(both, titles.items(), strict=True):
        for is_even, label in ((False, "independent"), (True, "orthogonal")):
            axes.loglog(COUNTS, wrong[kind, is_even], "o-", label=label, base=2)
        axes.set(title=title, xlabel="features", ylabel="root mean square error")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()


def bars(figure: Any, found: Found) -> None:
    """Accuracy of the networks."""
    axes = figure.subplots()
    values = tuning.values(found)
    grouped_bars(axes, values)
    axes.set_ylim(max(0.0, min(min(v) for v in values.values()) - 0.05), 1.0)
    axes.set_ylabel("accuracy on test digits")
