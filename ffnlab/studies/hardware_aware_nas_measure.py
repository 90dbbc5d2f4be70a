"""What the study of hardware-aware NAS measures: searches in a super-network, and their finds."""

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy import stats

from ffnlab import formats, tree
from ffnlab.clock import Spread
from ffnlab.data import Labelled
from ffnlab.models import ViT
from ffnlab.pruning.search import (
    Config,
    Measure,
    SearchOptions,
    Space,
    Supernet,
    Tactic,
    best_within,
    fit,
    hypervolume,
    macs,
    measured,
    measuring,
    meter,
    predict,
    search,
)
from ffnlab.pruning.search.loop import Log
from ffnlab.studies.hardware_aware_nas_known import TACTICS
from ffnlab.studies.hardware_aware_nas_network import IMAGE, accuracy, alike, on_device, stack

__all__ = [
    "COUNTED",
    "DRAWS",
    "FAST",
    "FULL",
    "HALF",
    "QUICK",
    "TIMED",
    "Beside",
    "Chosen",
    "Foretold",
    "Found",
    "Pair",
    "Sizes",
    "all_foretold",
    "beside",
    "chosen",
    "counted_searches",
    "foretold",
    "timed_searches",
    "volumes",
    "worst",
]

# What searches make small: by what is counted, as the paper's do by accuracy and MACs, and by time.
COUNTED, TIMED = (("loss", "macs"), ("loss", "bytes")), ("loss", "latency")
CHANCE = float(np.log(10))  # nats: the worst loss that counts
HALF, FAST = 0.5, 0.75  # of the whole network's MACs, latency: what a chosen network may have
DRAWS = 10  # shapes drawn beside one that was found
TURNS = 31  # that a network and the whole one take in a search


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      seeds: how many, of networks, of their training and of searches.
      steps: of training.
      budget: networks measured by a search.
      timed: the same of a search by latency, with the first seed.
      population: of these in a round.
      inner: evaluations of predictors in a round.
      tactics: that search by latency.
    """

    seeds: int
    steps: int
    budget: int
    timed: int
    population: int
    inner: int
    tactics: tuple[Tactic, ...]


FULL = Sizes(5, 2000, 100, 100, 20, 2000, TACTICS)
QUICK = Sizes(2, 400, 30, 20, 10, 1000, ("linas",))

Pair = tuple[str, str]
Counted = Mapping[Pair, Mapping[str, Sequence[Log]]]  # objectives -> tactic -> by seed


def remembered(measure: Measure) -> Measure:
    """Asks once for each network, of searches whose answers do not change."""
    known: dict[tuple, Mapping[str, float]] = {}

    def ask(config: Config) -> Mapping[str, float]:
        key = tuple(config.items())
        if key not in known:
            known[key] = measure(config)
        return known[key]

    return ask


def options_of(
    sizes: Sizes, objectives: tuple[str, ...], tactic: Tactic, seed: int
) -> SearchOptions:
    """Of one search."""
    budget = sizes.timed if objectives == TIMED else sizes.budget
    return SearchOptions(objectives, budget, tactic, sizes.population, sizes.inner, seed)


def counted_searches(
    sizes: Sizes, net: Supernet, models: Sequence[ViT], rows: Labelled, seed: int
) -> Counted:
    """By loss and MACs, and by loss and bytes: every tactic with the network of every seed."""
    found = {pair: {tactic: [] for tactic in TACTICS} for pair in COUNTED}
    for i, model in enumerate(models):
        measure = remembered(measuring(net, model, on_device(rows), turns=None))
        for pair, tactic in itertools.product(COUNTED, TACTICS):
            options = options_of(sizes, pair, tactic, seed + i)
            log = search(net.space, measure, options, progress=False)
            found[pair][tactic].append(log)
    return found


def timed_searches(
    sizes: Sizes, net: Supernet, model: ViT, rows: Labelled, seed: int
) -> tuple[dict[str, Log], Measure]:
    """By loss and latency on this machine; and what was measured, of networks that were."""
    measure = remembered(measuring(net, model, on_device(rows), turns=TURNS))
    logs = {}
    for tactic in sizes.tactics:
        options = options_of(sizes, TIMED, tactic, seed)
        logs[tactic] = search(net.space, measure, options, progress=False)
    return logs, measure


def worst(objectives: Sequence[str]) -> Float[np.ndarray, "m"]:
    """The reference of all hypervolumes: the loss of chance, and the cost of the whole network."""
    shapes = jax.eval_shape(stack, jax.random.key(0))
    costs = {"loss": CHANCE, "latency": 1.0, "bytes": tree.nbytes(shapes)}
    costs["macs"] = macs(shapes, IMAGE)
    return np.array([float(costs[name]) for name in objectives])


def volumes(objectives: Sequence[str], logs: Sequence[Log]) -> Float[np.ndarray, "seeds"]:
    """The share of the box below the reference that each search's front dominates."""
    corner = worst(objectives)
    ones = np.ones(len(objectives))
    return np.array([hypervolume(measured(log)[1] / corner, ones) for log in logs])


class Foretold(NamedTuple):
    """How well a predictor tells of networks that it was not fitted to.

    Attributes:
      order: Kendall's tau of what it says and what was measured.
      error: mean absolute error, relative.
      networks: that it was asked of.
    """

    order: float
    error: float
    networks: int


