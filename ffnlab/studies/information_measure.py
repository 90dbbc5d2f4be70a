"""Members of small networks that learn a finite world, and what their layers know on the way."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from ffnlab.analysis import Cells, bottleneck, gradient_drift, joint_states
from ffnlab.analysis.information_plane import layers_of
from ffnlab.data import ArrayBatches, Labelled, Ring
from ffnlab.layers import MLP
from ffnlab.learning import backprop, labelled, members
from ffnlab.losses import Loss
from ffnlab.parallel import LoopOptions, train

__all__ = ["Bound", "Case", "Course", "World", "bounded", "course", "log_spaced", "world_of"]

Estimate = Callable[[Array, Array, Array | None], Any]


class World(NamedTuple):
    """A finite set of inputs, some of them to learn from.

    Attributes:
      x: [n, d], all inputs.
      y: [n], their classes.
      trained: [m], the rows that are learned.
      targets: [n] or [n, classes], what is learned of each: its class, or shares of classes.
    """

    x: Float[np.ndarray, "n d"]
    y: Int[np.ndarray, "n"]
    trained: Int[np.ndarray, "m"]
    targets: np.ndarray

    @property
    def ceiling(self) -> float:
        """H(X) in bits, inputs being distinct."""
        return math.log2(len(self.x))


def world_of(rule: Ring, seed: int, fraction: float = 0.8) -> World:
    """The ring, of which a share drawn by a seed is learned; soft labels as shares of classes."""
    order = np.random.default_rng(seed).permutation(len(rule.x))
    is_soft = bool(np.any((rule.p > 0) & (rule.p < 1)))
    shares = np.stack([1 - rule.p, rule.p], -1).astype(np.float32)
    trained = np.sort(order[: round(fraction * len(order))])
    return World(rule.x, rule.y, trained, shares if is_soft else rule.y)


@dataclasses.dataclass(frozen=True)
class Case:
    """Networks, and how they learn.

    Attributes:
      sizes: widths from inputs to classes.
      activation: of hidden layers.
      batch: rows of a step.
      epochs: of the rows that are learned.
      rate: of Adam.
      scale: weights are drawn from a truncated normal of deviation scale / sqrt(inputs).
      penalties: of each member, times the sum of w^2 / 2 over all maps but the last.
      drift: whether the gradients of minibatches are looked at.
    """

    sizes: tuple[int, ...]
    activation: str
    batch: int
    epochs: int
    rate: float = 4e-4
    scale: float = 1.0
    penalties: tuple[float, ...] = (0.0, 0.0, 0.0)
    drift: bool = False

    def made(self, key: Array) -> MLP:
        """A network of it."""
        draw = jax.nn.initializers.variance_scaling(self.scale**2, "fan_in", "truncated_normal")
        return MLP(self.sizes, key=key, activation=self.activation, init=draw)

    def steps(self, world: World) -> tuple[int, int]:
        """(steps of an epoch, of all)."""
        each = len(world.trained) // self.batch
        return each, each * self.epochs


class Course(NamedTuple):
    """What the layers knew, along training.

    Attributes:
      epochs: [t].
      x, y: [t, members, layers], I(X;T) and I(T;Y) in bits.
      train, test: [t, members], accuracies.
      ratio: [t, members, layers], mean over deviation of gradients; empty where not asked for.
      nets: the members after training.
    """

    epochs: Float[np.ndarray, "t"]
    x: Float[np.ndarray, "t m layers"]
    y: Float[np.ndarray, "t m layers"]
    train: Float[np.ndarray, "t m"]
    test: Float[np.ndarray, "t m"]
    ratio: np.ndarray
    nets: PyTree


def log_spaced(epochs: int, count: int) -> list[int]:
    """0, and epochs from 1 to the last whose logs are evenly spaced."""
    return [0, *np.unique(np.round(np.geomspace(1, epochs, count)).astype(int)).tolist()]


def penalized(penalty: float | Array) -> Loss:
    """Cross-entropy and the penalty of a member."""

    def loss(net: MLP, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        mean, metrics = labelled(net, batch)
        squares = sum(jnp.sum(m.weight.dense() ** 2) for m in list(net.maps)[:-1])
        return mean + penalty * squares / 2, metrics

    return loss


def course(
    case: Case,
    world: World,
    estimate: Estimate,
    seeds: Sequence[int],
    *,
    points: int,
) -> Course:
    """Lets the members of a case learn side by side, and measures their layers on the way.

    Args:
      case: what learns; as many penalties as seeds.
      world: what is learned; information is of all its inputs.
      estimate: (values [n, d], labels, None) -> `Information`.
      seeds: of the networks; the first one also of the order of rows.
      points: about how many epochs are measured.
    """
    rule = members(
        lambda penalty: backprop(penalized(penalty), optax.adam(case.rate)),
        len(seeds),
        vary={"penalty": case.penalties},
    )
    nets = jax.vmap(case.made)(jnp.stack([jax.random.key(seed) for seed in seeds]))
    rows = Labelled(world.x[world.trained], world.targets[world.trained])
    each, steps = case.steps(world)
    epochs = log_spaced(case.epochs, points)
    found: list[dict[str, np.ndarray]] = []

    def evaluate(state: PyTree) -> dict[str, float]:
        nets = rule.model(state)
        found.append(jax.device_get(looked_at(nets, world, estimate)))
        if case.drift:
            found[-1]["ratio"] = drifts(nets, rows, case.batch)
        return {"accuracy": float(found[-1]["train"].mean())}

    outcome = train(
        rule,
        nets,
        ArrayBatches(rows, case.batch, seeds[0]),
        steps,
        key=jax.random.key(seeds[0]),
        evaluate=evaluate,
        options=LoopOptions(
            log_every=0, evaluate_at=tuple(e * each for e in epochs), progress=False
        ),
        together=each * 8,
    )
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {steps}")
    at = list(outcome.evaluations)
    kept = {name: np.stack([each[name] for each in found[: len(at)]]) for name in found[0]}
    return Course(
        np.array(at) / each,
        kept["x"],
        kept["y"],
        kept["train"],
        kept["test"],
        kept.get("ratio", np.zeros((0,))),
        rule.model(outcome.state),
    )


def looked_at(nets: PyTree, world: World, estimate: Estimate) -> dict[str, Array]:
    """Informations of all layers and accuracies of all members."""
    is_trained = np.zeros(len(world.x), bool)
    is_trained[world.trained] = True
    return compiled(estimate)(
        nets, jnp.asarray(world.x), jnp.asarray(world.y), jnp.asarray(is_trained)
    )


@functools.cache
def compiled(estimate: Estimate) -> Callable[..., dict[str, Array]]:
    """What is measured of members."""

    def of_one(net: MLP, x: Array, y: Array, is_trained: Array) -> dict[str, Array]:
        layers = list(layers_of(net, x).values())
        bits = jnp.array([list(estimate(values, y, None)) for values in layers]) / math.log(2)
        right = layers[-1].argmax(-1) == y
        return {
            "x": bits[:, 0],
            "y": bits[:, 1],
            "train": jnp.sum(right & is_trained) / is_trained.sum(),
            "test": jnp.sum(right & ~is_trained) / jnp.maximum((~is_trained).sum(), 1),
        }

    return jax.jit(jax.vmap(of_one, (0, None, None, None)))


PROBE = gradient_drift(labelled, select="maps[*].w")


def drifts(nets: PyTree, rows: Labelled, batch: int) -> Float[np.ndarray, "m layers"]:
    """Mean over deviation of the gradients of an epoch's minibatches, by member and layer."""
    count = len(rows.x) // batch
    parts = jax.tree.map(
        lambda leaf: jnp.asarray(leaf[: count * batch]).reshape(count, batch, *leaf.shape[1:]), rows
    )
    stats = all_moments(nets, parts)
    mu = [jax.vmap(lambda m: jnp.sum(m.weight.dense() ** 2))(m) for m in stats.mean.maps]
    spread = [stats.squares[f"maps[{i}]"] / count for i in range(len(mu))]
    ratios = [a / np.maximum(b, 1e-30) for a, b in zip(mu, spread, strict=True)]
    return np.sqrt(np.stack(ratios, -1))


