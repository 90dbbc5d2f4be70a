"""The transforms and rules that the contract tests run over. A new one joins by one line.

Transforms take `testing.tiny()` and `testing.batches()`, a rule what its case says.
`test_contracts_methods.py` fails when a factory of a method package is missing here.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import PyTree

from ffnlab import learning, pruning, quantization, sparsity
from ffnlab.layers import MLP
from ffnlab.rule import Rule
from ffnlab.testing import batches, tiny
from ffnlab.testing.rule import one_for_each
from ffnlab.transform import Transform

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "cats": lambda: sparsity.cats(sparsity=0.5),
    "chess": lambda: sparsity.chess(sparsity=0.5),
    "chess-abs-attention": lambda: sparsity.chess(sparsity=0.5, importance="abs", attention=True),
    "finercut": lambda: pruning.finercut(remove=1),
    "fireq": lambda: quantization.fireq(group=8, top_k=1),
    "fireq-weights": lambda: quantization.fireq(
        group=8, kv=None, query=None, channel=False, pre_rope=False, post_rope=False
    ),
    "nearest": lambda: quantization.nearest(format="int4", group=8),
    "nearest-float8": lambda: quantization.nearest(format="float8", activations="e4m3"),
}


@dataclasses.dataclass(frozen=True)
class RuleCase:
    """A rule with two batches it learns from.

    Attributes:
      make: the rule.
      model: where it starts.
      batches: two of them.
      inputs: of a batch, what `predict` takes.
      check: raises AssertionError for outputs that are not those of the inputs.
    """

    make: Callable[[], Rule]
    model: Callable[[], PyTree] = tiny
    batches: Callable[[], list] = batches
    inputs: Callable[[PyTree], PyTree] = lambda batch: batch
    check: Callable[[PyTree, PyTree], None] = one_for_each


def labelled() -> list[tuple[np.ndarray, np.ndarray]]:
    """Two batches of six inputs of width 5 with one of four classes each."""
    random = np.random.default_rng(0)
    xs = random.normal(size=(2, 6, 5)).astype(np.float32)
    return list(zip(xs, random.integers(0, 4, (2, 6)), strict=True))


PLAIN = functools.partial(MLP, (5, 8, 7, 4), bias=False)


def classifier(make: Callable[[], Rule], network: Callable = PLAIN) -> RuleCase:
    """A rule for labelled inputs, on a small network made from a key."""
    model = functools.partial(network, key=jax.random.key(0))
    return RuleCase(make, model, labelled, lambda batch: jax.numpy.asarray(batch[0]))


def scheduled(key: jax.Array) -> learning.NoPropNet:
    """A network of NoProp that learns its embedding and its noise schedule."""
    schedule = learning.LearnedSchedule(4, key=key)
    options = {"blocks": None, "embedding": 3, "schedule": schedule}
    return learning.NoPropNet(5, 4, hidden=6, key=key, **options)


RULES: dict[str, RuleCase] = {
    "backprop": RuleCase(learning.backprop),
    "counter_current": classifier(learning.counter_current),
    "noprop": classifier(
        learning.noprop, functools.partial(learning.NoPropNet, 5, 4, hidden=6, blocks=3)
    ),
    "noprop-continuous": classifier(
        lambda: learning.noprop(learning.NoPropOptions("continuous", 1.0, integration=3)),
        scheduled,
    ),
}