def foretold(space: Space, known: Log, asked: Log) -> list[Foretold]:
    """Of both objectives: fitted to one search, asked of another one's networks."""
    vectors, values = measured(known)
    seen = {row.tobytes() for row in vectors}
    others, wanted = measured(asked)
    new = np.array([row.tobytes() not in seen for row in others])
    found = []
    for labels, truth in zip(values.T, wanted[new].T, strict=True):
        said = predict(fit(space.one_hot(vectors), labels), space.one_hot(others[new]))
        order = float(stats.kendalltau(said, truth)[0])
        found.append(Foretold(order, float(np.mean(np.abs(said / truth - 1))), int(new.sum())))
    return found


def all_foretold(space: Space, counted: Counted) -> dict[str, list[Foretold]]:
    """Of random search's networks, told of LINAS's: by objective, of every seed and pair."""
    found: dict[str, list[Foretold]] = {}
    for pair, by_tactic in counted.items():
        for logs in zip(by_tactic["random"], by_tactic["linas"], strict=True):
            for name, one in zip(pair, foretold(space, *logs), strict=True):
                found.setdefault(name, []).append(one)
    return found


class Beside(NamedTuple):
    """A network that was found, beside networks drawn of as many MACs.

    Attributes:
      config: of the one found: the lowest loss within half of the whole network's MACs.
      found: its accuracy on test rows.
      drawn: theirs.
      others: their configurations.
    """

    config: Config
    found: float
    drawn: tuple[float, ...]
    others: tuple[Config, ...]


def beside(net: Supernet, model: ViT, log: Log, rows: Labelled, seed: int) -> Beside:
    """Of a search by loss and MACs.

    Raises:
      ConfigError: none that was measured has as few MACs.
    """
    vectors, values = measured(log)
    limit = HALF * worst(["macs"])[0]
    config = net.space.decode(vectors[best_within(values, COUNTED[0], {"macs": limit})])
    others = alike(net, config, seed, DRAWS)
    found, *drawn = accuracy(net, model, [config, *others], rows)
    return Beside(config, found, tuple(drawn), tuple(others))


class Chosen(NamedTuple):
    """A network that was found, as one that was loaded from its files.

    Attributes:
      config: what it is.
      model: itself, loaded.
      said: latency that a predictor gives which saw all other networks measured, over the whole
        network's.
      searched: latency that the search measured.
      again: latency of the loaded model, in turns with the whole network.
      change: largest difference of its outputs from the super-network's by masks, relative to the
        largest output.
      kept: whether the loaded model's outputs are those of the one that was saved, bit for bit.
      counts: MACs and bytes that the search was told, and those of the loaded model.
    """

    config: Config
    model: Any
    said: float
    searched: float
    again: Spread
    change: float
    kept: bool
    counts: tuple[tuple[float, float], tuple[int, int]]


def chosen(
    net: Supernet, model: ViT, log: Log, measure: Measure, rows: Labelled, *, turns: int = 101
) -> Chosen:
    """The best network of three quarters of the latency: cut out, saved, loaded and timed.

    Args:
      net, model: the super-network and its weights.
      log: of the search by loss and latency.
      measure: which remembers what the search was told.
      rows: that latencies are of.
      turns: of the loaded network and the whole one.
    Raises:
      ConfigError: none that was measured is as quick.
    """
    vectors, values = measured(log)
    row = best_within(values, TIMED, {"latency": FAST})
    rest = np.arange(len(vectors)) != row
    features = net.space.one_hot(vectors)
    said = predict(fit(features[rest], values[rest, 1]), features[row : row + 1])[0]
    config, x = net.space.decode(vectors[row]), jnp.asarray(rows.x)
    told = measure(config)
    small = net.cut(model, config)
    with tempfile.TemporaryDirectory() as folder:
        formats.save(small, f"{folder}/net", format="ffnlab")
        loaded = formats.load(f"{folder}/net")
    masked = jax.jit(lambda model, chosen, x: net.formed(model, chosen)(x))
    want = np.asarray(masked(model, net.numbers(config), x))
    run = jax.jit(lambda model, x: model(x))
    cut, again = (np.asarray(run(one, x)) for one in (small, loaded))
    return Chosen(
        config,
        loaded,
        float(said),
        float(values[row, 1]),
        meter(model, x, turns=turns)(loaded).ratio,
        float(np.abs(cut - want).max() / np.abs(want).max()),
        np.array_equal(cut, again),
        ((told["macs"], told["bytes"]), (macs(loaded, x), tree.nbytes(loaded))),
    )


class Found(NamedTuple):
    """What was found in the super-networks.

    Attributes:
      models: the super-networks, by seed.
      counted: searches by loss and MACs, and by loss and bytes.
      timed: searches by loss and latency, with the first seed, by tactic.
      told: how predictors of the random searches tell of LINAS's networks, by seed, of "loss" (both
        searches), "macs" and "bytes".
      besides: what LINAS found, beside networks of as many MACs, by seed.
      chosen: the network that was loaded again.
    """

    models: Sequence[ViT]
    counted: Counted
    timed: Mapping[str, Log]
    told: Mapping[str, Sequence[Foretold]]
    besides: Sequence[Beside]
    chosen: Chosen
