"""What a network costs: products, bytes, and time beside a reference form on this machine.

The time of a small network is decided by what a machine does beside it. So it is measured in turns
with a reference that is the same in a whole search, on one device, and what a search is given is
the ratio of the two (`ffnlab.clock`). A network that cannot be measured raises what
`ffnlab.pruning.search.search` drops with a warning.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from ffnlab import tree
from ffnlab.clock import Spread, compiled, in_turns
from ffnlab.errors import ConfigError, at_least
from ffnlab.models.calibration import called
from ffnlab.models.cost import multiply_adds
from ffnlab.pruning.search.space import Config, Space

__all__ = ["Costs", "drawn_alike", "macs", "meter"]


class Costs(NamedTuple):
    """What a network costs.

    Attributes:
      macs: multiplications with an addition that one row of inputs takes.
      bytes: of all that the network holds, as it is stored.
      seconds: of a call with all rows.
      ratio: of those to the reference's in the same turn.
    """

    macs: int
    bytes: int
    seconds: Spread
    ratio: Spread


def macs(model: Any, inputs: PyTree) -> int:
    """Multiply-adds of a model's products for one row of inputs; nothing is computed.

    Args:
      model: any; leaves may be abstract.
      inputs: what it is called with (`ffnlab.models.calibration.called`), rows on the first axis
        of every array; leaves may be abstract.
    Raises:
      ConfigError: as `ffnlab.models.cost.multiply_adds`.

    >>> from ffnlab.layers import MLP
    >>> macs(MLP((4, 3, 2), key=jax.random.key(0)), np.ones((7, 4), np.float32))
    18
    """
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), inputs)
    return multiply_adds(called, model, first)


def meter(reference: Any, inputs: PyTree, *, turns: int = 21) -> Callable[[Any], Costs]:
    """A function that measures models beside a reference, which is compiled once.

    Args:
      reference: a model, such as the largest of a search.
      inputs: what models are called with, as in `macs`; all rows are timed at once.
      turns: that a model and the reference take, after one to compile and warm up.
    Returns:
      model -> `Costs`. It compiles each model that it is given.
    Raises:
      ConfigError: turns below 1.

    >>> from ffnlab.layers import MLP
    >>> net = lambda hidden: MLP((4, hidden, 2), key=jax.random.key(0))
    >>> costs = meter(net(64), np.ones((8, 4), np.float32), turns=3)(net(3))
    >>> costs.macs, costs.bytes, costs.ratio.median > 0
    (18, 92, True)
    """
    at_least(1, turns=turns)
    theirs = compiled(called, reference, inputs)

    def costs(model: Any) -> Costs:
        calls = {"ours": compiled(called, model, inputs), "reference": theirs}
        times = in_turns(calls, turns)
        counted = macs(model, inputs), tree.nbytes(model)
        return Costs(*counted, times.of("ours"), times.over("ours", "reference"))

    return costs


def drawn_alike(
    space: Space,
    cost: Callable[[Config], float | int],
    target: float | int,
    rng: np.random.Generator,
    *,
    within: float = 0.01,
    draws: int = 2000,
    besides: Config | None = None,
) -> Config:
    """A network drawn from those that cost as much as another: what a search has to beat.

    Args:
      space: of networks.
      cost: of a configuration, such as its MACs; asked `draws` times at most.
      target: the cost that is wanted, above 0.
      rng: drawn from.
      within: how far the cost may be from the target, relative to it.
      draws: tried; of that many the first within is taken.
      besides: a configuration, of a canonical vector, that is not taken.
    Returns:
      the configuration; where none drawn was within, the nearest of them.
    Raises:
      ConfigError: a target that is not above 0, draws below 1, or nothing drawn but `besides`.

    >>> from ffnlab.pruning.search import Variable
    >>> space = Space((Variable("width", tuple(range(1, 9)), count=4),))
    >>> rng = np.random.default_rng(0)
    >>> sum(drawn_alike(space, lambda c: sum(c["width"]), 12, rng)["width"])
    12
    """
    at_least(1, draws=draws)
    if not target > 0:
        raise ConfigError(f"target={target} must be above 0")
    best, nearest = None, np.inf
    for _ in range(draws):
        config = space.decode(space.canonical(space.sample(rng, 1))[0])
        if config == besides:
            continue
        far = abs(cost(config) / target - 1)
        if best is None or far < nearest:
            best, nearest = config, far
        if nearest <= within:
            break
    if best is None:
        raise ConfigError(f"draws={draws} gave nothing but besides={besides}; give more")
    return best
