"""What the study of transformable architecture search measures on digits: searches, and trainings.

Members run side by side. A network of fewer channels learns as the whole one in which the others
are zero: they give nothing, and no gradient reaches them through a ReLU. So networks of all shapes
are members of one run, and what they are is cut out of it (`models.narrow`).
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from ffnlab.data import ArrayBatches, Labelled, Zipped
from ffnlab.layers import MLP
from ffnlab.learning import backprop, members
from ffnlab.losses import Taught, distilled, labelled
from ffnlab.models import narrow
from ffnlab.parallel import LoopOptions, train
from ffnlab.pruning import TASOptions, TASState, tas
from ffnlab.pruning.search import Space, Variable, drawn_alike
from ffnlab.pruning.tas.network import likely
from ffnlab.pruning.tas.sites import sites_of
from ffnlab.pruning.tas.work import work_of
from ffnlab.rule import Rule
from ffnlab.studies.tuning import Splits

__all__ = [
    "RANDOM",
    "RATIOS",
    "SEARCHED",
    "WHOLE",
    "Search",
    "Trained",
    "random_shapes",
    "searched",
    "share",
    "taught",
    "trained_alike",
]

WHOLE = (64, 64, 64, 10)
RATIOS = tuple(i / 10 for i in range(1, 11))
BATCH, PER_EPOCH = 57, 10
SEARCHED, RANDOM = "searched", "random"
EXAMPLE = jax.ShapeDtypeStruct((1, WHOLE[0]), jnp.float32)

Shape = tuple[int, ...]  # channels of an MLP, from its inputs to its outputs
Case = tuple[float, int]  # target and seed


class Search(NamedTuple):
    """Searches, one for each target and seed.

    Attributes:
      cases: (target, seed) of every member.
      ratio: multiply-adds of the most likely network after every epoch, over those of the whole
        one, [epochs, members].
      expected: that of the expectation, likewise.
      widths: channels of the hidden layers, [epochs, members, layers].
      networks: what was found.
      apart: largest difference between logits of what was found and of the search network with the
        same sizes, over the largest logit, on test rows, of all members.
    """

    cases: list[Case]
    ratio: Float[np.ndarray, "epochs members"]
    expected: Float[np.ndarray, "epochs members"]
    widths: Int[np.ndarray, "epochs members layers"]
    networks: list[MLP]
    apart: float

    def shapes(self, target: float) -> list[Shape]:
        """What was found at a target, by seed."""
        pairs = zip(self.cases, self.networks, strict=True)
        return [tuple(net.sizes) for (t, _), net in pairs if t == target]


def share(sizes: Sequence[int]) -> float:
    """Multiply-adds of an MLP over those of the whole one.

    >>> share((64, 64, 64, 10))
    1.0
    """
    count = lambda s: sum(a * b for a, b in zip(s, s[1:], strict=False))  # noqa: E731
    return count(sizes) / count(WHOLE)


def looking_for(steps: int, target: float | Array) -> Rule:
    """The rule of one search; strength and rate of the sizes are the card's for so few steps."""
    sizes = {"target": target, "strength": 20.0, "rate": 0.05}
    options = TASOptions(ratios=RATIOS, depth=False, **sizes)
    return tas(labelled, example=EXAMPLE, steps=steps, options=options)


