"""Domain-adversarial training on moons: the shallow algorithm and the deep rule, fresh probes.

The shallow algorithm runs at the authors' settings, and so does the deep rule: their lambda, the
same rate with and without it. Nobody has said how these were found, so that in full each side of
the deep rule is also the best of as many settings by what can be known without a class of the
target, the two terms of the bound that the method is made of (Ben-David et al., 2010, theorem 2):

    error on unseen rows of the source + 1/2 proxy A-distance of frozen features
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from ffnlab.analysis import domain_distance
from ffnlab.data import ArrayBatches, Labelled, Zipped, moons
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
from ffnlab.parallel import LoopOptions, train
from ffnlab.rule import Rule
from ffnlab.studies import tuning
from ffnlab.studies.tuning import Setting

__all__ = [
    "ALONE",
    "BOTH",
    "MOONS",
    "MOONS_HIDDEN",
    "AtOnce",
    "Carried",
    "Pair",
    "as_published",
    "batched",
    "deep",
    "least_bound",
    "of_all",
    "shallow",
    "trained",
]

Pair = tuple[Labelled, Labelled]  # source and target, with the classes that score
ALONE, BOTH = "source only", "dann"
GLOROT = jax.nn.initializers.glorot_uniform()
MOONS, MOONS_HIDDEN = 6.0, 15  # lambda and width of the authors' first experiment
RATE = 0.2  # of the deep rule with a reversed gradient
RATES = (0.01, 0.02, 0.05, 0.1, RATE, 0.5, 1.0, 2.0)  # without one
OTHERS = 1000  # added to a seed: of the rows of the source that nobody learns from


class Carried(NamedTuple):
    """How far classes carry over on moons, for each seed.

    Attributes:
      source, target: accuracies on all rows that were learned from.
      unseen: that on rows of the source that were not.
      told: of the domain's part of the network itself, on all rows.
      linear: of a fresh logistic regression on frozen features, on rows that it has not seen.
      fresh: of a fresh perceptron likewise.
      models: the networks, one for each seed, stacked.
      setting: of all of them, in words.
      tried: what was tried, in words, with `bound` of the first seed.
    """

    source: np.ndarray
    target: np.ndarray
    unseen: np.ndarray
    told: np.ndarray
    linear: np.ndarray
    fresh: np.ndarray
    models: PyTree
    setting: str = ""
    tried: Mapping[str, float] = MappingProxyType({})

    @property
    def bound(self) -> np.ndarray:
        """Error on unseen rows of the source + 1/2 proxy A-distance, for each seed."""
        return (1 - self.unseen) + (2 * self.linear - 1)

    def of(self, rows: slice) -> "Carried":
        """Those of some of the seeds."""
        return Carried(*jax.tree.map(lambda leaf: leaf[rows], tuple(self[:7])))


def stacked(trees: Sequence[PyTree]) -> PyTree:
    """Trees of arrays as one, its leaves [number, …]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def of_all(make: Callable[[Array], PyTree], seeds: Sequence[int], times: int) -> PyTree:
    """The networks of members: one drawn for each seed, that of a seed the same every time."""
    return stacked([make(jax.random.key(seed)) for seed in seeds] * times)


class AtOnce:
    """Batches of several members: `batches(position)` is a tree [number, …].

    Attributes:
      sources: of each seed, position -> batch.
      times: how many members in turn have the batches of all seeds.
    """

    def __init__(self, sources: Sequence[Callable[[int], PyTree]], times: int):
        self.sources = sources
        self.times = times

    def __call__(self, position: int) -> PyTree:
        """Batch number `position` of each."""
        found = [source(position) for source in self.sources]
        return jax.tree.map(lambda *x: np.stack(x * self.times), *found)


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


def network(key: Array) -> MLP:
    """The network of moons."""
    return MLP((2, MOONS_HIDDEN, 2), key=key, activation="sigmoid", init=GLOROT)


def shallow(seeds: Sequence[int], *, passes: int) -> dict[str, Carried]:
    """The authors' algorithm at their settings, with and without a reversed gradient, by side.

    Args:
      seeds: of the moons, the networks and the draws.
      passes: over the source.
    """
    data = [moons(seed) for seed in seeds]
    strengths = [0.0] * len(seeds) + [MOONS] * len(seeds)
    rule = members(
        lambda strength: shallow_dann(strength=strength),
        2 * len(seeds),
        vary={"strength": strengths},
        shared_batch=False,
    )
    batches = AtOnce([drawn(pair, seed) for pair, seed in zip(data, seeds, strict=True)], 2)
    state = trained(rule, of_all(network, seeds, 2), batches, passes, seeds[0], 50)
    found = carried(rule, state, state.domain, seeds, source_is_high=True)
    return {ALONE: found.of(slice(len(seeds))), BOTH: found.of(slice(len(seeds), None))}


