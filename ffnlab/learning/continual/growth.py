"""A recurrent hypernetwork becomes wider, and gives what it gave."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers.recurrent import CELLS
from ffnlab.layers.sliding import is_size
from ffnlab.learning.continual.rule import ContinualState
from ffnlab.models import Hypernet
from ffnlab.weights import Dense

__all__ = ["grow", "widened"]

Fill = Callable[[int, tuple[int, ...]], Array]


def grow(state: ContinualState, width: int, *, key: Array) -> ContinualState:
    """The state whose recurrent hypernetwork has `width` units more in its layer.

    New units read everything, and are read by nothing yet: their entries in the gates of the units
    that there are, and in the last map, are 0. So all that is given for every task stays, and the
    gradient of the last map wakes them. theta* grows alike; what the optimizer holds of new
    numbers is 0.

    An LSTM of H units on E numbers, for chunks of S, has 4 ((H + width) (E + H + width + 1) -
    H (E + H + 1)) + width S numbers more.

    Args:
      state: of `continual`; left intact. `ffnlab.learning.from_state(rule, state)` goes on from it.
      width: units more, >= 1.
      key: of their draw, from U(-1, 1) / sqrt(H + width).
    Raises:
      ConfigError: the generator is no recurrent one of one layer, or width is no whole number
        above 0.
    """
    if not is_size(width, 1):
        raise ConfigError(f"width={width} must be a whole number of at least 1")
    model = state.model
    if model.spec.architecture != "rnn" or len(model.spec.hidden) != 1:
        raise ConfigError(
            f"architecture={model.spec.architecture!r}, hidden={model.spec.hidden}: a recurrent "
            "generator of one layer can grow"
        )
    bound = (model.spec.hidden[0] + width) ** -0.5

    def drawn(which: int, shape: tuple[int, ...]) -> Array:
        mine = jax.random.fold_in(key, which)  # theta and theta* get the same units
        return jax.random.uniform(mine, shape, minval=-bound, maxval=bound)

    is_model = lambda node: isinstance(node, Hypernet)  # noqa: E731
    memory = jax.tree.map(
        lambda node: (
            widened(node, width, lambda _, shape: jnp.zeros(shape)) if is_model(node) else node
        ),
        state.optimizer,
        is_leaf=is_model,
    )
    wide = [widened(net, width, drawn) for net in (model, state.before)]
    same = jax.tree.map(jnp.copy, state._replace(model=None, before=None, optimizer=None))
    return same._replace(model=wide[0], before=wide[1], optimizer=memory)


def widened(net: Hypernet, width: int, fill: Fill) -> Hypernet:
    """A hypernetwork, or a tree of its structure, with more units.

    Args:
      net: of a recurrent generator of one layer.
      width: units more.
      fill: (0, 1 or 2, shape) -> by what new units read inputs, old units, and each other.
    """
    new, cell = tree.copy(net), net.trunk
    old, gates = net.spec.hidden[0], CELLS[net.spec.cell].gates

    def columns(array: Array, more: Array) -> Array:
        """Gates side by side, [.., gates * H], each with its new units."""
        parts = (jnp.split(each, gates, axis=-1) for each in (array, more))
        pairs = zip(*parts, strict=True)
        return jnp.concatenate([part for pair in pairs for part in pair], axis=-1)

    reads = matrix(cell.input[0])
    inner = columns(reads, fill(0, (reads.shape[0], gates * width)).astype(reads.dtype))
    hears = matrix(cell.hidden[0])
    hears = columns(hears, fill(1, (old, gates * width)).astype(hears.dtype))
    among = fill(2, (width, gates * width)).astype(hears.dtype)
    back = columns(jnp.zeros((width, gates * old), hears.dtype), among)
    set_matrix(new.trunk.input[0], inner)
    set_matrix(new.trunk.hidden[0], jnp.concatenate([hears, back]))
    for linear in (new.trunk.input[0], new.trunk.hidden[0]):
        if linear.b is not None and linear.bias is not None:
            linear.b.set_value(columns(linear.bias, jnp.zeros(gates * width, linear.bias.dtype)))
    last = matrix(net.heads)
    more = jnp.zeros((width, last.shape[1]), last.dtype)
    set_matrix(new.heads, jnp.concatenate([last, more]))
    new.spec = dataclasses.replace(net.spec, hidden=(old + width,))
    if net.config is not None:
        new.config = dataclasses.replace(net.config, spec=new.spec)
    return new


def matrix(linear: PyTree) -> Array:
    """The dense matrix of a map."""
    return linear.weight.dense()


def set_matrix(linear: PyTree, value: Array) -> None:
    """Gives a map that was copied another matrix."""
    linear.w.set_value(Dense(value))