def networks_of(shapes: Sequence[Sequence[int]], seeds: Sequence[int]) -> MLP:
    """MLPs of some shapes as members of the whole one's, the channels that they lack zero."""
    drawn = [MLP(s, key=jax.random.key(k)) for s, k in zip(shapes, seeds, strict=True)]
    largest = jax.eval_shape(lambda: MLP(WHOLE, key=jax.random.key(0)))

    def widened(like: jax.ShapeDtypeStruct, *leaves: Array) -> Array:
        ends = (
            [(0, a - b) for a, b in zip(like.shape, leaf.shape, strict=True)] for leaf in leaves
        )
        return jnp.stack([jnp.pad(leaf, end) for leaf, end in zip(leaves, ends, strict=True)])

    parts = [jax.tree.leaves(net) for net in drawn]
    leaves = [widened(*each) for each in zip(jax.tree.leaves(largest), *parts, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(largest), leaves)


def run_members(
    rule: Rule, model: PyTree, batches: Callable, steps: int, seed: int, **more: object
) -> PyTree:
    """The state of members after so many steps.

    Raises:
      KeyboardInterrupt: a signal stopped it; what it learned so far is no result.
    """
    options = LoopOptions(log_every=0, progress=False, evaluate_every=int(more.pop("every", 0)))
    key = jax.random.key(seed)
    outcome = train(
        rule, model, batches, steps, key=key, options=options, together=PER_EPOCH, **more
    )
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {steps}")
    return outcome.state


def member(tree: PyTree, i: int) -> PyTree:
    """What of a tree [n, …] is of one member."""
    return jax.tree.map(lambda leaf: leaf[i], tree)


def searched(
    data: Splits, targets: Sequence[float], seeds: Sequence[int], *, epochs: int
) -> Search:
    """Searches at all targets with all seeds of networks and draws.

    Args:
      data: rows; half of the training ones are for the weights, half for the sizes.
      targets: shares of the whole network's multiply-adds.
      seeds: of networks; the first one is of the rest.
      epochs: of `PER_EPOCH` steps.
    """
    cases = [(target, seed) for target in targets for seed in seeds]
    steps, rows = epochs * PER_EPOCH, data.train
    halves = [Labelled(rows.x[i::2], rows.y[i::2]) for i in (0, 1)]
    batches = Zipped(*(ArrayBatches(half, min(BATCH, len(half.x)), seeds[0]) for half in halves))
    make = functools.partial(looking_for, steps)
    rule = members(lambda target: make(target), len(cases), vary={"target": [t for t, _ in cases]})
    whole = MLP(WHOLE, key=jax.random.key(0))
    sites = sites_of(whole, ratios=RATIOS, depth=False)
    cost, seen = work_of(whole, sites, EXAMPLE), []
    expect = jax.jit(
        jax.vmap(lambda a: cost.megamacs(*likely(sites, a), bridges=False) * 1e6 / cost.whole)
    )

    def look(state: TASState) -> dict[str, float]:
        chosen = np.asarray(state.architecture.widths).argmax(-1)
        widths = np.take_along_axis(sites.channels[None], chosen[..., None], 2)[..., 0]
        seen.append((widths, np.asarray(expect(state.architecture))))
        return {}

    start = networks_of([WHOLE] * len(cases), [seed for _, seed in cases])
    given = {"evaluate": look, "every": PER_EPOCH}
    state = run_members(rule, start, batches, steps, seeds[0], **given)
    alone = [make(target).finished(member(state, i)) for i, (target, _) in enumerate(cases)]
    x = jnp.asarray(data.test.x)
    want, had = rule.predict(state, x), jnp.stack([net(x) for net in alone])
    widths = np.stack([widths for widths, _ in seen])
    of = lambda hidden: share((WHOLE[0], *map(int, hidden), WHOLE[-1]))  # noqa: E731
    ratio = np.array([[of(hidden) for hidden in each] for each in widths])
    apart = float(jnp.abs(want - had).max() / jnp.abs(want).max())
    return Search(cases, ratio, np.stack([e for _, e in seen]), widths, alone, apart)


def random_shapes(shapes: Sequence[Shape], seed: int) -> list[Shape]:
    """As many shapes drawn from those that cost as much as these, each within a hundredth."""
    values = [(f"maps[{i}]", tuple(range(1, n + 1))) for i, n in enumerate(WHOLE[1:-1])]
    space = Space(tuple(Variable(name, each) for name, each in values))
    shape = lambda config: (WHOLE[0], *(v for (v,) in config.values()), WHOLE[-1])  # noqa: E731
    rng = np.random.default_rng(seed)
    cost = lambda config: share(shape(config))  # noqa: E731
    return [shape(drawn_alike(space, cost, share(each), rng)) for each in shapes]


class Trained(NamedTuple):
    """Networks that were trained at several rates.

    Attributes:
      rates: that were tried.
      validation: mean accuracy over seeds at each rate.
      test: accuracy at the best of them, of every seed.
      networks: at that rate, by seed, by themselves.
    """

    rates: tuple[float, ...]
    validation: tuple[float, ...]
    test: tuple[float, ...]
    networks: list[MLP]

    @property
    def rate(self) -> float:
        """The best on validation rows."""
        return self.rates[int(np.argmax(self.validation))]


def paced(rate: Array | float, steps: int) -> optax.GradientTransformation:
    """SGD with momentum whose rate falls to 0 by a cosine."""
    cosine = lambda step: rate * 0.5 * (1 + jnp.cos(math.pi * step / steps))  # noqa: E731
    return optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(cosine, momentum=0.9, nesterov=True)
    )


