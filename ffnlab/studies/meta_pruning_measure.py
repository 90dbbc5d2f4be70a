"""What the study of meta pruning measures on digits: nets pruned with and without a metanetwork.

Nets that the metanetwork learns from, and others that it never saw, are trained alike. Three sides
prune the latter by group norms: at once, after training on, and after a correction and training on.
All take as many steps in all. Rates of training on are chosen for every net, side and speed-up by
itself, on validation rows that nobody trains on. Nets of a stage learn side by side, what is taken
out of them being a mask on their weights; in the end they are cut.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from ffnlab import formats, tree
from ffnlab.data import ArrayBatches, Labelled, digits
from ffnlab.layers import MLP
from ffnlab.learning import backprop, labelled, members
from ffnlab.models import MetaNetwork, MetaNetworkConfig, masked, narrow
from ffnlab.parallel import LoopOptions, train
from ffnlab.pruning import corrected, lesson, meta_loss, removal_steps, to_budget
from ffnlab.pruning.group_norm import Kept, products
from ffnlab.pruning.meta import Lessons
from ffnlab.rule import Rule
from ffnlab.studies import tuning
from ffnlab.studies.side_by_side import learned_members
from ffnlab.studies.tuning import Splits
from ffnlab.weights import Dense, Masked

__all__ = [
    "CORRECTED",
    "PLAIN",
    "RATES",
    "SIDES",
    "SIZES",
    "SPEED_UPS",
    "TRAINED",
    "Meta",
    "Point",
    "accuracies",
    "data_of",
    "left_of",
    "meta_trained",
    "networks",
    "points",
    "work_left",
]

# What is done to a net before group norm takes its units out.
PLAIN, TRAINED, CORRECTED = "pruned as it is", "trained on before", "corrected before"
SIDES = (PLAIN, TRAINED, CORRECTED)
SIZES, SPEED_UPS = (64, 48, 48, 10), (2.0, 4.0, 8.0, 16.0)
RATES = (0.01, 0.03, 0.1, 0.2, 0.5, 1.0)
BATCH, DECAY = 128, 5e-4  # of training on, the authors'
NET_STEPS, NET_RATE, NET_BATCH = 1500, 1e-3, 64
META = MetaNetworkConfig(nodes=1, edges=1, layers=3, width=16, ratio=0.05)
REG, META_RATE = 0.003, 1e-3


class Meta(NamedTuple):
    """A trained metanetwork.

    Attributes:
      network: it.
      before, after: "data" and "penalty", means over the nets it learns from.
    """

    network: MetaNetwork
    before: Mapping[str, float]
    after: Mapping[str, float]


class Point(NamedTuple):
    """A net pruned to a speed-up by one side.

    Attributes:
      side: one of `SIDES`.
      net: number among those held out.
      speed_up: asked for; the multiplications that are left are at most as many.
      sizes: hidden widths that are left.
      whole: test accuracy before pruning.
      at_once: of the side's net where it is pruned without any training on.
      raw: after pruning.
      tuned: after training on what is left.
      form: the net after that, masked.
      kept: which units it has.
      rates: of training on before and after, 0 for none.
    """

    side: str
    net: int
    speed_up: float
    sizes: tuple[int, ...]
    whole: float
    at_once: float
    raw: float
    tuned: float
    form: MLP
    kept: Kept
    rates: tuple[float, float]


class Begun(NamedTuple):
    """A net as a side has it before it is pruned, at one rate of training on, and what stays of it.

    Attributes:
      side, net, speed_up: see `Point`.
      rate: 0 where it was not trained on.
      whole: the net.
      kept: the units that stay.
    """

    side: str
    net: int
    speed_up: float
    rate: float
    whole: MLP
    kept: Kept

    @property
    def pruned(self) -> MLP:
        """The net with the other units masked."""
        return off(self.whole, self.kept)


def data_of(seed: int) -> Splits:
    """Digits as rows, a fifth of the training rows for validation."""
    return tuning.splits(digits(seed), seed=seed)


def networks(data: Splits, count: int, seed: int) -> list[MLP]:
    """So many trained nets, each of a draw of its own."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))
    start = jax.vmap(lambda key: MLP(SIZES, key=key))(keys)
    rule = members(lambda: backprop(labelled, optax.adam(NET_RATE)), count)
    batches = ArrayBatches(data.train, NET_BATCH, seed)
    return learned_members(rule, start, batches, NET_STEPS, seed, count)