@jax.jit
def all_moments(nets: PyTree, parts: Labelled) -> Any:
    """The stats of the probe for all members, over all minibatches."""

    def observe(stats: Any, batch: Labelled) -> tuple[Any, None]:
        return jax.vmap(PROBE.observe, (0, 0, None))(stats, nets, batch), None

    return jax.lax.scan(observe, jax.vmap(PROBE.init)(nets), parts)[0]


# The bottleneck of a world of soft labels.


class Bound(NamedTuple):
    """Final networks beside the bottleneck's curve, in bits.

    Attributes:
      x, y: [members, layers].
      curve: [points, 2], I(X;T) and I(T;Y) of the curve, rising.
      known: I(X;Y).
    """

    x: Float[np.ndarray, "m layers"]
    y: Float[np.ndarray, "m layers"]
    curve: Float[np.ndarray, "p 2"]
    known: float

    @property
    def gaps(self) -> Float[np.ndarray, "m layers"]:
        """How far each lies below the curve."""
        x, y = self.curve.T
        return np.interp(self.x, x, y, left=0.0, right=self.known) - self.y


def bounded(found: Course, rule: Ring, grid: Cells, seed: int) -> Bound:
    """The final networks by the soft labels themselves, and the curve of the world."""
    shares = np.stack([1 - rule.p, rule.p], -1)
    known = nats(np.full(len(shares), 1 / len(shares)), shares)
    x, y = [], []
    layers = jax.device_get(jax.vmap(lambda net: layers_of(net, jnp.asarray(rule.x)))(found.nets))
    for member in range(found.x.shape[1]):
        pairs = [soft_information(grid.codes(v[member]), shares) for v in layers.values()]
        x.append([a for a, _ in pairs])
        y.append([b for _, b in pairs])
    # Inputs of one probability are one input to the curve.
    values, counts = np.unique(np.round(rule.p, 9), return_counts=True)
    joint = (counts / counts.sum())[:, None] * np.stack([1 - values, values], -1)
    betas = jnp.asarray(np.geomspace(1.05, 300, 40), jnp.float32)
    key = jax.random.key(seed)
    best = bottleneck(jnp.asarray(joint, jnp.float32), betas, states=16, turns=2000, key=key)
    curve = np.stack([np.asarray(best.x), np.asarray(best.y)], -1) / math.log(2)
    curve = np.maximum.accumulate(np.concatenate([np.zeros((1, 2)), curve[curve[:, 0].argsort()]]))
    return Bound(np.array(x), np.array(y), curve, known / math.log(2))


def nats(p: np.ndarray, given: np.ndarray) -> float:
    """I of p(t) and p(y|t)."""
    joint = p[:, None] * given
    log = lambda values: np.log(np.maximum(values, 1e-300))  # noqa: E731
    return float(np.sum(joint * (log(given) - log(joint.sum(0)))))


def soft_information(codes: Any, shares: np.ndarray) -> tuple[float, float]:
    """(I(X;T), I(T;Y)) in bits of a layer, where classes have shares in each input."""
    states = joint_states(np.asarray(codes))
    counts = np.bincount(states)
    inside = np.zeros((len(counts), shares.shape[1]))
    np.add.at(inside, states, shares)
    p = counts / counts.sum()
    return -float(np.sum(p * np.log2(p))), nats(p, inside / counts[:, None]) / math.log(2)
