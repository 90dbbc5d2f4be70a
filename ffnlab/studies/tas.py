"""Transformable architecture search: budgets that are met, what the shape and a teacher are worth,
the published multiply-adds, and in the full run a language model at half of its FFNs.

Searches are of a network 64-64-64-10 on scikit-learn's digits, with ten numbers of channels for
each hidden layer. What is found is trained from fresh weights with and without a teacher, beside
shapes drawn from those of equal multiply-adds, all at as many rates. The paper's networks are of
CIFAR and ImageNet, whose images this package has not: its accuracies are not tested here.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffnlab import models
from ffnlab.data import digits, stdlib_text, validation_split
from ffnlab.formats.embedded import embedded
from ffnlab.models import ResNet, resnet_cifar
from ffnlab.pruning.search import macs
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES, found_networks
from ffnlab.studies.classify import grouped_bars
from ffnlab.studies.found_networks import Entry
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import spread
from ffnlab.studies.tas_decoder import RANDOM as RANDOM_WIDTHS
from ffnlab.studies.tas_decoder import REMOVED, Half, Pace, Texts, at_half, hidden_of
from ffnlab.studies.tas_decoder import SEARCHED as SEARCHED_WIDTHS
from ffnlab.studies.tas_measure import (
    RANDOM,
    SEARCHED,
    WHOLE,
    Search,
    Trained,
    random_shapes,
    searched,
    share,
    taught,
    trained_alike,
)
from ffnlab.studies.tried import at_ends
from ffnlab.studies.tuning import Splits, splits

__all__ = ["Measured", "Settings", "measure", "run"]

PUBLISHED = {20: 40.8, 32: 69.1, 56: 125.7, 110: 253.1, 164: 247.6}  # millions, before a search
TARGETS, SLACK = (0.5, 0.25), 0.05
TOLERANCE = 0.005  # of accuracy: the card's half a point
TEACHER = 0.9  # weight of the teacher


class Settings(NamedTuple):
    """What is run.

    Attributes:
      seeds: of searches and of the networks that are trained.
      epochs: of a search, of ten steps each; and of a training.
      rates: of SGD, that every side tries.
      depths: of the ResNets whose multiply-adds are counted.
      pace: of the language model; None where it is left out.
    """

    seeds: tuple[int, ...]
    epochs: tuple[int, int]
    rates: tuple[float, ...]
    depths: tuple[int, ...]
    pace: Pace | None

    @classmethod
    def of(cls, quick: bool, seed: int) -> "Settings":
        """Of the quick form, or of the full one."""
        if quick:
            seeds = tuple(range(seed, seed + 3))
            return cls(seeds, (60, 30), (0.01, 0.03, 0.1), (20, 32, 56), None)
        seeds = tuple(range(seed, seed + 5))
        return cls(seeds, (60, 60), (0.003, 0.01, 0.03, 0.1, 0.3), tuple(PUBLISHED), Pace())


class Measured(NamedTuple):
    """What was measured.

    Attributes:
      search: all searches.
      groups: (target, shape, weight of the teacher) -> networks of the seeds.
      whole: networks that were not pruned, the teachers.
      counted: depth of a ResNet -> millions of multiply-adds.
      kept: largest difference between outputs of what was found before and after it was saved.
      halves: the language model in three ways; nothing where it is left out.
    """

    search: Search
    groups: Mapping[tuple, Trained]
    whole: Trained
    counted: Mapping[int, float]
    kept: float
    halves: Mapping[str, Half]


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    settings = Settings.of(quick, seed)
    text = stdlib_text()
    parts = validation_split(text)
    texts = Texts(parts.train, parts.held_out, text.held_out)
    data = splits(digits(seed), seed=seed)
    found = measure(data, texts, settings)
    said = {
        "data": "scikit-learn digits, a fifth of the training rows for validation",
        "network": list(WHOLE),
        "targets": list(TARGETS),
        "seeds": list(settings.seeds),
        "epochs of search and training": list(settings.epochs),
        "rates": list(settings.rates),
        "validation": {name_of(k): list(t.validation) for k, t in found.groups.items()},
    }
    if settings.pace is not None:
        said |= {"language model": settings.pace._asdict(), "text": text.identity}
    return Result(
        slug="tas",
        title=STUDIES["tas"].title,
        settings=said,
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=claims_of(found, settings),
        table=rows_of(found, data),
        pictures={
            "search": lambda figure: draw_search(figure, found.search),
            "accuracy": lambda figure: draw_accuracy(figure, found),
        },
    ).write(out)


def measure(data: Splits, texts: Texts, settings: Settings) -> Measured:
    """Runs all.

    Args:
      data: digits, or rows like them.
      texts: of the language model.
      settings: see `Settings`.
    """
    seeds, (of_search, of_training) = settings.seeds, settings.epochs
    search = searched(data, TARGETS, seeds, epochs=of_search)
    whole, logits = taught(data, seeds, settings.rates, epochs=of_training)
    groups = {}
    for target in TARGETS:
        shapes = search.shapes(target)
        for name, each in ((SEARCHED, shapes), (RANDOM, random_shapes(shapes, seeds[0]))):
            groups |= {(target, name, weight): (each, weight) for weight in (0.0, TEACHER)}
    trained = trained_alike(groups, data, logits, seeds, settings.rates, epochs=of_training)
    counted = {depth: megamacs(depth) for depth in settings.depths}
    halves = {}
    if settings.pace is not None:
        halves = at_half(embedded()[0], texts, settings.pace, seed=seeds[0])
    return Measured(search, trained, whole, counted, saved_apart(search, data), halves)


def megamacs(depth: int) -> float:
    """Millions of multiply-adds of a ResNet for images of 32 x 32, as the paper has them."""
    block = "bottleneck" if depth == 164 else "basic"
    config = resnet_cifar(depth, block=block, shortcut="pooled")
    model = jax.eval_shape(lambda key: ResNet(config, key=key), jax.random.key(0))
    return macs(model, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)) / 1e6


def saved_apart(search: Search, data: Splits) -> float:
    """See `Measured`."""
    apart, x = 0.0, jnp.asarray(data.test.x)
    for net in search.networks:
        with tempfile.TemporaryDirectory() as folder:
            models.save(net, folder, format="ffnlab")
            again = models.load(folder)
        apart = max(apart, float(jnp.abs(net(x) - again(x)).max()))
    return apart


def name_of(key: tuple) -> str:
    """A group in words.

    >>> name_of((0.5, "random", 0.9))
    '0.5 random + teacher'
    """
    target, shape, weight = key
    return f"{target:g} {shape}" + (" + teacher" if weight else "")


def claims_of(found: Measured, settings: Settings) -> list[Claim]:
    """All claims."""
    seeds = settings.seeds
    claims = [budget_claim(found.search, seeds), own_claim(found, len(seeds))]
    ours = SEARCHED, TEACHER
    claims += [
        side_claim(
            "with a teacher what was found is as good as without one",
            "distillation helps (abstract)",
            ours,
            [(SEARCHED, 0.0)],
            found,
            settings,
        ),
        side_claim(
            "with a teacher what was found is as good as drawn shapes of equal multiply-adds",
            "better than random and uniform shapes (section 4)",
            ours,
            [(RANDOM, TEACHER), (RANDOM, 0.0)],
            found,
            settings,
        ),
    ]
    claims.append(count_claim(found.counted))
    if settings.pace is not None:
        claims.append(half_claim(found.halves, settings.pace))
    return claims


def budget_claim(search: Search, seeds: Sequence[int]) -> Claim:
    """Budgets of all searches."""
    shares = [share(net.sizes) for net in search.networks]
    inside = [t - SLACK <= s <= t for (t, _), s in zip(search.cases, shares, strict=True)]
    by_target = {
        t: [s for (target, _), s in zip(search.cases, shares, strict=True) if target == t]
        for t in TARGETS
    }
    epochs = within(search).sum(0)
    return Claim(
        "searches end within their budgets",
        "ResNets of 45 to 70% of the multiply-adds (searched configurations)",
        "; ".join(f"target {t:g}: {spread(values)}" for t, values in by_target.items())
        + f"; {sum(inside)} of {len(inside)} inside",
        all(inside),
        f"multiply-adds of what was found over those of the whole network, within [R - {SLACK:g}, "
        f"R] for R of {' and '.join(f'{t:g}' for t in TARGETS)} and seeds "
        f"{', '.join(map(str, seeds))}; found is the network of the last step that met the budget, "
        f"which {epochs.min()} to {epochs.max()} of the {len(search.ratio)} epochs ended with; "
        "strength 20 and rate 0.05 of the sizes, the card's for so few steps",
        seeds=len(seeds),
    )


def within(search: Search) -> np.ndarray:
    """Whether each epoch ended within the budget, [epochs, members]."""
    targets = np.array([target for target, _ in search.cases])
    return (search.ratio <= targets + 1e-9) & (search.ratio >= targets - SLACK - 1e-9)


def own_claim(found: Measured, seeds: int) -> Claim:
    """What was found, cut out."""
    return Claim(
        "what was found is a network by itself, saved and loaded again",
        "searched configurations are files, trained anew",
        f"{len(found.search.networks)} networks, up to {found.search.apart:.1e} (0 to "
        f"{found.search.apart:.1e}) from the search network of the same sizes; "
        f"{found.kept:.1e} after saving",
        found.search.apart <= 1e-5 and found.kept == 0,
        "largest difference of a logit on test rows, over the largest logit, at most 1e-5; no "
        "difference after saving in the native format and loading",
        seeds=seeds,
    )


def side_claim(
    claim: str,
    paper: str,
    ours: tuple[str, float],
    theirs: Sequence[tuple[str, float]],
    found: Measured,
    settings: Settings,
) -> Claim:
    """One side against others at both targets."""
    sides, groups = [ours, *theirs], found.groups
    mean = lambda target, side: float(np.mean(groups[target, *side].test))  # noqa: E731
    gaps = [mean(t, ours) - mean(t, side) for t in TARGETS for side in theirs]
    name = lambda side: name_of((0, *side)).partition(" ")[2]  # noqa: E731
    said = "; ".join(
        f"{t:g}: " + ", ".join(f"{name(side)} {spread(groups[t, *side].test)}" for side in sides)
        for t in TARGETS
    )
    rates = {name_of((t, *side)): groups[t, *side].rate for t in TARGETS for side in sides}
    chosen = ", ".join(f"{group} {rate:g}" for group, rate in rates.items())
    chosen += f"; {at_ends(list(rates.values()), settings.rates)}"
    return Claim(
        claim,
        paper,
        said,
        all(gap >= -TOLERANCE for gap in gaps),
        f"mean test accuracy of seeds {', '.join(map(str, settings.seeds))}, at both targets at "
        f"most {100 * TOLERANCE:g} points below every other side's (the least {min(gaps):+.3f}); a "
        "search, a drawn shape, a teacher and fresh weights for each seed; every side at the best "
        f"of SGD rates {', '.join(f'{r:g}' for r in settings.rates)} by its mean accuracy on "
        f"validation rows ({chosen}); teacher at T = 4 and weight {TEACHER:g}, itself "
        f"{spread(found.whole.test)}",
        seeds=len(settings.seeds),
    )


def count_claim(counted: Mapping[int, float]) -> Claim:
    """Multiply-adds of the authors' networks."""
    off = {depth: abs(value / PUBLISHED[depth] - 1) for depth, value in counted.items()}
    return Claim(
        "networks for CIFAR have the published multiply-adds",
        ", ".join(f"ResNet-{depth} {PUBLISHED[depth]} M" for depth in counted),
        ", ".join(f"ResNet-{depth} {value:.2f} M" for depth, value in counted.items()),
        all(value <= 1e-3 for value in off.values()),
        "counted from the jaxpr of a call with one image, every figure within 0.1%",
        seeds=0,
    )


