"""Tasks one after the other: by hypernetworks that keep what they gave, and without.

All settings and seeds of a side are members of one rule. After each task every member is scored on
all tasks, those that it has not learned included.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree

from ffnlab.data import ArrayBatches, Labelled
from ffnlab.data.tasks import permuted, split
from ffnlab.learning import (
    ContinualOptions,
    ContinualState,
    TaskRows,
    backprop,
    continual,
    labelled,
    members,
)
from ffnlab.models import Condition, Hypernet, HypernetConfig, HypernetSpec, MLPConfig, Tasked
from ffnlab.models.hypernet import generator
from ffnlab.parallel import LoopOptions, train
from ffnlab.rule import Rule
from ffnlab.studies.tuning import Setting, Splits, Tuned, numbers, splits

__all__ = [
    "APART",
    "CHAINED",
    "EACH",
    "FINE",
    "SIDES",
    "Case",
    "Followed",
    "dependency",
    "followed",
    "permuted_case",
    "split_case",
    "tuned",
]

FINE, EACH = "fine-tuning", "a network for each task"
APART, CHAINED = "chunks apart", "chunks in a chain"
SIDES = (FINE, EACH, APART, CHAINED)


class Scores(NamedTuple):
    """What a member knows after each task.

    Attributes:
      validation, test: [after, of], accuracy on the rows of a task.
    """

    validation: Float[np.ndarray, "tasks tasks"]
    test: Float[np.ndarray, "tasks tasks"]

    @property
    def final(self) -> float:
        """Mean accuracy on the test rows of all tasks at the end."""
        return float(self.test[-1].mean())

    @property
    def lost(self) -> float:
        """Mean of what a task's accuracy fell by since it was learned."""
        return float((np.diag(self.test) - self.test[-1]).mean())


@dataclasses.dataclass(frozen=True)
class Case:
    """Tasks in their order.

    Attributes:
      tasks: rows of each.
      target: of all.
      chunk: weights of a chunk.
      embedding: numbers for a task, and for a chunk.
      steps, batch: of each task.
    """

    tasks: Sequence[Splits]
    target: MLPConfig
    chunk: int
    embedding: int
    steps: int
    batch: int = 128

    def spec(self, side: str) -> HypernetSpec:
        """The hypernetwork of a side."""
        kind = {"architecture": "rnn", "hidden": (32,)} if side == CHAINED else {"hidden": (50, 50)}
        sizes = {"tasks": len(self.tasks), "embedding": self.embedding, "chunk": self.chunk}
        return HypernetSpec(outputs="chunk_wise", **sizes, **kind)


def permuted_case(
    data: tuple[Labelled, Labelled], *, tasks: int, hidden: int, chunk: int, steps: int, seed: int
) -> Case:
    """Tasks that differ in the order of their inputs."""
    width = data[0].x.shape[1]
    found = [splits(task, seed=seed) for task in permuted(*data, tasks=tasks, seed=seed)]
    return Case(found, MLPConfig((width, hidden, hidden, 10)), chunk, 16, steps)


def split_case(
    data: tuple[Labelled, Labelled], *, hidden: int, chunk: int, steps: int, seed: int
) -> Case:
    """Five tasks of two classes each; what is given for a task has two scores."""
    pairs = [(2 * i, 2 * i + 1) for i in range(5)]
    found = [splits(task, seed=seed) for task in split(*data, classes=pairs)]
    width = data[0].x.shape[1]
    return Case(found, MLPConfig((width, hidden, hidden, 2)), chunk, 16, steps)


class Followed(NamedTuple):
    """A side that learned the tasks of a case.

    Attributes:
      scores: of every member, by the numbers of its setting and by seed.
      state: of all members at the end, in that order.
      size: numbers that a member learned.
    """

    scores: dict[tuple[tuple[float, ...], int], Scores]
    state: PyTree
    size: int


def followed(case: Case, side: str, settings: Sequence[Setting], seeds: Sequence[int]) -> Followed:
    """One side at every setting, with every seed.

    Args:
      case: the tasks.
      side: `FINE`, `EACH`, `APART` or `CHAINED`.
      settings: "rate" of Adam; of hypernetworks "beta" too, before it.
      seeds: of networks; the first one orders rows.
    """
    runs = [(tuple(setting.values()), seed) for setting in settings for seed in seeds]
    keys = jnp.stack([jax.random.key(seed) for _, seed in runs])
    make, rule_of = making(case, side)
    by_name = zip(*(values for values, _ in runs), strict=True)
    rule = members(rule_of, len(runs), vary=dict(zip(settings[0], by_name, strict=True)))
    model = jax.jit(jax.vmap(make))(keys)
    after: list[tuple[np.ndarray, np.ndarray]] = []

    def look(state: PyTree) -> dict[str, float]:
        after.append(known(case, side, rule.model(state)))
        return {}

    count = 1 if side == EACH else len(case.tasks)
    ends = tuple(case.steps * (i + 1) for i in range(count))
    options = LoopOptions(log_every=0, evaluate_at=ends, progress=False)
    common = {"key": jax.random.key(seeds[0]), "options": options, "together": 25}
    batches = functools.partial(rows_at, sources(case, seeds[0]), side, case.steps)
    outcome = train(rule, model, batches, ends[-1], evaluate=look, **common)
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {ends[-1]}")
    after = after * len(case.tasks) if side == EACH else after
    validation, test = (np.stack(part, 1) for part in zip(*after, strict=True))
    scores = {run: Scores(validation[i], test[i]) for i, run in enumerate(runs)}
    one = jax.tree.map(lambda leaf: leaf[0], model)
    return Followed(scores, outcome.state, numbers(one))