Group = tuple[Sequence[Shape], float]  # shapes by seed, and how much a teacher counts


def trained_alike(
    groups: Mapping[tuple, Group],
    data: Splits,
    logits: Float[np.ndarray, "seeds rows c"] | None,
    seeds: Sequence[int],
    rates: Sequence[float],
    *,
    epochs: int,
) -> dict[tuple, Trained]:
    """Trains groups of networks from fresh weights, all of them at all rates with all seeds.

    Args:
      groups: name -> a shape for each seed, and the weight of the teacher.
      data: rows to learn from, to choose a rate on, and to report.
      logits: of a teacher for each seed, of the training rows; None where no group has one.
      seeds: of networks; the first one orders the rows.
      rates: of SGD.
      epochs: of training.
    """
    runs = [(name, rate, i) for name in groups for rate in rates for i in range(len(seeds))]
    rows, count = data.train, len(data.train.x)
    batch = min(64, count)
    steps = max(PER_EPOCH, epochs * (count // batch))
    vary = {"rate": [rate for _, rate, _ in runs], "weight": [groups[n][1] for n, _, _ in runs]}
    rule = members(
        lambda rate, weight: backprop(
            distilled(temperature=4.0, weight=weight), paced(rate, steps)
        ),
        len(runs),
        vary=vary,
        shared_batch=False,
    )
    none = np.zeros((len(seeds), count, WHOLE[-1]), np.float32)
    told = none if logits is None else logits
    source = ArrayBatches((rows.x, rows.y, told.swapaxes(0, 1)), batch, seeds[0])
    whose = np.array([i for _, _, i in runs])

    def batches(position: int) -> Taught:
        x, y, teachers = source(position)
        every = lambda part: np.broadcast_to(part, (len(runs), *part.shape))  # noqa: E731
        return Taught(every(x), every(y), teachers.swapaxes(0, 1)[whose])

    start = networks_of([groups[n][0][i] for n, _, i in runs], [seeds[i] for _, _, i in runs])
    state = run_members(rule, start, batches, steps, seeds[0])
    models = rule.model(state)
    parts = [scored(models, part) for part in (data.validation, data.test)]
    by_run = {run: (*(float(p[i]) for p in parts), i) for i, run in enumerate(runs)}
    return {name: best(name, group, by_run, rates, models) for name, group in groups.items()}


@jax.jit
def rights(models: MLP, x: Float[Array, "n d"], y: Int[Array, "n"]) -> Float[Array, "m"]:
    """Accuracy of every member."""
    return jax.vmap(lambda model: (model(x).argmax(-1) == y).mean())(models)


def scored(models: MLP, rows: Labelled) -> Float[np.ndarray, "m"]:
    """Accuracy of every member on some rows."""
    return np.asarray(rights(models, jnp.asarray(rows.x), jnp.asarray(rows.y)))


def best(
    name: tuple,
    group: Group,
    by_run: Mapping[tuple, tuple[float, float, int]],
    rates: Sequence[float],
    models: MLP,
) -> Trained:
    """A group at the rate that its validation rows choose, over all seeds."""
    shapes = group[0]
    seeds = range(len(shapes))
    validation = [float(np.mean([by_run[name, rate, i][0] for i in seeds])) for rate in rates]
    rate = rates[int(np.argmax(validation))]
    found = [by_run[name, rate, i] for i in seeds]
    networks = [cut(member(models, at), shapes[i]) for i, (_, _, at) in enumerate(found)]
    return Trained(tuple(rates), tuple(validation), tuple(t for _, t, _ in found), networks)


def cut(model: MLP, shape: Shape) -> MLP:
    """A member by itself."""
    return narrow(model, {f"maps[{i}]": range(n) for i, n in enumerate(shape[1:-1])})


def taught(
    data: Splits, seeds: Sequence[int], rates: Sequence[float], *, epochs: int
) -> tuple[Trained, Float[np.ndarray, "seeds rows c"]]:
    """Whole networks, and what they say of the training rows."""
    groups = {("whole",): ([WHOLE] * len(seeds), 0.0)}
    (found,) = trained_alike(groups, data, None, seeds, rates, epochs=epochs).values()
    x = jnp.asarray(data.train.x)
    return found, np.stack([np.asarray(net(x)) for net in found.networks])
