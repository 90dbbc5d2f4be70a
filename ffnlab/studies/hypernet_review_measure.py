"""Networks for several tasks, by hypernetworks and without: data, runs of all settings, scores.

The settings of a side and the seeds are members of one rule, so that each side is one program. A
side is tried at every rate and after so many steps, so that none is judged by steps that suit
another.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from ffnlab.data import Labelled, vowels
from ffnlab.data.folders import find_folder
from ffnlab.layers import MLP
from ffnlab.learning import backprop, generated, labelled, members
from ffnlab.models import Condition, HypernetConfig, HypernetSpec, MLPConfig
from ffnlab.parallel import LoopOptions, train
from ffnlab.studies.tuning import Tuned, numbers

__all__ = [
    "CHUNKS",
    "ONCE",
    "ONE",
    "OWN",
    "SIDES",
    "TOLD",
    "Case",
    "activations",
    "reduction",
    "regression",
    "speech",
    "tuned",
    "vowels_are_there",
]

OWN, ONE, TOLD = "a network each", "one network", "one network, told the task"
ONCE, CHUNKS = "all at once", "in chunks"
SIDES = (OWN, ONE, TOLD, ONCE, CHUNKS)
SPECS = {
    ONCE: HypernetSpec(tasks=4, embedding=8, hidden=(64,)),
    CHUNKS: HypernetSpec(outputs="chunk_wise", tasks=4, embedding=8, hidden=(64,), chunk=128),
}
TASKS, INPUTS, HIDDEN = 4, 8, 32
NOISE, APART, STEEP = 0.05, 0.25, 0.4


class Rows(NamedTuple):
    """Rows of all tasks.

    Attributes:
      x: [tasks, n, d].
      y: [tasks, n, 1] targets, or [tasks, n] classes.
    """

    x: Float[np.ndarray, "tasks n d"]
    y: Float[np.ndarray, "tasks n 1"] | Int[np.ndarray, "tasks n"]


@dataclasses.dataclass(frozen=True)
class Case:
    """Tasks of each seed, and what is asked of networks.

    Attributes:
      train: by seed, what a step takes at a position: (x, y) of all tasks.
      validation, test: by seed and task, rows.
      outputs: of a network.
      classes: whether outputs are scores of classes; else a number, judged by its squared error.
    """

    train: Sequence[Callable[[int], Rows]]
    validation: Sequence[Sequence[Labelled]]
    test: Sequence[Sequence[Labelled]]
    outputs: int
    classes: bool

    @property
    def width(self) -> int:
        """Numbers in an input."""
        return self.test[0][0].x.shape[1]


def regression(samples: int, seeds: Sequence[int]) -> Case:
    """y = sin(0.4 x.(w_0 + w_t / 4)) + noise, of four tasks t; x, w_0 and w_t are of N(0, I_8).

    Args:
      samples: of each task, to learn from; 200 are for validation, 2,000 for the test.
      seeds: of the functions, inputs and noise.
    """

    def drawn(seed: int) -> tuple[Rows, Rows, Rows]:
        random = np.random.default_rng(seed)
        common, own = random.standard_normal(INPUTS), random.standard_normal((TASKS, INPUTS))
        parts = []
        for count in (samples, 200, 2000):
            x = random.standard_normal((TASKS, count, INPUTS))
            y = np.sin(STEEP * np.einsum("tnd,td->tn", x, common + APART * own))
            y = y + NOISE * random.standard_normal(y.shape)
            parts.append(Rows(x.astype(np.float32), y[..., None].astype(np.float32)))
        return tuple(parts)

    found = [drawn(seed) for seed in seeds]
    by_task = lambda rows: [Labelled(*pair) for pair in zip(*rows, strict=True)]  # noqa: E731
    return Case(
        [lambda _, rows=rows: rows for rows, _, _ in found],
        [by_task(rows) for _, rows, _ in found],
        [by_task(rows) for _, _, rows in found],
        1,
        False,
    )


def vowels_are_there() -> bool:
    """Whether the vowels are."""
    return find_folder("vowels") is not None


def speech(speakers: int | None, batch: int, seeds: Sequence[int]) -> Case:
    """Twelve vowels of boys, girls, men and women (Hillenbrand et al. 1995): four tasks.

    A fifth of each group's speakers is for the test, another for validation. Inputs are logarithms
    of the five measurements, less the mean of what is learned from, over its deviation.

    Args:
      speakers: of each group, to learn from; all others when None.
      batch: rows of each task in a step.
      seeds: of who is in which part, and of the order of rows.
    """
    data = vowels()
    whole: Any = np.isfinite(data.x).all(1)

    def parts_of(group: int, random: np.random.Generator) -> list[np.ndarray]:
        who = random.permutation(np.unique(data.speaker[data.group == group]))
        fifth = round(len(who) / 5)
        mine = who[2 * fifth :][:speakers]
        return [
            whole & np.isin(data.speaker, chosen)
            for chosen in (mine, who[fifth : 2 * fifth], who[:fifth])
        ]

    def drawn(seed: int) -> tuple[list[Labelled], list[Labelled], list[Labelled]]:
        random = np.random.default_rng(seed)
        parts = [parts_of(group, random) for group in range(len(data.groups))]
        logs = np.log(np.nan_to_num(data.x, nan=1.0))
        learned = np.concatenate([logs[part[0]] for part in parts])
        x = ((logs - learned.mean(0)) / learned.std(0)).astype(np.float32)
        return tuple([Labelled(x[part[i]], data.y[part[i]]) for part in parts] for i in range(3))

    found = [drawn(seed) for seed in seeds]

    def taken(tasks: list[Labelled], seed: int, position: int) -> Rows:
        random = np.random.default_rng((seed, position))
        chosen = [task_rows(task, batch, random) for task in tasks]
        return Rows(*(np.stack(part) for part in zip(*chosen, strict=True)))

    sources = [
        functools.partial(taken, tasks, seed)
        for (tasks, _, _), seed in zip(found, seeds, strict=True)
    ]
    return Case(sources, [f[1] for f in found], [f[2] for f in found], len(data.names), True)


def task_rows(task: Labelled, batch: int, random: np.random.Generator) -> Labelled:
    """Some rows of a task."""
    chosen = random.integers(0, len(task.x), batch)
    return Labelled(task.x[chosen], task.y[chosen])


def squares(model: Callable, batch: tuple[Array, Array]) -> tuple[Array, dict[str, Array]]:
    """Mean squared error."""
    return jnp.mean((model(batch[0]) - batch[1]) ** 2), {}


def network_of(case: Case, side: str) -> Callable[[Array], PyTree]:
    """key -> what a side learns: networks of all tasks, one network, or a hypernetwork."""
    told = TASKS * (side == TOLD)
    target = MLPConfig((case.width + told, HIDDEN, HIDDEN, case.outputs), "elu")
    if side in SPECS:
        return lambda key: HypernetConfig(target, SPECS[side]).make(key=key)
    if side == OWN:
        return lambda key: jax.vmap(lambda k: target.make(key=k))(jax.random.split(key, TASKS))
    return lambda key: target.make(key=key)


def answers(side: str, model: PyTree, task: Array, x: Float[Array, "n d"]) -> Array:
    """What a side says of rows of a task."""
    if side in SPECS:
        return model.make(task)(x)
    if side == OWN:
        return jax.tree.map(lambda leaf: leaf[task], model)(x)
    return model(with_task(x, task) if side == TOLD else x)


def with_task(x: Float[Array, "n d"], task: Array) -> Float[Array, "n e"]:
    """Rows with the task beside them, one-hot."""
    rows = jnp.broadcast_to(jax.nn.one_hot(task, TASKS), (len(x), TASKS))
    return jnp.concatenate([x, rows], axis=1)


def loss_of(case: Case, side: str) -> Callable:
    """The mean over tasks of what a side's answers cost."""
    cost = labelled if case.classes else squares
    tasks = jnp.arange(TASKS)
    if side in SPECS:
        by_task = generated(cost)
        return lambda model, rows: by_task(model, (tasks, tuple(rows)))

    def loss(model: PyTree, rows: Rows) -> tuple[Array, dict[str, Array]]:
        one = lambda task, x, y: cost(lambda x: answers(side, model, task, x), (x, y))[0]  # noqa: E731
        return jax.vmap(one)(tasks, *rows).mean(), {}

    return loss