def meta_trained(nets: Sequence[MLP], data: Splits, epochs: int, seed: int) -> Meta:
    """A metanetwork that learned from nets, each once an epoch.

    Raises:
      KeyboardInterrupt: a signal stopped it.
    """
    loss = meta_loss(reg=REG)
    lessons = Lessons([lesson(net, tuple(data.train)) for net in nets])
    asked = jax.jit(loss)

    def evaluate(state: PyTree) -> dict[str, float]:
        found = [asked(state.model, one)[1] for one in lessons.lessons]
        return {name: float(np.mean([f[name] for f in found])) for name in ("data", "penalty")}

    rule = backprop(loss, optax.adamw(META_RATE, weight_decay=DECAY))
    start, steps = META.make(key=jax.random.key(seed + 1)), epochs * len(nets)
    options = LoopOptions(log_every=0, evaluate_at=(0,))
    key = jax.random.key(seed)
    outcome = train(rule, start, lessons, steps, key=key, evaluate=evaluate, options=options)
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {steps}")
    told = outcome.evaluations
    return Meta(rule.model(outcome.state), told[0], told[steps])


def points(
    nets: Sequence[MLP], meta: MetaNetwork, data: Splits, steps: int, seed: int
) -> list[Point]:
    """Every net, pruned by every side to every speed-up.

    Args:
      nets: held out.
      meta: the metanetwork.
      data: to train on, to choose by and to report.
      steps: of training on before and after pruning; twice as many after where there are none
        before.
      seed: of the order of rows.
    """
    count = len(nets)
    fixed = [corrected(meta, net) for net in nets]
    on = trained_on([*nets, *fixed], data, steps, seed)
    begun = [each for i, net in enumerate(nets) for each in cuts(PLAIN, i, 0.0, net)]
    for side, first in ((TRAINED, 0), (CORRECTED, count)):
        for i in range(count):
            for rate, net in zip(RATES, on[first + i], strict=True):
                begun += cuts(side, i, rate, net)
    alone = [each for i, net in enumerate(fixed) for each in cuts(CORRECTED, i, 0.0, net)]
    at_once = {(e.side, e.net, e.speed_up): e.pruned for e in [*begun[: len(alone)], *alone]}
    chosen = best_of(begun, data)
    plain = [each for each in chosen if each.side == PLAIN]
    others = [each for each in chosen if each.side != PLAIN]
    runs = trained_on([each.pruned for each in plain], data, 2 * steps, seed + 1)
    runs += trained_on([each.pruned for each in others], data, steps, seed + 1)
    chosen = [*plain, *others]
    starts = {PLAIN: PLAIN, TRAINED: PLAIN, CORRECTED: CORRECTED}
    once = [at_once[starts[e.side], e.net, e.speed_up] for e in chosen]
    judged = accuracies([net for each in runs for net in each], data.validation)
    picks = judged.reshape(len(chosen), len(RATES)).argmax(1)
    forms = [each[pick] for each, pick in zip(runs, picks, strict=True)]
    columns = ([each.whole for each in chosen], once, [each.pruned for each in chosen], forms)
    figures = np.stack([accuracies(nets, data.test) for nets in columns], axis=1)
    return [
        Point(
            each.side,
            each.net,
            each.speed_up,
            tuple(int(stays.sum()) for stays in each.kept.values()),
            float(row[0]),
            float(row[1]),
            float(row[2]),
            float(row[3]),
            form,
            each.kept,
            (each.rate, RATES[pick]),
        )
        for each, row, form, pick in zip(chosen, figures, forms, picks, strict=True)
    ]


