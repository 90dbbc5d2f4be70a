"""Designs of PAL trained side by side: rates and seeds as members, scored while they learn."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, PyTree

from ffnlab import tree
from ffnlab.learning import backprop, members
from ffnlab.losses import masked
from ffnlab.models import Decoder
from ffnlab.models.cost import multiply_adds
from ffnlab.parallel import LoopOptions, train
from ffnlab.routing import pal
from ffnlab.tree import Predicate

__all__ = ["Learned", "Problems", "Task", "learned"]

TOGETHER = 50  # steps in one compiled loop
SCORED = ("validation", "test")
WHOLE: Mapping[str, Sequence[bool]] = MappingProxyType({"": ()})


class Problems(NamedTuple):
    """Questions about sounds, n in all; a batch of some is what `pal.heard(masked)` takes.

    Attributes:
      sounds: what each row hears.
      asked: (tokens [n, t], targets [n, t]: -1 but for the last, the answer).
    """

    sounds: pal.Sounds
    asked: tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
      batches: position -> Problems.
      validation, test: Problems that rates are chosen by, and that are reported.
      steps: of every run.
      every: steps between scores; they divide `steps`.
      chosen_at: step whose validation scores choose the rate.
    """

    batches: Callable[[int], Problems]
    validation: Problems
    test: Problems
    steps: int
    every: int
    chosen_at: int


@dataclasses.dataclass(frozen=True)
class Learned:
    """What a design reached.

    Attributes:
      rates: all that were tried, with the mean validation score of the first seed's run.
      rate: the one with the best.
      curves: test accuracy by step of each seed, at that rate.
      products: multiply-adds of a forward pass for one problem.
      trained, parameters: numbers that were trained, and of the whole model.
      model: the trained one of the first seed.
    """

    rates: Mapping[float, float]
    rate: float
    curves: Mapping[int, Sequence[float]]
    products: int
    trained: int
    parameters: int
    model: Decoder = dataclasses.field(repr=False)

    def at(self, step: int) -> Sequence[float]:
        """Test accuracy of the seeds after so many steps."""
        return self.curves[step]

    def text(self, step: int) -> str:
        """That in words: the mean, with the range of several."""
        values = self.curves[step]
        if len(values) == 1:
            return f"{values[0]:.3f}"
        return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def learned(
    make: Callable[[int], Decoder],
    task: Task,
    rates: Sequence[float],
    seeds: Sequence[int],
    *,
    trainable: Predicate | None = None,
    present: Mapping[str, Sequence[bool]] = WHOLE,
) -> dict[str, Learned]:
    """Trains a design at each rate from each seed, by Adam, all in one program.

    Args:
      make: seed -> the decoder that it starts from; the same shapes for all.
      task: see `Task`; every member sees the same batches.
      rates: of Adam; chosen among by the first seed's validation score at `task.chosen_at`.
      seeds: of the parameters that are drawn.
      trainable: what of the model; all when None.
      present: name -> which of the encoders are heard; all of them, under the name "", unless told.
    Returns:
      what was reached with each of `present`.
    """
    runs = list(itertools.product(present, rates, seeds))
    every = (True,) * len(task.test.sounds.features)
    heard = np.array([present[name] or every for name, _, _ in runs])
    starts = {seed: make(seed) for seed in seeds}
    loss = pal.heard(masked)
    rule = members(
        lambda rate: backprop(loss, optax.adam(rate), trainable=trainable),
        len(runs),
        vary={"rate": [rate for _, rate, _ in runs]},
        shared_batch=present is WHOLE,
    )

    def batches(position: int) -> Problems:
        batch = task.batches(position)
        return batch if present is WHOLE else for_each(batch, heard)

    def evaluate(state: PyTree) -> dict[str, float]:
        shares = {n: accuracy(rule.model(state), getattr(task, n), heard) for n in SCORED}
        return {f"{n} {i}": share for n, each in shares.items() for i, share in enumerate(each)}

    outcome = train(
        rule,
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *(starts[seed] for _, _, seed in runs)),
        batches,
        task.steps,
        key=jax.random.key(0),
        evaluate=evaluate,
        options=LoopOptions(0, task.every, progress=False),
        together=math.gcd(TOGETHER, task.every),
    )
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {task.steps}")
    first = starts[seeds[0]]
    whole = sum(x.size for x in jax.tree.leaves(first))
    mine = whole if trainable is None else numbers_of(first, trainable)
    sizes = products(first, task), mine, whole
    found = {}
    for name in present:
        of_name = {i: (rate, seed) for i, (n, rate, seed) in enumerate(runs) if n == name}
        scored, best, chosen = choice(of_name, outcome.evaluations[task.chosen_at], seeds[0])
        curves = {
            step: [figures[f"test {i}"] for i in chosen]
            for step, figures in outcome.evaluations.items()
        }
        last = jax.tree.map(lambda leaf, i=chosen[0]: leaf[i], rule.model(outcome.state))
        found[name] = Learned(scored, best, curves, *sizes, last)
    return found


def choice(
    runs: Mapping[int, tuple[float, int]], figures: Mapping[str, float], seed: int
) -> tuple[dict[float, float], float, list[int]]:
    """Validation scores of a seed's runs by rate, the best rate, and the members that had it."""
    scored = {rate: figures[f"validation {i}"] for i, (rate, s) in runs.items() if s == seed}
    best = max(scored, key=lambda rate: scored[rate])
    return scored, best, [i for i, (rate, _) in runs.items() if rate == best]


def for_each(problems: Problems, heard: Bool[np.ndarray, "m e"]) -> Problems:
    """The same problems for m members, [m, …], each of which hears some of the encoders."""
    copied = jax.tree.map(lambda x: np.broadcast_to(x, (len(heard), *x.shape)), problems)
    valid = copied.sounds.valid
    masks = tuple(mask & heard[:, e, None, None] for e, mask in enumerate(valid))
    return copied._replace(sounds=copied.sounds._replace(valid=masks))


def numbers_of(model: Decoder, trainable: Predicate) -> int:
    """How many numbers of a model are trained."""
    return sum(x.size for x in jax.tree.leaves(tree.trained(model, trainable)[0]))


def products(model: Decoder, task: Task) -> int:
    """Multiply-adds for one problem: what is heard, and the text."""
    one = jax.tree.map(lambda x: x[:1], (task.test.sounds, task.test.asked[0]))
    return multiply_adds(pal.answer, model, *one)


def accuracy(models: Decoder, problems: Problems, heard: Bool[np.ndarray, "m e"]) -> list[float]:
    """The share of problems that each of several stacked models answers right."""
    tokens, wanted = problems.asked
    features, valid = problems.sounds
    masks = tuple(mask & heard[:, e, None, None] for e, mask in enumerate(valid or ()))
    found = np.asarray(answered(models, features, masks, tokens))
    return np.mean(found == wanted[:, -1], axis=1).tolist()


@jax.jit
def answered(models: Decoder, features: tuple, masks: tuple, tokens: jax.Array) -> jax.Array:
    """What each of m models answers, [m, b]; masks [m, b, n] are of each model."""

    def one(model: Decoder, valid: tuple) -> jax.Array:
        return pal.answer(model, pal.Sounds(features, valid), tokens).argmax(-1)

    return jax.vmap(one)(models, masks)