def tuned(
    case: Case, side: str, rates: Sequence[float], stops: Sequence[int], seeds: Sequence[int]
) -> tuple[Tuned, dict[tuple[float, int], list[float]]]:
    """One side at its best setting, and the test scores of every setting by seed.

    Args:
      case: the tasks of each seed.
      side: one of `SIDES`.
      rates: of Adam.
      stops: numbers of steps after which a run is looked at, rising.
      seeds: of networks, in the order of those of the case; the first one chooses.
    """
    settings = [(rate, i) for rate in rates for i in range(len(seeds))]
    rule = members(
        lambda rate: backprop(loss_of(case, side), optax.adam(rate)),
        len(settings),
        vary={"rate": [rate for rate, _ in settings]},
        shared_batch=False,
    )
    keys = jnp.stack([jax.random.key(seeds[i]) for _, i in settings])
    model = jax.jit(jax.vmap(network_of(case, side)))(keys)

    def batches(position: int) -> Rows:
        by_seed = [source(position) for source in case.train]
        return jax.tree.map(lambda *rows: np.stack(rows), *(by_seed[i] for _, i in settings))

    found: dict[int, list[tuple[float, float]]] = {}

    def look(state: PyTree) -> dict[str, float]:
        stop = [s for s in stops if s not in found][0]
        found[stop] = judged(case, side, rule.model(state), settings)
        return {}

    options = LoopOptions(log_every=0, evaluate_at=tuple(stops), progress=False)
    common = {"key": jax.random.key(seeds[0]), "options": options, "together": 50}
    outcome = train(rule, model, batches, stops[-1], evaluate=look, **common)
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {stops[-1]}")
    one = jax.tree.map(lambda leaf: leaf[0], model)
    scores = {
        (rate, stop): [found[stop][settings.index((rate, i))] for i in range(len(seeds))]
        for rate in rates
        for stop in stops
    }
    return chosen(case, scores, numbers(one), seeds)


