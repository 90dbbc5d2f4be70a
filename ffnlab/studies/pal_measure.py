"""Designs of PAL trained side by side: rates and seeds as members, scored while they learn."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

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
      state: the trained model of the first seed.
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
) -> Learned:
    """Trains a design at each rate from each seed, by Adam, all in one program.

    Args:
      make: seed -> the decoder that it starts from; the same shapes for all.
      task: see `Task`; every member sees the same batches.
      rates: of Adam; chosen among by the first seed's validation score at `task.chosen_at`.
      seeds: of the parameters that are drawn.
      trainable: what of the model; all when None.
    """
    pairs = list(itertools.product(rates, seeds))
    starts = [make(seed) for _, seed in pairs]
    one = functools.partial(backprop, pal.heard(masked), trainable=trainable)
    rule = members(
        lambda rate: one(optax.adam(rate)), len(pairs), vary={"rate": [rate for rate, _ in pairs]}
    )
    model = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)

    def evaluate(state: PyTree) -> dict[str, float]:
        found = {}
        for name in ("validation", "test"):
            shares = accuracy(rule.model(state), getattr(task, name))
            found |= {f"{name} {i}": share for i, share in enumerate(shares)}
        return found

    outcome = train(
        rule,
        model,
        task.batches,
        task.steps,
        key=jax.random.key(0),
        evaluate=evaluate,
        options=LoopOptions(0, task.every, progress=False),
        together=math.gcd(TOGETHER, task.every),
    )
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {task.steps}")
    figures = outcome.evaluations
    scored = {
        rate: figures[task.chosen_at][f"validation {i}"]
        for i, (rate, seed) in enumerate(pairs)
        if seed == seeds[0]
    }
    best = max(scored, key=lambda rate: scored[rate])
    mine = [i for i, (rate, _) in enumerate(pairs) if rate == best]
    curves = {step: [f[f"test {i}"] for i in mine] for step, f in figures.items()}
    last = jax.tree.map(lambda leaf: leaf[mine[0]], rule.model(outcome.state))
    numbers = sum(x.size for x in jax.tree.leaves(starts[0]))
    trained = numbers if trainable is None else numbers_of(starts[0], trainable)
    return Learned(scored, best, curves, products(starts[0], task), trained, numbers, last)


def numbers_of(model: Decoder, trainable: Predicate) -> int:
    """How many numbers of a model are trained."""
    return sum(x.size for x in jax.tree.leaves(tree.trained(model, trainable)[0]))


def products(model: Decoder, task: Task) -> int:
    """Multiply-adds for one problem: what is heard, and the text."""
    one = jax.tree.map(lambda x: x[:1], (task.test.sounds, task.test.asked[0]))
    return multiply_adds(pal.answer, model, *one)


def accuracy(models: Decoder, problems: Problems) -> list[float]:
    """The share of problems that each of several stacked models answers right."""
    tokens, wanted = problems.asked
    found = np.asarray(_answered(models, problems.sounds, tokens))
    return np.mean(found == wanted[:, -1], axis=1).tolist()


@jax.jit
def _answered(models: Decoder, sounds: pal.Sounds, tokens: jax.Array) -> jax.Array:
    """What each of several models answers, [m, b]."""
    return jax.vmap(lambda model: pal.answer(model, sounds, tokens).argmax(-1))(models)
