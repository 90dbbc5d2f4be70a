"""What the study of exact permutations measures: ensembles, and the networks that they need."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ffnlab.errors import NumericalError
from ffnlab.learning.exact_permutations.closed_form import Kernel, ensemble_size
from ffnlab.learning.exact_permutations.ensemble import (
    averaged,
    basis,
    binary_inputs,
    decided,
    exact_permutations,
    networks,
    permuted_bits,
)
from ffnlab.parallel import LoopOptions, train

__all__ = [
    "ORDERS",
    "RECORDED",
    "STEPS",
    "THRESHOLD",
    "Ensemble",
    "ensemble",
    "predicted",
    "predicted_for_all",
]

STEPS = 300
ORDERS = 21  # in which networks join an average
# Networks that the authors needed at two ones (results/experiment_1 and experiment_2 of
# opallab/permlearn): for .9 and for .999 of 1000 inputs right.
RECORDED = {
    0.9: {5: 43, 10: 69, 15: 103, 20: 117, 25: 157, 30: 175},
    0.999: {5: 43, 10: 129, 15: 163, 20: 254, 25: 308, 30: 318},
}
THRESHOLD = 0.02  # safe up to k = 30


class Ensemble(NamedTuple):
    """What an ensemble gave for inputs of two ones, and for all where there are few.

    Attributes:
      outputs: [count, inputs, k], of inputs of two ones.
      wanted: [inputs, k], which outputs are to be 1.
      needed: networks for .9 and .999 of these right at a cut of 0, one for each order; NaN where
        all do not suffice.
      whole: networks for all 2^k - 1 inputs right at a cut of .02, likewise; empty where not asked.
      stuck: the largest share of all 2^k - 1 inputs right at a cut of 0, of any number of networks.
    """

    outputs: np.ndarray
    wanted: np.ndarray
    needed: Mapping[float, Sequence[float]]
    whole: Sequence[float]
    stuck: float


def ensemble(name: str, k: int, width: int, count: int, seed: int) -> Ensemble:
    """Trains an ensemble and counts the networks that it needs.

    Raises:
      NumericalError: descent did not reach the basis.
    """
    random = np.random.default_rng((seed, k))
    batch = basis(random.permutation(k))
    rule = exact_permutations(k, width, count, parametrization=name, chunk=25)
    key, options = jax.random.fold_in(jax.random.key(seed), k), LoopOptions(log_every=0)
    start = networks(k, width, count, key)
    outcome = train(rule, start, lambda _: batch, STEPS, key=key, options=options, together=50)
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {STEPS}")
    if not outcome.metrics["worst"] < 1e-6:
        raise NumericalError(
            f"{name}, k={k}: the worst loss is {outcome.metrics['worst']} after {STEPS} steps"
        )

    def of(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        outputs = np.asarray(rule.predict(outcome.state, binary_inputs(bits)))
        return outputs, permuted_bits(bits, batch.y)

    pairs = np.array(list(itertools.combinations(range(k), 2)))
    outputs, wanted = of(np.eye(k, dtype=int)[pairs].sum(1))
    orders = [random.permutation(count) for _ in range(ORDERS)]
    right = [exact(outputs[order], wanted, 0.0) for order in orders]
    needed = {share: [first(r >= share - 1e-9) for r in right] for share in RECORDED}
    if k > 8:
        return Ensemble(outputs, wanted, needed, (), math.nan)
    every, bits = of(np.array(list(itertools.product((0, 1), repeat=k)))[1:])
    whole = [first(exact(every[order], bits, THRESHOLD) == 1) for order in orders]
    return Ensemble(outputs, wanted, needed, whole, float(exact(every, bits, 0.0).max()))


def exact(outputs: np.ndarray, wanted: np.ndarray, threshold: float) -> np.ndarray:
    """The share of inputs with all outputs right, of averages of 1, 2, … networks, [count]."""
    means = averaged(outputs)
    found = decided(means, threshold) if threshold else means > 0
    return (found == wanted).all(-1).mean(-1)


def first(reached: np.ndarray) -> float:
    """The number of networks from which on it is reached, NaN where it never is for good."""
    missing = np.flatnonzero(~reached)
    after = 0 if not len(missing) else missing[-1] + 1
    return float(after + 1) if after < len(reached) else math.nan


def predicted(k: int, kernel: Kernel, *, inputs: float = 1.0) -> int:
    """Networks that the closed form asks for at two ones and a cut of 0, for so many inputs."""
    return ensemble_size(k, 2, kernel, inputs=inputs)


def predicted_for_all(k: int, kernel: Kernel, cut: float) -> int:
    """Networks that the closed form asks for at a cut, all inputs of any number of ones right."""
    every = 2.0**k - 1
    return max(ensemble_size(k, m, kernel, threshold=cut, inputs=every) for m in range(1, k + 1))
