"""What the study of domain-adversarial training measures: moons, shifted normals, tuned pairs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from ffnlab.analysis import domain_distance
from ffnlab.data import (
    ArrayBatches,
    Labelled,
    Zipped,
    digits,
    moons,
    on_photographs,
    reviews,
)
from ffnlab.layers import MLP
from ffnlab.learning import (
    backprop,
    dann,
    domain_classifier,
    features_of,
    labelled,
    members,
    shallow_dann,
)
from ffnlab.models import ConvNet
from ffnlab.parallel import LoopOptions, train
from ffnlab.rule import Rule
from ffnlab.studies import tuning
from ffnlab.studies.classify import accuracy, at_rate, learned, paced
from ffnlab.studies.tuning import Side, Splits, Tuned

__all__ = [
    "ALONE",
    "BOTH",
    "DOMAINS",
    "MOONS",
    "MOONS_HIDDEN",
    "SCORED",
    "Apart",
    "Carried",
    "convnet",
    "distances",
    "on_moons",
    "on_normals",
    "pairs",
    "photographs",
    "reader",
    "review_pair",
    "sides",
]

Pair = tuple[Labelled, Labelled]  # source and target, with the classes that score
ALONE, BOTH = "source only", "dann"
GLOROT = jax.nn.initializers.glorot_uniform()
MOONS, MOONS_HIDDEN = 6.0, 15  # lambda and width of the authors' first experiment
DOMAINS = ("books", "dvd", "electronics")
SCORED = 1000  # rows of each domain whose features are told apart


class Carried(NamedTuple):
    """How far classes carry over on moons, for each seed.

    Attributes:
      source, target: accuracies.
      told: of the domain's part of the network itself, on all rows.
      linear: of a fresh logistic regression on frozen features, on rows that it has not seen.
      fresh: of a fresh perceptron likewise.
      models: the networks, one for each seed, stacked.
    """

    source: np.ndarray
    target: np.ndarray
    told: np.ndarray
    linear: np.ndarray
    fresh: np.ndarray
    models: PyTree


class Apart(NamedTuple):
    """How far domains are apart, for each seed: proxy A-distances, and accuracies on the target."""

    inputs: np.ndarray
    alone: np.ndarray
    both: np.ndarray
    target: tuple[np.ndarray, np.ndarray]


def stacked(trees: Sequence[PyTree]) -> PyTree:
    """Trees of arrays as one, its leaves [number, …]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def of_all(make: Callable[[Array], PyTree], seeds: Sequence[int], times: int) -> PyTree:
    """The networks of members: one drawn for each seed, that of a seed the same every time."""
    return stacked([make(jax.random.key(seed)) for seed in seeds] * times)


class AtOnce:
    """Batches of several members, each of its own: `batches(position)` is a tree [number, …].

    Attributes:
      sources: of each member, position -> batch.
    """

    def __init__(self, sources: Sequence[Callable[[int], PyTree]]):
        self.sources = sources

    def __call__(self, position: int) -> PyTree:
        """Batch number `position` of each."""
        return jax.tree.map(lambda *x: np.stack(x), *(source(position) for source in self.sources))


def drawn(pair: Pair, seed: int) -> Zipped:
    """A pass over the source in an order of its own, and as many rows of the target, each drawn."""
    source, target = pair
    n = len(source.x)

    def rows(position: int) -> np.ndarray:
        chosen = np.random.default_rng((seed, position)).integers(len(target.x), size=n)
        return target.x[chosen]

    return Zipped(ArrayBatches(source, n, seed), rows)


def batched(pair: Pair, rows: int, seed: int) -> Zipped:
    """Shuffled batches of as many rows of either domain."""
    source, target = pair
    return Zipped(ArrayBatches(source, rows, seed), ArrayBatches(target.x, rows, seed))


def trained(
    rule: Rule, model: PyTree, batches: Callable, steps: int, seed: int, together: int
) -> PyTree:
    """The state of members after so many steps.

    Raises:
      KeyboardInterrupt: a signal stopped it; what it learned so far is no result.
    """
    options = LoopOptions(log_every=0, progress=False)
    key = jax.random.key(seed)
    outcome = train(rule, model, batches, steps, key=key, options=options, together=together)
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {steps}")
    return outcome.state


