"""What the studies on small networks share: data, one run of a rule on them, and bars."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from ffnlab.data import ArrayBatches, Labelled, gaussian_clusters
from ffnlab.parallel import LoopOptions, train
from ffnlab.parallel.loop import Evaluate
from ffnlab.rule import Rule

__all__ = [
    "CLUSTERS",
    "accuracy",
    "at_rate",
    "clipped_sgd",
    "clusters",
    "grouped_bars",
    "learned",
    "paced",
]

CLUSTERS = "30 Gaussian clusters of 10 classes, width 64: 8000 rows, 2000 for validation, 2000 test"


def clusters(seed: int) -> tuple[Labelled, Labelled]:
    """(train, test) of `CLUSTERS`; a fifth of the first is for validation."""
    return gaussian_clusters(seed, train=10_000)


def paced(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer of rate 1 with its rate as a number in its state, for `at_rate` to set."""
    return optax.chain(optimizer, optax.inject_hyperparams(optax.scale)(step_size=1.0))


def at_rate(rule: Rule, rate: float) -> Rule:
    """A rule of `paced` optimizers at a rate; its step is compiled once for all rates.

    Raises:
      KeyError: from `init`, where no optimizer is `paced`.
    """

    def init(model: PyTree, key: Array) -> PyTree:
        state = rule.init(model, key)
        name = "optimizers" if hasattr(state, "optimizers") else "optimizer"
        found = optax.tree.set(getattr(state, name), step_size=jnp.float32(rate))
        copies = jax.tree.map(jnp.copy, found)  # a step donates each, and two may hold the rate
        return state._replace(**{name: copies})

    return dataclasses.replace(rule, init=init)


def clipped_sgd() -> optax.GradientTransformation:
    """SGD on gradients clipped to norm 1, as counter-current learning's authors use it; `paced`."""
    return paced(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)))


def learned(
    rule: Rule,
    model: PyTree,
    rows: PyTree,
    *,
    batch: int,
    steps: int,
    seed: int = 0,
    evaluate: Evaluate | None = None,
    every: int = 0,
) -> PyTree:
    """The state of a rule after training.

    Args:
      rule: takes batches of `rows`.
      model: where it starts.
      rows: arrays with the rows of the training set on their first axis.
      batch, steps: rows of a step, and how many steps.
      seed: of the order of the rows, and of the rule.
      evaluate, every: what is called with the state, every so many steps and at the end.
    Raises:
      NumericalError: the run diverged.
      KeyboardInterrupt: a signal stopped it; what it learned so far is no result.
    """
    batches, key = ArrayBatches(rows, batch, seed), jax.random.key(seed)
    options = LoopOptions(log_every=0, evaluate_every=every, progress=False)
    outcome = train(rule, model, batches, steps, key=key, evaluate=evaluate, options=options)
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {steps}")
    return outcome.state


def accuracy(rule: Rule, state: PyTree, data: Labelled) -> float:
    """The fraction of inputs whose class has the largest score."""
    scores = np.asarray(rule.predict(state, jnp.asarray(data.x)))
    return float(np.mean(scores.argmax(-1) == data.y))


def grouped_bars(axes, found: Mapping[tuple[str, str], Sequence[float]]) -> None:
    """A bar per (group, name): the mean of its values, and their range; the first name is grey.

    Args:
      axes: where to draw.
      found: values of the seeds; a group may lack names.
    """
    groups, names = (list(dict.fromkeys(part)) for part in zip(*found, strict=True))
    width = 0.8 / len(names)
    turned = 90 if len(groups) * len(names) > 16 else 0  # figures beside each other would overlap
    for i, name in enumerate(names):
        values = {g: found[group, name] for g, group in enumerate(groups) if (group, name) in found}
        places = [g + (i - (len(names) - 1) / 2) * width for g in values]
        means = np.array([np.mean(v) for v in values.values()])
        ends = np.array([(min(v), max(v)) for v in values.values()]).T
        color = "0.6" if i == 0 else f"C{i - 1}"
        ranges = np.abs(ends - means)
        drawn = axes.bar(places, means, 0.94 * width, label=name, color=color, yerr=ranges)
        axes.bar_label(drawn, fmt="%.3f", fontsize=7, rotation=turned, padding=1)
    axes.set_xticks(range(len(groups)), [group.replace(", ", ",\n") for group in groups])
    axes.legend(frameon=False, loc="upper center", ncols=min(4, len(names)), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