def cuts(side: str, number: int, rate: float, net: MLP) -> list[Begun]:
    """A net with the units that stay of it, at every speed-up."""
    order = removal_steps(net)
    return [Begun(side, number, s, rate, net, to_budget(net, order, s)) for s in SPEED_UPS]


def best_of(begun: Sequence[Begun], data: Splits) -> list[Begun]:
    """Of every side, net and speed-up the rate that is best on validation rows when pruned."""
    judged = accuracies([each.pruned for each in begun], data.validation)
    best: dict[tuple, tuple[float, Begun]] = {}
    for value, each in zip(judged, begun, strict=True):
        known = best.get(each[:3])
        if known is None or value > known[0]:
            best[each[:3]] = float(value), each
    return [each for _, each in best.values()]


def off(net: MLP, kept: Kept) -> MLP:
    """The net with what is not kept masked, in training too."""
    numbers = {name: jnp.asarray(stays, jnp.float32) for name, stays in kept.items()}
    marks = masked(jax.tree.map(jnp.ones_like, net), numbers)
    new = tree.copy(net)
    for linear, mark in zip(new.maps, marks.maps, strict=True):
        linear.w.set_value(Masked(linear.weight, mark.weight.dense() > 0))
    return new


def left_of(point: Point) -> tuple[MLP, float]:
    """The net that is left of a point, cut, saved and loaded; how far its scores are from those of
    the masked one, for numbers in 0..1."""
    small = narrow(point.form, point.kept)
    for linear in small.maps:
        linear.w.set_value(Dense(linear.weight.dense()))
    with tempfile.TemporaryDirectory() as folder:
        formats.save(small, Path(folder) / "net", format="ffnlab")
        small = formats.load(Path(folder) / "net", progress=False)
    x = jax.random.uniform(jax.random.key(0), (64, SIZES[0]))
    return small, float(jnp.abs(small(x) - point.form(x)).max())


def descent(steps: int) -> Callable[[float | Array], Rule]:
    """SGD as the authors train on: momentum .9, a tenth of the rate from 60 % on, and again from
    90 %."""
    drops = {int(0.6 * steps): 0.1, int(0.9 * steps): 0.1}
    paced = optax.piecewise_constant_schedule(1.0, drops)
    chain = optax.add_decayed_weights(DECAY), optax.sgd(paced, momentum=0.9)
    return lambda rate: backprop(labelled, optax.chain(*chain, optax.scale(rate)))


def trained_on(nets: Sequence[MLP], data: Splits, steps: int, seed: int) -> list[list[MLP]]:
    """Every net trained on at each rate."""
    count = len(nets) * len(RATES)
    start = stacked([net for net in nets for _ in RATES])
    rule = members(descent(steps), count, vary={"rate": list(RATES) * len(nets)})
    batches = ArrayBatches(data.train, BATCH, seed)
    found = learned_members(rule, start, batches, steps, seed, count)
    return [found[i : i + len(RATES)] for i in range(0, count, len(RATES))]


def stacked(nets: Sequence[MLP]) -> MLP:
    """Nets as one, leaves [n, …]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *nets)


@jax.jit
def right(nets: MLP, x: Array, y: Array) -> Array:
    """Share of right answers of each of several nets."""
    return jax.vmap(lambda net: jnp.mean(net(x).argmax(-1) == y))(nets)


def accuracies(nets: Sequence[MLP], rows: Labelled) -> np.ndarray:
    """Of nets of one structure, [n]."""
    return np.asarray(right(stacked(nets), jnp.asarray(rows.x), jnp.asarray(rows.y)))


def work_left(point: Point, small: MLP) -> float:
    """How many times fewer multiplications a net does that is left of a point."""
    return products(point.form) / products(small)