def on_moons(
    seeds: Sequence[int], form: str, *, passes: int, steps: int
) -> dict[str, dict[str, Carried]]:
    """Trains on moons with and without a reversed gradient, from the same networks.

    Args:
      seeds: of the moons, the networks and the draws.
      form: "shallow", or the convention of lambda of the deep rule on batches of 8 and 8 rows.
      passes: over the source, of the shallow algorithm.
      steps: of the deep rule, at rate .2.
    Returns:
      by side.
    """
    data = [moons(seed) for seed in seeds]
    vary = {"strength": [0.0] * len(seeds) + [MOONS] * len(seeds)}
    make = functools.partial(MLP, (2, MOONS_HIDDEN, 2), activation="sigmoid", init=GLOROT)
    model = of_all(lambda key: make(key=key), seeds, 2)
    options = {"vary": vary, "shared_batch": False}
    if form == "shallow":
        rule = members(lambda strength: shallow_dann(strength=strength), 2 * len(seeds), **options)
        sources = [drawn(pair, seed) for pair, seed in zip(data, seeds, strict=True)]
        state = trained(rule, model, AtOnce(sources * 2), passes, seeds[0], 50)
        domain = state.domain
    else:
        rule = members(
            lambda strength: dann(optax.sgd(0.2), strength=strength, scaled=form),
            2 * len(seeds),
            **options,
        )
        sources = [batched(pair, 8, seed) for pair, seed in zip(data, seeds, strict=True)]
        state = trained(rule, model, AtOnce(sources * 2), steps, seeds[0], 500)
        domain = state.model.domain
    found = carried(rule, state, domain, data * 2, seeds[0], source_is_high=form == "shallow")
    cut = lambda part: jax.tree.map(lambda leaf: leaf[part], found)  # noqa: E731
    return {ALONE: cut(slice(len(seeds))), BOTH: cut(slice(len(seeds), None))}


def carried(
    rule: Rule,
    state: PyTree,
    domain: PyTree,
    data: Sequence[Pair],
    seed: int,
    *,
    source_is_high: bool,
) -> Carried:
    """Figures of members on moons.

    Args:
      rule, state: of the members.
      domain: what tells the domains of each, stacked.
      data: of each.
      seed: of the fresh probes.
      source_is_high: whether a high logit of `domain` is the source.
    """
    models = rule.model(state)
    x = [np.stack([pair[i].x for pair in data]) for i in (0, 1)]
    y = [np.stack([pair[i].y for pair in data]) for i in (0, 1)]
    right = [
        (np.asarray(rule.predict(state, a)).argmax(-1) == b).mean(-1)
        for a, b in zip(x, y, strict=True)
    ]
    features = [np.asarray(jax.vmap(features_of)(models, jnp.asarray(a))) for a in x]
    logits = [np.asarray(jax.vmap(lambda m, f: m(f))(domain, jnp.asarray(f))) for f in features]
    signs = (1, -1) if source_is_high else (-1, 1)
    told = np.mean([(s * z > 0).mean((1, 2)) for s, z in zip(signs, logits, strict=True)], 0)
    linear = [1 - domain_distance(*pair, seed=seed).error for pair in zip(*features, strict=True)]
    fresh = told_apart(*features, seed=seed)
    return Carried(right[0], right[1], told, np.array(linear), fresh, models)


def told_apart(source: np.ndarray, target: np.ndarray, *, seed: int) -> np.ndarray:
    """Accuracy of fresh perceptrons that learn the domain of frozen features.

    Args:
      source, target: features of each member, [number, n, d].
      seed: of the draw of halves, and of the perceptrons.
    Returns:
      on the half that none has learned from, [number].
    """
    number, n, width = source.shape
    order = np.random.default_rng(seed).permutation(n)
    both = [np.stack([source[:, part], target[:, part]], 2) for part in (order[::2], order[1::2])]
    x, unseen = (part.reshape(number, -1, width) for part in both)
    mean, spread = x.mean(1, keepdims=True), x.std(1, keepdims=True) + 1e-6
    y = np.arange(x.shape[1], dtype=np.int32) % 2
    rule = members(lambda: backprop(labelled, optax.adam(1e-2)), number, shared_batch=False)
    model = of_all(lambda key: MLP((width, 32, 2), key=key), [seed], number)
    batch = Labelled((x - mean) / spread, np.broadcast_to(y, (number, len(y))))
    state = trained(rule, model, lambda position: batch, 500, seed, 100)
    scores = np.asarray(rule.predict(state, (unseen - mean) / spread))
    return (scores.argmax(-1) == np.arange(unseen.shape[1]) % 2).mean(-1)


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
    state = trained(rule, model, AtOnce(sources * 2), steps, seeds[0], 500)
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
    network: Callable[[int], PyTree], *, batch: int, steps: int, hidden: int, quick: bool
) -> list[Side]:
    """Without and with lambda, as many settings for each."""
    rates = (1e-3, 3e-3) if quick else (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    lambdas, fewer = ((0.1,), rates) if quick else ((0.1, 0.3, 1.0), rates[2:4])
    grids = {
        ALONE: tuning.grid(strength=(0.0,), rate=rates),
        BOTH: tuning.grid(strength=lambdas, rate=fewer),
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