def making(case: Case, side: str) -> tuple[Callable[[Array], PyTree], Callable[..., Rule]]:
    """(key -> what a side learns, numbers of a setting by their names -> its rule)."""
    if side in (APART, CHAINED):
        config = HypernetConfig(case.target, case.spec(side))
        make = lambda key: config.make(key=key)  # noqa: E731
        return make, lambda beta, rate: continual(
            ContinualOptions(beta=beta), labelled, optax.adam(rate)
        )
    if side == FINE:
        make = lambda key: case.target.make(key=key)  # noqa: E731
        loss = lambda model, batch: labelled(model, batch.rows)  # noqa: E731
    else:
        keys = functools.partial(jax.random.split, num=len(case.tasks))
        make = lambda key: jax.vmap(lambda k: case.target.make(key=k))(keys(key))  # noqa: E731
        loss = of_all
    return make, lambda rate: backprop(loss, optax.adam(rate))


def of_all(models: PyTree, batch: tuple[Array, Array]) -> tuple[Array, dict[str, Array]]:
    """The mean over tasks of what each network's answers cost."""
    costs = jax.vmap(lambda model, x, y: labelled(model, (x, y))[0])(models, *batch)
    return costs.mean(), {}


def sources(case: Case, seed: int) -> list[ArrayBatches]:
    """Batches of each task."""
    return [ArrayBatches(task.train, case.batch, seed) for task in case.tasks]


def rows_at(found: Sequence[ArrayBatches], side: str, steps: int, position: int) -> PyTree:
    """What a side takes at a position: rows of the present task, or of all."""
    if side == EACH:
        rows = [source(position) for source in found]
        return tuple(np.stack(part) for part in zip(*rows, strict=True))
    task = position // steps
    return TaskRows(np.int32(task), tuple(found[task](position % steps)))


def known(case: Case, side: str, models: PyTree) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy [members, tasks] on validation and test rows."""

    def right(model: PyTree, task: Array, x: Array, y: Array) -> Array:
        if side in (APART, CHAINED):
            scores = model(Tasked(x, task))
        elif side == EACH:
            scores = jax.tree.map(lambda leaf: leaf[task], model)(x)
        else:
            scores = model(x)
        return jnp.mean(scores.argmax(-1) == y)

    score = jax.jit(lambda models, *rows: jax.lax.map(lambda m: right(m, *rows), models))
    found = [
        [score(models, jnp.int32(i), *map(jnp.asarray, rows)) for i, rows in enumerate(part)]
        for part in ([t.validation for t in case.tasks], [t.test for t in case.tasks])
    ]
    return tuple(np.stack(part, 1) for part in found)


def tuned(found: Followed, settings: Sequence[Setting], seeds: Sequence[int]) -> Tuned:
    """A side at the setting that the first seed's validation rows choose, at the end.

    Args:
      found: its runs.
      settings: those to choose from.
      seeds: of the runs.
    """
    values = [tuple(setting.values()) for setting in settings]
    first = [float(found.scores[v, seeds[0]].validation[-1].mean()) for v in values]
    best = first.index(max(first))
    scores = tuple(found.scores[values[best], seed].final for seed in seeds)
    tried = tuple(zip(settings, first, strict=True))
    return Tuned(settings[best], tried, found.size, 0, tuple(seeds), scores)


def dependency(net: Hypernet) -> tuple[Bool[np.ndarray, "K K"], Bool[np.ndarray, "K K"]]:
    """([k, j] whether chunk k depends on the embedding of chunk j, j <= k)."""

    def through(u: Array) -> Array:
        h = generator.run_trunk(net.spec, net.trunk, u)
        return generator.pieces_from(net.spec, net.heads, h)[:, :8]

    slopes = jax.jit(jax.jacobian(through))(net.calls(Condition(task=0)))
    found = np.asarray(jnp.abs(slopes).sum((1, 3)) > 0)
    k, j = np.indices(found.shape)
    return found, j <= k


def one_of(state: Any, member: int) -> ContinualState:
    """The state of a member."""
    return jax.tree.map(lambda leaf: leaf[member], state)
