"""What the studies on small networks share: one run of a rule on data, and bars of what it gave."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from ffnlab.data import ArrayBatches, Labelled
from ffnlab.parallel import LoopOptions, train
from ffnlab.rule import Rule

__all__ = ["accuracy", "fit", "grouped_bars", "learned"]

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


def grouped_bars(axes, found: Mapping[tuple[str, str], Sequence[float]]) -> None:
    """A bar per (group, name), the mean of its values; the first name is grey.

    Args:
      axes: where to draw.
      found: values of the seeds; every group has the same names.
    """
    groups, names = (list(dict.fromkeys(part)) for part in zip(*found, strict=True))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = np.arange(len(groups)) + (i - (len(names) - 1) / 2) * width
        values = [float(np.mean(found[group, name])) for group in groups]
        color = "0.6" if i == 0 else f"C{i - 1}"
        drawn = axes.bar(places, values, 0.94 * width, label=name, color=color)
        axes.bar_label(drawn, fmt="%.3f", fontsize=8)
    axes.set_xticks(range(len(groups)), groups)
    axes.legend(frameon=False, loc="upper center", ncols=len(names))
    axes.spines[["top", "right"]].set_visible(False)
