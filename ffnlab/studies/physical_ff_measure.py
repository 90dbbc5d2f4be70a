"""What the study of physical local learning measures: systems replaced halfway, slopes, work."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ffnlab import tree
from ffnlab.data import ArrayBatches, Labelled, digits, vowels
from ffnlab.data.folders import find_folder
from ffnlab.learning import BlackBox, external, from_state, members
from ffnlab.learning.physical.rule import contrastive, layer_losses, pairs_of
from ffnlab.models import PhysicalConfig, PhysicalNet
from ffnlab.models.cost import multiply_adds
from ffnlab.parallel import LoopOptions, train
from ffnlab.rule import Rule
from ffnlab.studies import tuning
from ffnlab.studies.classify import clusters
from ffnlab.studies.tuning import Splits

__all__ = [
    "CASES",
    "Case",
    "Life",
    "Moved",
    "Order",
    "cases",
    "digital_work",
    "lived",
    "moved",
    "order",
    "ready",
]


@dataclasses.dataclass(frozen=True)
class Case:
    """Data, the network that learns them, and for how long.

    Attributes:
      config: of the network.
      rows: seed -> (train, test).
      batch: rows of a step.
      epochs: before the systems are replaced.
      again: epochs after that.
      quick: both numbers of epochs in the quick form; None where it leaves the case out.
      has_twins: whether the quick form has twins for it.
    """

    config: PhysicalConfig
    rows: Callable[[int], tuple[Labelled, Labelled]]
    batch: int
    epochs: int
    again: int
    quick: tuple[int, int] | None = None
    has_twins: bool = False

    def steps(self, data: Splits) -> tuple[int, int]:
        """Batches before and after the systems are replaced."""
        rows = len(data.train.x)
        return self.epochs * rows // self.batch, self.again * rows // self.batch


def spoken(seed: int) -> tuple[Labelled, Labelled]:
    """Vowels of other speakers in test, in standard deviations of the training rows from 0 up."""
    parts = vowels().by_speaker(seed=seed)
    mean, deviation = parts[0].x.mean(0), parts[0].x.std(0)
    scaled = [(part.x - mean) / deviation for part in parts]
    low = scaled[0].min()
    train, test = (
        Labelled((x - low).astype(np.float32), part.y)
        for x, part in zip(scaled, parts, strict=True)
    )
    return train, test


VOWELS = {"inputs": 5, "classes": 12, "widths": (64, 64), "skip": True, "slots": 12}
CASES: Mapping[str, Case] = {
    "clusters": Case(
        PhysicalConfig(64, 10, (128, 128), skip=True, slots=10), clusters, 256, 5, 2, (5, 2)
    ),
    "digits": Case(
        PhysicalConfig(64, 10, (128, 128), skip=True, slots=10), digits, 128, 30, 30, (8, 6), True
    ),
    "vowels": Case(PhysicalConfig(system="tanh_chain", **VOWELS), spoken, 128, 60, 60),
    "vowels, two bits": Case(PhysicalConfig(system="two_bit", **VOWELS), spoken, 128, 60, 60),
}


def cases(quick: bool) -> dict[str, Case]:
    """The cases of a form whose data are there."""
    is_there = find_folder("vowels") is not None
    found = {name: case for name, case in CASES.items() if is_there or "vowels" not in name}
    if not quick:
        return found
    return {
        name: dataclasses.replace(case, epochs=case.quick[0], again=case.quick[1])
        for name, case in found.items()
        if case.quick is not None
    }


class Order(NamedTuple):
    """Goodness by layer.

    Attributes:
      gaps: right less wrong classes after learning, by seed and layer, on test rows.
      first: losses before learning.
    """

    gaps: Float[np.ndarray, "seeds layers"]
    first: Float[np.ndarray, "seeds layers"]


CHANGED = 1 + 1e-6  # where a curve has what came right after the change


class Life(NamedTuple):
    """Test accuracy of the members of a rule whose systems are replaced on the way.

    Attributes:
      before: by seed, with the systems that it learned on.
      dropped: with those that take their place, nothing learned yet.
      after: when it has gone on.
      curve: steps over those before the change -> accuracy by seed; `CHANGED` is right after it.
    """

    before: Sequence[float]
    dropped: Sequence[float]
    after: Sequence[float]
    curve: Mapping[float, Sequence[float]]


def lived(
    rule: Rule, case: Case, data: Splits, seeds: Sequence[int], *, updates: int = 1, points: int = 8
) -> Life:
    """Lets the seeds learn side by side, replaces all systems, and lets them go on.

    Args:
      rule: of one member.
      case: the network and how long.
      data: training and test rows.
      seeds: of networks and of the systems that take the others' place.
      updates: steps in place of each, of a rule that changes a map once a step.
      points: of the curve, before the change.
    """
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    start = jax.vmap(lambda key: case.config.make(key=key))(keys)
    several, x = members(lambda: rule, len(seeds)), jnp.asarray(data.test.x)
    steps, more = (updates * count for count in case.steps(data))

    def accuracy(state: PyTree) -> list[float]:
        found = np.asarray(several.predict(state, x)).argmax(-1)
        return (found == data.test.y).mean(-1).tolist()

    def learned(rule: Rule, count: int, seed: int) -> tuple[PyTree, dict[float, list[float]]]:
        every = max(1, steps // points)
        options = LoopOptions(log_every=0, evaluate_every=every, evaluate_at=(0,), progress=False)
        outcome = train(
            rule,
            start,
            ArrayBatches(data.train, case.batch, seed),
            count,
            key=jax.random.key(seeds[0]),
            evaluate=lambda state: dict(zip(map(str, seeds), accuracy(state), strict=True)),
            options=options,
            together=every,
        )
        if not outcome.finished:
            raise KeyboardInterrupt(f"stopped at step {outcome.position} of {count}")
        found = outcome.evaluations.items()
        return outcome.state, {at / steps: list(each.values()) for at, each in found}

    state, curve = learned(several, steps, seeds[0])
    others = jax.vmap(lambda net, key: net.redrawn(jax.random.fold_in(key, 1)))(state.model, keys)
    changed = from_state(several, state._replace(model=others))
    _, rest = learned(changed, more, seeds[0] + 1)
    last = max(rest)
    curve |= {CHANGED + at: value for at, value in rest.items()}
    return Life(curve[1.0], rest[0.0], rest[last], curve)


@jax.jit
def judged(
    net: PhysicalNet, x: Float[Array, "n d"], y: Int[Array, "n"], key: Array
) -> tuple[Float[Array, "layers"], Float[Array, "layers"]]:
    """Mean goodness of right classes less that of wrong ones, and the loss, of each layer."""
    right, wrong = (net.judged(h) for h in pairs_of(net, x, y, key))
    return (right - wrong).mean(1), jax.vmap(contrastive)(right, wrong)


def order(
    taught: Sequence[PhysicalNet | None], fresh: Sequence[PhysicalNet], rows: Labelled, seed: int
) -> Order:
    """Goodness in networks that have learned, and losses of those that have not.

    Args:
      taught, fresh: the networks; None for one whose run diverged, whose gaps are NaN.
      rows: that they are shown.
      seed: of the wrong classes.
    """
    given = jnp.asarray(rows.x), jnp.asarray(rows.y), jax.random.key(seed)
    none = np.full(len(fresh[0].layers), np.nan)
    gaps = [none if net is None else judged(net, *given)[0] for net in taught]
    return Order(np.stack(gaps), np.stack([judged(net, *given)[1] for net in fresh]))


class Moved(NamedTuple):
    """What has a slope in the losses of the layers.

    Attributes:
      maps: whether loss i moves map j, [layers, layers].
      systems: whether it moves system j.
    """

    maps: np.ndarray
    systems: np.ndarray


def moved(seed: int, layers: int = 3) -> Moved:
    """Which maps and systems have a slope in which layer's loss, of a small network of media."""
    key = jax.random.key(seed)
    net = PhysicalConfig(64, 10, (16,) * layers, slots=10, skip=True).make(key=key)
    train, _ = clusters(seed)
    x, y = jnp.asarray(train.x[:32]), jnp.asarray(train.y[:32])
    across = jax.jit(jax.jacobian(lambda net: layer_losses(net, x, y, key)))(net)

    def nonzero(part: PyTree) -> list[bool]:
        each = [np.asarray(leaf).reshape(layers, -1) for leaf in jax.tree.leaves(part)]
        return np.any([np.any(leaf != 0, axis=1) for leaf in each], axis=0).tolist()

    maps, systems = (
        np.array([nonzero(getattr(layer, name)) for layer in across.layers]).T
        for name in ("map", "box")
    )
    return Moved(maps, systems)


def digital_work(rule: Rule, case: Case, seed: int) -> int:
    """Pairs of a multiplication and an addition in a step, but for what the systems themselves do.

    Args:
      rule: whose step.
      case: the network, whose systems stand outside of the computer here, and the batch.
      seed: of the network.
    """
    net: Any = tree.copy(case.config.make(key=jax.random.key(seed)))
    for layer in net.layers:
        outside = external(lambda params, h, seed: h, layer.box.outputs)
        layer.box = BlackBox(outside, layer.box.outputs)
    state = jax.eval_shape(rule.init, net, jax.random.key(seed))
    rows = jax.ShapeDtypeStruct((case.batch, case.config.inputs), jnp.float32)
    classes = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    return multiply_adds(rule.step, state, (rows, classes))


def ready(case: Case, seed: int) -> Splits:
    """The rows of a case, a fifth of those to train on held out for validation."""
    return tuning.splits(case.rows(seed))
