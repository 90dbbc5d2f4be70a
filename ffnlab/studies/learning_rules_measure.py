"""What is measured of a learning rule: its course, its step, and what its losses reach."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ffnlab import tree
from ffnlab.analysis import LocalityReport, gradient_alignment, locality
from ffnlab.data import ArrayBatches, Labelled
from ffnlab.layers import MLP
from ffnlab.learning import NoPropNet, NoPropOptions, labelled
from ffnlab.learning.counter_current.rule import local_losses, mirrored
from ffnlab.learning.noprop.rule import block_losses
from ffnlab.learning.physical.rule import directions_of, layer_losses, network_of
from ffnlab.models import Hypernet
from ffnlab.models.account import compiled_cost
from ffnlab.rule import Rule
from ffnlab.studies.classify import accuracy, learned

__all__ = ["Measured", "Reach", "direction", "measure", "reach"]


class Measured(NamedTuple):
    """What is known of a rule's step and of how it learned.

    Attributes:
      curve: test accuracy by step.
      temporary: bytes the compiled step keeps besides its arguments and results.
      state: bytes of the rule's state: parameters, a mirror, what an optimizer remembers.
      flops: of one step, as the compiler counts them.
      cosines: between a step and the gradient, before and after training; NaN where the scores are
        not those of an MLP.
    """

    curve: dict[int, float]
    temporary: int
    state: int
    flops: float
    cosines: tuple[float, float]

    @property
    def text(self) -> str:
        """Memory and work in words."""
        kib = f"{self.temporary / 1024:.0f} KiB temporary, {self.state / 1024:.0f} KiB state"
        return f"{kib}, {self.flops / 1e6:.1f} MFLOP"


def measure(
    rule: Rule, model: PyTree, data: tuple[Labelled, Labelled], rows: int, steps: int, seed: int
) -> Measured:
    """Trains by a rule and measures its step.

    Args:
      rule: takes batches of `Labelled`.
      model: where it starts.
      data: rows to train on, and rows that the curve is drawn by.
      rows: of a batch.
      steps: how many.
      seed: of the order of rows, and of the rule.
    """
    batches, key = ArrayBatches(data[0], rows, seed), jax.random.key(seed)
    start = rule.init(model, key)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(start))
    cost = compiled_cost(rule.step, start, batches(0))
    curve: dict[int, float] = {0: accuracy(rule, start, data[1])}
    every = max(1, steps // 20)

    def evaluate(state: PyTree) -> dict[str, float]:
        value = accuracy(rule, state, data[1])
        curve[min(len(curve) * every, steps)] = value
        return {"test_accuracy": value}

    first = direction(rule, rule.init(model, key), batches(0))
    sizes = {"batch": rows, "steps": steps, "seed": seed}
    last = learned(rule, model, data[0], **sizes, evaluate=evaluate, every=every)
    return Measured(
        curve,
        cost.temporary,
        held,
        cost.compiler_flops,
        (first, direction(rule, last, batches(0))),
    )


def direction(rule: Rule, state: PyTree, batch: Labelled) -> float:
    """The cosine between what a step takes from an MLP and the gradient of its cross-entropy.

    NaN where the rule's scores are not those of one MLP, its own or a generated one.
    """
    if isinstance(rule.model(state), Hypernet):
        given = rule.model
        rule = dataclasses.replace(rule, model=lambda state: given(state).make(0))
    model = rule.model(state)
    if not isinstance(model, MLP) or rule.name == "physical_ff":
        return math.nan
    probe = gradient_alignment(rule, labelled, begin=lambda model: state)
    return probe(model, [batch], progress=False).figures()["cosine"]


class Reach(NamedTuple):
    """Which layers the losses of a rule move.

    Attributes:
      found: the norms of their gradients.
      own: the layers that the paper gives each loss.
    """

    found: LocalityReport
    own: Sequence[tuple[str, ...]]

    @property
    def is_local(self) -> bool:
        """Whether each loss moves its own layers, all of them, and nothing else."""
        return [set(names) for names in self.found.reached] == [set(names) for names in self.own]

    @property
    def text(self) -> str:
        """How many pairs there are, in words."""
        return f"{sum(map(len, self.found.reached))} of {self.found.slopes.size}"


def reach(network: MLP, stack: NoPropNet, batch: Labelled, seed: int) -> dict[str, Reach]:
    """The reach of each rule's own losses on one batch.

    Args:
      network: what all but NoProp train.
      stack: NoProp's.
      batch: rows with classes.
      seed: of what rules draw.
    """
    key, batch = jax.random.key(seed), jax.tree.map(jnp.asarray, batch)
    through = locality(lambda net: labelled(net, batch)[0][None], network)
    return {
        "backprop": Reach(through, [through.layers]),
        "counter-current": both_ways(network, batch, key),
        "noprop": by_block(stack, batch, key),
        "physical-ff": by_layer(network, batch, key),
    }


def both_ways(network: MLP, batch: Labelled, key: jax.Array) -> Reach:
    """Counter-current learning's: F from x to scores, B from classes to x, met at every layer."""
    pair, count = (network, mirrored(network, key)), len(network.maps)
    found = locality(
        lambda pair: jnp.stack(local_losses(pair[0], pair[1], batch.x, batch.y)[0]),
        pair,
        group=lambda path: "FB"[int(path[1])] + re.findall(r"maps\[(\d+)]", path)[0],
    )
    own = [
        (*([f"F{i - 1}"] if i else []), *([f"B{count - 1 - i}"] if i < count else []))
        for i in range(count + 1)
    ]
    return Reach(found, own)


def by_block(stack: NoPropNet, batch: Labelled, key: jax.Array) -> Reach:
    """NoProp's: a loss for each block, and that of the readout."""
    count = len(jax.tree.leaves(stack.blocks)[0])
    levels, eta = NoPropOptions().levels(count), NoPropOptions().eta
    blocks = [jax.tree.map(lambda leaf, t=t: leaf[t], stack.blocks) for t in range(count)]

    def losses(parts: tuple) -> jax.Array:
        new = tree.copy(stack)
        new.blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts[0])
        new.out = parts[1]
        each, top, _ = block_losses(new, *batch, levels, key, eta)
        return jnp.append(each, top)

    def name(path: str) -> str:
        return "out" if path.startswith("[1]") else f"block {re.findall(r'[0-9]+', path)[1]}"

    found = locality(losses, (tuple(blocks), stack.out), group=name)
    return Reach(found, [*((f"block {t}",) for t in range(count)), ("out",)])


def by_layer(network: MLP, batch: Labelled, key: jax.Array) -> Reach:
    """Physical local learning's: a loss for each layer."""
    directions = directions_of(network, key)
    found = locality(
        lambda net: layer_losses(network_of(net, directions), batch.x, batch.y, key), network
    )
    return Reach(found, [(f"maps[{i}]",) for i in range(len(network.maps))])
