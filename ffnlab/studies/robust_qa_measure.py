"""Heads of `robust_qa_moe` trained alike: rates chosen by validation, seeds as members."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ffnlab.learning import backprop, members
from ffnlab.losses import InformedLoss, Loss, routed, span
from ffnlab.models.calibration import called
from ffnlab.routing import evaluated, switch_head, top2_head
from ffnlab.studies.side_by_side import learned_members
from ffnlab.transform import Transform

__all__ = [
    "DENSE",
    "DENSE_BLOCK",
    "DESIGNS",
    "SWITCH",
    "TOP2",
    "Design",
    "Learned",
    "learned",
    "logits_of",
    "spans",
]

TOP2, SWITCH, DENSE, DENSE_BLOCK = "top-2", "Switch", "dense", "dense block"


class Design(NamedTuple):
    """A head, and what it learns by.

    Attributes:
      head: (experts=, hidden=, seed=) -> transform of an encoder.
      experts: as many as are asked for, or one where it is dense.
      loss: of a span, and of the balance.
      keyed: the loss is informed.
    """

    head: Callable[..., Transform]
    experts: int | None
    loss: Loss | InformedLoss
    keyed: bool = False

    def make(self, experts: int, hidden: int) -> Callable[..., Transform]:
        """The head of a size."""
        return functools.partial(self.head, experts=self.experts or experts, hidden=hidden)


def spans(model: Callable, batch: PyTree) -> tuple[Float[Array, ""], dict[str, Array]]:
    """`ffnlab.losses.span` of inputs by the names of a model's arguments."""
    return span(lambda inputs: called(model, inputs), batch)


def switch(**options: Any) -> Transform:
    """One Switch block; its heads divide every width of the study."""
    return switch_head(layers=1, heads=4, **options)


TOP2_LOSS = routed(spans, balance=1.0, choices=1, per_sequence=True, keyed=True)
DESIGNS: Mapping[str, Design] = {
    DENSE: Design(top2_head, 1, routed(spans, balance=0.0)),
    TOP2: Design(top2_head, None, TOP2_LOSS, True),
    DENSE_BLOCK: Design(switch, 1, routed(spans, balance=0.0)),
    SWITCH: Design(switch, None, routed(spans, balance=1e-2)),
}


class Learned(NamedTuple):
    """What a side reached.

    Attributes:
      rates: all that were tried, with the validation score of the first seed.
      rate: the one with the best.
      models: by it, one of each seed.
    """

    rates: Mapping[float, float]
    rate: float
    models: Sequence[Any]


def learned(
    make: Callable[[int], Any],
    loss: Loss | InformedLoss,
    batches: Callable[[int], PyTree],
    steps: int,
    rates: Sequence[float],
    seeds: Sequence[int],
    score: Callable[[Any], float],
    *,
    informed: bool = False,
) -> Learned:
    """Trains a side by Adam: the first seed at each rate, then the others at the best of them.

    Args:
      make: seed -> the model that it starts from.
      loss: what it learns by.
      batches: by position, the same for all.
      steps: of every run.
      rates: of Adam.
      seeds: of the parameters.
      score: of a model on what is for validation, the larger the better; not asked of one rate.
      informed: see `ffnlab.learning.backprop`.
    """

    def run(pairs: Sequence[tuple[float, int]]) -> list[Any]:
        if not pairs:
            return []
        models = jax.tree.map(lambda *x: jnp.stack(x), *(make(seed) for _, seed in pairs))
        one = lambda rate: backprop(loss, optax.adam(rate), informed=informed)  # noqa: E731
        rule = members(one, len(pairs), vary={"rate": [rate for rate, _ in pairs]})
        return learned_members(rule, models, batches, steps, seeds[0], len(pairs))

    if len(rates) == 1:
        return Learned({}, rates[0], run([(rates[0], seed) for seed in seeds]))
    first = run([(rate, seeds[0]) for rate in rates])
    scores = {rate: score(model) for rate, model in zip(rates, first, strict=True)}
    best = max(scores, key=lambda rate: scores[rate])
    others = run([(best, seed) for seed in seeds[1:]])
    return Learned(scores, best, [first[list(rates).index(best)], *others])


@jax.jit
def _called(model: Any, inputs: Mapping[str, Array]) -> Array:
    return called(model, inputs)


def logits_of(model: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """What a model as it is evaluated makes of inputs, on the host."""
    return np.asarray(_called(evaluated(model), inputs))