def chosen(
    case: Case,
    scores: dict[tuple[float, int], list[tuple[float, float]]],
    size: int,
    seeds: Sequence[int],
) -> tuple[Tuned, dict[tuple[float, int], list[float]]]:
    """The setting that the first seed's validation rows choose, see `tuned`."""
    pick = max if case.classes else min
    best = pick(scores, key=lambda setting: scores[setting][0][0])
    named = lambda setting: {"rate": setting[0], "steps": setting[1]}  # noqa: E731
    tried = [(named(setting), pairs[0][0]) for setting, pairs in scores.items()]
    test = {setting: [pair[1] for pair in pairs] for setting, pairs in scores.items()}
    found = Tuned(named(best), tried, size, 0, tuple(seeds), tuple(test[best]))
    return found, test


def judged(
    case: Case, side: str, models: PyTree, settings: Sequence[tuple[float, int]]
) -> list[tuple[float, float]]:
    """(validation, test) of every member: the mean over tasks."""
    say = jax.jit(functools.partial(answers, side))

    def score(model: PyTree, tasks: Sequence[Labelled]) -> float:
        each = []
        for i, rows in enumerate(tasks):
            y = np.asarray(say(model, jnp.int32(i), jnp.asarray(rows.x)))
            right = y.argmax(-1) == rows.y if case.classes else (y - rows.y) ** 2
            each.append(float(np.mean(right)))
        return float(np.mean(each))

    found = []
    for member, (_, i) in enumerate(settings):
        model = jax.tree.map(lambda leaf, member=member: leaf[member], models)
        found.append((score(model, case.validation[i]), score(model, case.test[i])))
    return found


def activations(init: str, seed: int) -> tuple[list[float], list[float]]:
    """(variance of each layer's weights over 2 / in, deviation of its activations) at the start.

    Six layers of 64 units that a hypernetwork gives at once, on rows of N(0, I).

    Args:
      init: see `HypernetSpec`.
      seed: of the draw.
    """
    spec = HypernetSpec(init=init, hidden=(64,), embedding=16)
    keys = jax.random.split(jax.random.key(seed))
    make = jax.jit(lambda key: HypernetConfig(MLPConfig((64,) * 7), spec).make(key=key).make(0))
    target: MLP = make(keys[0])
    h: Any = jax.random.normal(keys[1], (256, 64))
    spreads = []
    for stage in target.stages:
        h = stage(h)
        spreads.append(float(h.std()))
    return [float(linear.weight.dense().var()) * 32 for linear in target.maps], spreads


def reduction(steps: int, seed: int) -> float:
    """The largest difference of losses between a network and Theta = Phi, under Adam."""
    key, random = jax.random.key(seed), np.random.default_rng(seed)
    batch = (random.standard_normal((64, 8), np.float32), np.arange(64) % 3)
    target = MLPConfig((8, HIDDEN, 3), "elu")
    whole = HypernetConfig(target, HypernetSpec((), architecture="linear")).make(key=key)
    losses = []
    for model in (whole, jax.jit(lambda net: net.make(Condition()))(whole)):
        rule = backprop(labelled, optax.adam(1e-2))
        state, found = rule.init(model, key), []
        for _ in range(steps):
            state, metrics = rule.step(state, batch)
            found.append(float(metrics["loss"]))
        losses.append(np.array(found))
    return float(np.abs(losses[0] - losses[1]).max())