def grids(quick: bool) -> dict[str, Sequence[Setting]]:
    """Settings of the deep rule for each side: as many, or the published ones alone."""
    if quick:
        return {ALONE: [published(0.0)], BOTH: [published(MOONS)]}
    return {
        ALONE: tuning.grid(hidden=(100.0,), strength=(0.0,), rate=RATES),
        BOTH: tuning.grid(hidden=(0.0, 100.0), strength=(0.3, 1.0, 3.0, MOONS), rate=(RATE,)),
    }


def published(strength: float) -> Setting:
    """The authors' lambda, or none, with the head of domains of the deep experiments' code."""
    return {"hidden": 100.0, "strength": strength, "rate": RATE}


def deep(
    seeds: Sequence[int], form: str, side: str, *, steps: int, quick: bool
) -> dict[str, Carried]:
    """One side of the deep rule at all of its settings, in words, on batches of 8 and 8 rows.

    Args:
      seeds: of the moons, the networks and the draws.
      form: the convention of lambda.
      side: `ALONE` or `BOTH`.
      steps: of every run.
      quick: whether to try the published setting alone.
    """
    tried: dict[str, Carried] = {}
    for _, same in itertools.groupby(grids(quick)[side], lambda setting: setting["hidden"]):
        tried |= ran(seeds, form, list(same), steps)
    return tried


def least_bound(tried: Mapping[str, Carried]) -> Carried:
    """What the setting reaches whose bound is the least for the first seed, with all bounds."""
    bounds = {name: float(found.bound[0]) for name, found in tried.items()}
    best = min(bounds, key=bounds.__getitem__)
    return tried[best]._replace(setting=best, tried=bounds)


def as_published(tried: Mapping[str, Carried], side: str) -> Carried:
    """What the published setting of a side reaches."""
    setting = tuning.value_text(published(MOONS if side == BOTH else 0.0))
    return tried[setting]._replace(setting=setting)


def ran(
    seeds: Sequence[int], form: str, settings: Sequence[Setting], steps: int
) -> dict[str, Carried]:
    """What settings reach whose domain classifiers are of one width, by setting in words."""
    make_domain = domain_classifier(int(settings[0]["hidden"]))
    rule = members(
        lambda strength, rate: dann(
            optax.sgd(rate), strength=strength, scaled=form, domain=make_domain
        ),
        len(settings) * len(seeds),
        vary={
            name: [setting[name] for setting in settings for _ in seeds]
            for name in ("strength", "rate")
        },
        shared_batch=False,
    )
    sources = [batched(moons(seed), 8, seed) for seed in seeds]
    batches, start = AtOnce(sources, len(settings)), of_all(network, seeds, len(settings))
    state = trained(rule, start, batches, steps, seeds[0], 500)
    found = carried(rule, state, state.model.domain, seeds, source_is_high=False)
    n = len(seeds)
    return {
        tuning.value_text(setting): found.of(slice(i * n, (i + 1) * n))
        for i, setting in enumerate(settings)
    }


def carried(
    rule: Rule,
    state: PyTree,
    domain: PyTree,
    seeds: Sequence[int],
    *,
    source_is_high: bool,
) -> Carried:
    """Figures of members on moons.

    Args:
      rule, state: of the members.
      domain: what tells the domains of each, stacked.
      seeds: of the moons, as often in turn as there are members; the first of the fresh probes.
      source_is_high: whether a high logit of `domain` is the source.
    """
    models, seed = rule.model(state), seeds[0]
    times = len(jax.tree.leaves(models)[0]) // len(seeds)
    data = [(*moons(s), moons(OTHERS + s)[0]) for s in seeds] * times
    x = [np.stack([pair[i].x for pair in data]) for i in (0, 1, 2)]
    y = [np.stack([pair[i].y for pair in data]) for i in (0, 1, 2)]
    right = [
        (np.asarray(rule.predict(state, a)).argmax(-1) == b).mean(-1)
        for a, b in zip(x, y, strict=True)
    ]
    features = [np.asarray(jax.vmap(features_of)(models, jnp.asarray(a))) for a in x[:2]]
    logits = [np.asarray(jax.vmap(lambda m, f: m(f))(domain, jnp.asarray(f))) for f in features]
    signs = (1, -1) if source_is_high else (-1, 1)
    told = np.mean([(s * z > 0).mean((1, 2)) for s, z in zip(signs, logits, strict=True)], 0)
    linear = [1 - domain_distance(*pair, seed=seed).error for pair in zip(*features, strict=True)]
    fresh = told_apart(*features, seed=seed)
    source, target, unseen = right
    return Carried(source, target, unseen, told, np.array(linear), fresh, models)


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