def half_claim(halves: Mapping[str, Half], pace: Pace) -> Claim:
    """The language model at half of its FFNs."""
    ways = [SEARCHED_WIDTHS, REMOVED, RANDOM_WIDTHS]
    ours, *others = (halves[way] for way in ways)
    return Claim(
        "half of a language model's FFNs: widths that were searched lose least",
        "-",
        f"whole {halves['whole'].bits:.3f} bits; "
        + ", ".join(
            f"{way} {halves[way].bits:.3f} (FFNs at {halves[way].share:.1%})" for way in ways
        ),
        all(ours.bits <= other.bits for other in others),
        "bits per held-out byte of the embedded model, at most those of the other ways; as many "
        "steps of training for each, those of the search included, at the best of AdamW rates "
        f"{', '.join(f'{r:g}' for r in pace.rates)} on validation text "
        f"({', '.join(f'{way} {halves[way].rate:g}' for way in ways)}; "
        f"{at_ends([halves[way].rate for way in ways], pace.rates)}); one seed",
        seeds=1,
    )


def rows_of(found: Measured, data: Splits) -> list[dict[str, object]]:
    """Counts of ResNets, the language model, and the networks of the first seed in one table."""
    rows: list[dict[str, object]] = [
        {"network": f"ResNet-{depth}", "MACs": round(1e6 * value), "published": PUBLISHED[depth]}
        for depth, value in found.counted.items()
    ]
    halves: list[dict[str, object]] = [
        {
            "network": f"embedded, {name}",
            "shape": "-".join(map(str, hidden_of(half.model))),
            "FFN MACs": half.share,
            "bits": half.bits,
        }
        for name, half in found.halves.items()
    ]
    entries = {"whole": Entry(found.whole.networks[0], found.whole.test)}
    entries |= {
        name_of(key): Entry(trained.networks[0], trained.test)
        for key, trained in found.groups.items()
    }
    return [*rows, *halves, *found_networks.rows(entries, jnp.asarray(data.test.x))]


