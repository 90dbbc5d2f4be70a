"""What the study of domain-adversarial training measures: shifted normals, tuned pairs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from ffnlab.analysis import domain_distance
from ffnlab.data import (
    Labelled,
    digits,
    on_photographs,
    reviews,
)
from ffnlab.layers import MLP
from ffnlab.learning import (
    dann,
    domain_classifier,
    features_of,
    members,
)
from ffnlab.models import ConvNet
from ffnlab.rule import Rule
from ffnlab.studies import tuning
from ffnlab.studies.classify import accuracy, at_rate, learned, paced
from ffnlab.studies.dann_moons import (
    ALONE,
    BOTH,
    GLOROT,
    MOONS_HIDDEN,
    AtOnce,
    Pair,
    batched,
    of_all,
    trained,
)
from ffnlab.studies.tuning import Side, Splits, Tuned

__all__ = [
    "DOMAINS",
    "SCORED",
    "Apart",
    "convnet",
    "distances",
    "on_normals",
    "pairs",
    "photographs",
    "reader",
    "review_pair",
    "sides",
]

DOMAINS = ("books", "dvd", "electronics")
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # without lambda
SCORED = 1000  # rows of each domain whose features are told apart


class Apart(NamedTuple):
    """How far domains are apart, for each seed: proxy A-distances, and accuracies on the target."""

    inputs: np.ndarray
    alone: np.ndarray
    both: np.ndarray
    target: tuple[np.ndarray, np.ndarray]


def normals(seed: int, n: int = 200) -> Pair:
    """Normal rows of width 4 whose class is the sign of the first; the target's second is 2 higher
    and its third 1 lower.
    """
    both = np.random.default_rng(seed).normal(size=(2, n, 4)).astype(np.float32)
    y = (both[..., 0] > 0).astype(np.int32)
    return Labelled(both[0], y[0]), Labelled(both[1] + np.float32([0, 2, -1, 0]), y[1])


def on_normals(seeds: Sequence[int], *, steps: int, strength: float = 3.0) -> Apart:
    """A-distances on shifted normals: of inputs, and of features without and with lambda."""
    data = [normals(seed) for seed in seeds]
    rule = members(
        lambda strength: dann(
            optax.sgd(0.2), strength=strength, scaled="everything", domain=domain_classifier(0)
        ),
        2 * len(seeds),
        vary={"strength": [0.0] * len(seeds) + [strength] * len(seeds)},
        shared_batch=False,
    )
    make = functools.partial(MLP, (4, MOONS_HIDDEN, 2), activation="sigmoid", init=GLOROT)
    sources = [batched(pair, 16, seed) for pair, seed in zip(data, seeds, strict=True)]
    model = of_all(lambda key: make(key=key), seeds, 2)
    state = trained(rule, model, AtOnce(sources, 2), steps, seeds[0], 500)
    models, far = rule.model(state), functools.partial(domain_distance, seed=seeds[0])
    here, there = (np.stack([pair[i].x for pair in data * 2]) for i in (0, 1))
    features = [np.asarray(jax.vmap(features_of)(models, jnp.asarray(x))) for x in (here, there)]
    found = np.array([far(*pair).distance for pair in zip(*features, strict=True)])
    y = np.stack([pair[1].y for pair in data * 2])
    right = (np.asarray(rule.predict(state, there)).argmax(-1) == y).mean(-1)
    raw = np.array([far(a.x, b.x).distance for a, b in data])
    half = len(seeds)
    return Apart(raw, found[:half], found[half:], (right[:half], right[half:]))


# Pairs on which both sides are tuned.


@dataclasses.dataclass(frozen=True)
class Back:
    """Rows by which settings are chosen without a class of the target: by the way back.

    Attributes:
      source, target: rows that were learned from.
      held_out: rows of the source that were not.
      side: what is trained back.
      seed: of that run.
    """

    source: np.ndarray
    target: np.ndarray
    held_out: Labelled
    side: Side
    seed: int


def score(rule: Rule, state: PyTree, rows: Back | Labelled) -> float:
    """Accuracy on rows; of `Back`, that on the source of a network trained on the target as the
    state classifies it, the source being its target (section 5.1.2).
    """
    if isinstance(rows, Labelled):
        return accuracy(rule, state, rows)
    y = np.asarray(rule.predict(state, jnp.asarray(rows.target))).argmax(-1).astype(np.int32)
    both, side = (Labelled(rows.target, y), rows.source), rows.side
    options = {"batch": side.batch, "steps": side.steps, "seed": rows.seed}
    return accuracy(rule, learned(rule, side.model(rows.seed), both, **options), rows.held_out)


@functools.cache
def rule_of(strength: float, hidden: int, steps: int) -> Rule:
    """The rule at rate 1, compiled once for all rates and pairs; lambda rises over the run."""
    given = {"strength": strength, "ramp": steps, "domain": domain_classifier(hidden)}
    return dann(paced(optax.adam(1.0)), **given)


def sides(
    network: Callable[[int], PyTree],
    rates: Sequence[float],
    *,
    batch: int,
    steps: int,
    hidden: int,
    quick: bool,
) -> list[Side]:
    """Without and with lambda, as many settings for each.

    Args:
      network: seed -> the network that starts.
      rates: of Adam, tried with lambda; nine in all without.
      batch, steps: of every run.
      hidden: width of the domain's part, 0 for a linear one.
      quick: whether to try few settings.
    """
    alone, lambdas = (rates, (0.1,)) if quick else (RATES, (0.01, 0.1, 1.0))
    grids = {
        ALONE: tuning.grid(strength=(0.0,), rate=alone),
        BOTH: tuning.grid(strength=lambdas, rate=rates),
    }
    rule = lambda s: at_rate(rule_of(s["strength"], hidden, steps), s["rate"])  # noqa: E731
    return [Side(name, grid, rule, network, batch, steps) for name, grid in grids.items()]


def pairs(
    source: Pair, target: Pair, compared: Sequence[Side], seeds: Sequence[int]
) -> Mapping[str, Tuned]:
    """Tunes both sides by the way back, and tests them on the target.

    Args:
      source, target: (rows to learn from, rows to test on).
      compared: see `sides`.
      seeds: the first one chooses.
    """
    n = len(source[0].x)
    order = np.random.default_rng(seeds[0]).permutation(n)
    held_out, kept = (
        Labelled(source[0].x[rows], source[0].y[rows]) for rows in np.split(order, [n // 5])
    )
    # A batch is of as many rows of either, drawn apart: the order of the target is its own.
    unknown = target[0].x[np.random.default_rng(seeds[0] + 1).permutation(len(target[0].x))]
    unknown = unknown[: len(kept.x)]
    back = Back(kept.x, unknown, held_out, compared[0], seeds[0])
    return tuning.compare(compared, Splits((kept, unknown), back, target[1]), seeds, score=score)


def distances(found: Mapping[str, Tuned], source: Labelled, target: Labelled) -> dict[str, list]:
    """Proxy A-distances of test rows by side, one for each seed: of inputs, and of features."""
    x = [part.x[:SCORED] for part in (source, target)]

    def of_state(tuned: Tuned, state: PyTree) -> float:
        assert tuned.rule is not None
        rows = [np.asarray(features_of(tuned.rule.model(state), jnp.asarray(part))) for part in x]
        return domain_distance(*rows).distance

    return {name: [of_state(t, state) for state in t.states] for name, t in found.items()}


def review_pair(source: str, target: str) -> tuple[Pair, Pair]:
    """Two domains of reviews, logarithms of counts; of each (rows to learn from, to test on)."""
    return tuple(
        tuple(Labelled(np.log1p(part.x), part.y) for part in reviews(name))
        for name in (source, target)
    )


def photographs(seed: int) -> tuple[Pair, Pair]:
    """Half of the digits in three colours, and the other half on photographs."""

    def of(part: Labelled, first: int) -> Labelled:
        x, y = part.x[first::2].reshape(-1, 8, 8, 1), part.y[first::2]
        return Labelled(on_photographs(x, seed) if first else np.repeat(x, 3, axis=-1), y)

    return tuple(tuple(of(part, first) for part in digits(seed)) for first in (0, 1))


def convnet(seed: int) -> ConvNet:
    """The network of digits on photographs."""
    return ConvNet((3, 8, 16, 32), 10, key=jax.random.key(seed))


def reader(seed: int) -> MLP:
    """The network of reviews."""
    return MLP((5000, 50, 2), key=jax.random.key(seed), init=GLOROT)
