"""What the studies on small classifiers share: one run of a rule on labelled data."""

import jax
import numpy as np
from jaxtyping import PyTree

from ffnlab.data import ArrayBatches, Labelled
from ffnlab.parallel import LoopOptions, train
from ffnlab.rule import Rule

__all__ = ["accuracy", "fit", "learned"]

QUIET = LoopOptions(log_every=0, progress=False)


def learned(
    rule: Rule, model: PyTree, rows: PyTree, *, batch: int, steps: int, seed: int = 0
) -> PyTree:
    """The state of a rule after training.

    Args:
      rule: takes batches of `rows`.
      model, batch, steps, seed: see `fit`.
      rows: arrays with the rows of the training set on their first axis.
    Raises:
      NumericalError: the run diverged.
    """
    batches = ArrayBatches(rows, batch, seed)
    return train(rule, model, batches, steps, key=jax.random.key(seed), options=QUIET).state


def fit(
    rule: Rule,
    model: PyTree,
    data: tuple[Labelled, Labelled],
    *,
    batch: int,
    steps: int,
    seed: int = 0,
) -> float:
    """Trains a model by a rule.

    Args:
      rule: takes batches of `Labelled`; its `predict` gives a score per class.
      model: where it starts.
      data: (train, test).
      batch, steps: rows of a step, and how many steps.
      seed: of the order of the rows, and of the rule.
    Returns:
      the fraction of test inputs whose class has the largest score.
    Raises:
      NumericalError: the run diverged.
    """
    train_data, test_data = data
    state = learned(rule, model, train_data, batch=batch, steps=steps, seed=seed)
    return accuracy(rule, state, test_data)


def accuracy(rule: Rule, state: PyTree, data: Labelled) -> float:
    """The fraction of inputs whose class has the largest score."""
    scores = np.asarray(rule.predict(state, jax.numpy.asarray(data.x)))
    return float(np.mean(scores.argmax(-1) == data.y))