def draw_search(figure, search: Search) -> None:
    """Multiply-adds over epochs against the budgets; channels of the first seed's layers."""
    figure.set_size_inches(8, 3.2)
    left, right = figure.subplots(1, 2)
    epochs = np.arange(1, len(search.ratio) + 1)
    for i, target in enumerate(TARGETS):
        mine = [j for j, (t, _) in enumerate(search.cases) if t == target]
        left.axhspan(target - SLACK, target, color=f"C{i}", alpha=0.2)
        left.step(epochs, search.ratio[:, mine[0]], color=f"C{i}", lw=1, label=f"target {target:g}")
        left.plot(epochs, search.expected[:, mine], color="0.4", ls="--", lw=0.8)
        for layer in range(search.widths.shape[2]):
            style = "-" if layer == 0 else ":"
            name = f"target {target:g}, layer {layer + 1}"
            channels = search.widths[:, mine[0], layer]
            right.step(epochs, channels, style, color=f"C{i}", label=name)
    left.set_ylabel("multiply-adds of the whole network's")
    left.set_title("most likely, first seed; expected, all (dashed)", fontsize=9)
    right.set_ylabel("channels")
    right.set_title("most likely channels, first seed", fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("epoch of ten steps")
        axes.legend(frameon=False, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)


def draw_accuracy(figure, found: Measured) -> None:
    """Test accuracy by shape and teacher."""
    axes = figure.subplots()
    values = {
        (f"target {target:g}", name_of((target, *side)).partition(" ")[2]): found.groups[
            target, *side
        ].test
        for target in TARGETS
        for side in ((RANDOM, 0.0), (RANDOM, TEACHER), (SEARCHED, 0.0), (SEARCHED, TEACHER))
    }
    grouped_bars(axes, values)
    axes.axhline(np.mean(found.whole.test), color="0.4", ls=":", lw=1)
    low, high = min(map(min, values.values())), max(map(max, values.values()))
    axes.set_ylim(max(0.0, low - 0.01), high + 0.25 * (high - low + 0.02))  # room for the legend
    axes.set_ylabel("test accuracy")
