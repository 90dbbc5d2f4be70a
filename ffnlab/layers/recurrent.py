"""Recurrent networks: a cell is a function, and the layer owns the scan over time.

    a = x_t @ w_input + b_input,   u = h_(t-1) @ w_hidden (+ b_hidden)
    state_t = cell(a, u, state_(t-1))

The products with the inputs of all steps are one product before the scan. An adjoint of our own
that makes the gradient of w_hidden one product after the scan was tried: it is as fast as the
scan's own.

A row may be ragged: where a mask is False the state stays what it was and the output is 0.

Sources: Elman, Finding structure in time, 1990; GRU, arXiv 1406.1078, as torch has it (the reset
gate after the product, so that the candidate has two biases); LSTM, Hochreiter & Schmidhuber 1997,
with a forget gate.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ffnlab.errors import ConfigError
from ffnlab.layers.linear import Linear
from ffnlab.weights import Weight

__all__ = ["CELLS", "Cell", "Recurrent", "elman", "gru", "lstm"]

State = tuple[Array, ...]
DIRECTIONS = ("forward", "reverse", "both")


def elman(a: Float[Array, "b h"], u: Float[Array, "b h"], state: State) -> State:
    """(tanh(a + u),)."""
    return (jnp.tanh(a + u),)


def gru(a: Float[Array, "b h3"], u: Float[Array, "b h3"], state: State) -> State:
    """(n + z * (h - n),) with r, z = sigmoid(a + u) and n = tanh(a_n + r * u_n); gates r, z, n."""
    (h,) = state
    (a_r, a_z, a_n), (u_r, u_z, u_n) = (jnp.split(v, 3, axis=-1) for v in (a, u))
    r, z = jax.nn.sigmoid(a_r + u_r), jax.nn.sigmoid(a_z + u_z)
    n = jnp.tanh(a_n + r * u_n)
    return (n + z * (h - n),)


def lstm(a: Float[Array, "b h4"], u: Float[Array, "b h4"], state: State) -> State:
    """(o * tanh(c'), c') with c' = f * c + i * g; gates i, f, g, o, sigmoid but for g's tanh.

    All gates are one tanh, by sigmoid(x) = (1 + tanh(x / 2)) / 2: on a CPU XLA takes as long for a
    nonlinearity of each slice as for the product before them, and a third of that for this.
    """
    scale = np.repeat(np.float32([0.5, 0.5, 1, 0.5]), state[1].shape[-1])
    i, f, g, o = jnp.split(jnp.tanh(scale * (a + u)), 4, axis=-1)
    i, f, o = (0.5 + 0.5 * gate for gate in (i, f, o))
    c = f * state[1] + i * g
    return o * jnp.tanh(c), c


class Cell(NamedTuple):
    """What a layer asks of a cell.

    Attributes:
      step: (a [b, gates * h], u [b, gates * h], state) -> state, in float32; its first part is h.
      gates: parts of a and u.
      parts: arrays [b, h] in a state.
      bias: whether the product with h has a bias of its own; elsewhere only a sum of two biases
        would count.
    """

    step: Callable[[Array, Array, State], State]
    gates: int
    parts: int
    bias: bool


CELLS = {
    "elman": Cell(elman, 1, 1, False),
    "gru": Cell(gru, 3, 1, True),
    "lstm": Cell(lstm, 4, 2, False),
}


class Recurrent(nnx.Module):
    """y_t = h_t of a cell, over the steps of each row; several layers, one or both directions.

    The maps of the hidden state run inside the scan, not as calls: `tree.capture` sees this layer
    and the input maps.

    Attributes:
      input: nnx.List of Linear [in, gates * hidden], by layer, and in a layer by direction.
      hidden: nnx.List of Linear [hidden, gates * hidden], in the same order. torch's two biases of
        a map are one here, their sum, but for a GRU's.
      cell: a name in `CELLS` (static).
      direction: "forward", "reverse", or "both", forward first (static).
    """

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        *,
        key: Array,
        cell: str = "lstm",
        layers: int = 1,
        direction: str = "forward",
        bias: bool = True,
        init: Initializer | None = None,
        dtype: DTypeLike = jnp.float32,
    ):
        """Draws every weight from U(-1, 1) / sqrt(hidden), as torch does; biases are zero.

        Args:
          d_in, d_hidden: widths.
          key: of the draw.
          cell: "elman", "gru" or "lstm".
          layers: each reads the output of the one before it.
          direction: in which a row is read; "both" gives 2 * hidden channels.
          bias: whether there are biases.
          init: draws every weight instead.
          dtype: of the parameters.
        Raises:
          ConfigError: an unknown cell or direction, or no layer.
        """
        if cell not in CELLS:
            raise ConfigError(f"cell={cell!r} is not one of {sorted(CELLS)}")
        if direction not in DIRECTIONS:
            raise ConfigError(f"direction={direction!r} is not one of {DIRECTIONS}")
        if layers < 1 or d_hidden < 1:
            raise ConfigError(f"layers={layers} and d_hidden={d_hidden} must be at least 1")
        self.cell, self.direction = cell, direction
        kind, sides = CELLS[cell], 1 + (direction == "both")
        out = kind.gates * d_hidden
        if init is None:
            init = functools.partial(uniform, bound=d_hidden**-0.5)
        widths = [d_in] * sides + [sides * d_hidden] * sides * (layers - 1)
        pairs = [jax.random.split(k) for k in jax.random.split(key, len(widths))]
        common = {"init": init, "dtype": dtype}
        self.input = nnx.List(
            Linear(width, out, key=k, axes=("embed", "mlp"), bias=bias, **common)
            for width, (k, _) in zip(widths, pairs, strict=True)
        )
        self.hidden = nnx.List(
            Linear(d_hidden, out, key=k, axes=("embed", "mlp"), bias=bias and kind.bias, **common)
            for _, k in pairs
        )

    @property
    def directions(self) -> tuple[bool, ...]:
        """Of each direction of a layer, whether it reads from the end."""
        return {"forward": (False,), "reverse": (True,), "both": (False, True)}[self.direction]

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(layers, directions, hidden): a state is of arrays [layers, directions, b, hidden]."""
        sides = len(self.directions)
        return len(self.hidden) // sides, sides, self.hidden[0].weight.shape[0]

    def __call__(
        self,
        x: Float[Array, "b t in"],
        state: State | None = None,
        *,
        mask: Bool[Array, "rows steps"] | None = None,
    ) -> tuple[Float[Array, "b t out"], State]:
        """Runs over all steps.

        Args:
          x: rows of steps.
          state: the initial state: (h,), or (h, c) of an LSTM, each [layers, directions, b,
            hidden]; zeros when None.
          mask: [b, t], True where a step is there, on either side or anywhere; all are when None.
        Returns:
          (h of the last layer at every step, directions side by side; the final state: of a
          direction that reads from the end what it has at the first step). h is of x's dtype, c is
          float32.
        Raises:
          ValueError: a state or a mask of another shape.
        """
        layers, sides, width = self.state_shape
        parts = CELLS[self.cell].parts
        if state is None:
            zero = jnp.zeros((layers, sides, len(x), width), jnp.float32)
            state = (zero,) * parts
        self.check(x, state, mask)
        steps_first = None if mask is None else mask.T[:, :, None]
        finals = []
        for layer in range(layers):
            outputs = []
            for side, reverse in enumerate(self.directions):
                at = layer * sides + side
                first = tuple(part[layer, side] for part in state)
                y, final = self.run(at, x, first, steps_first, reverse)
                outputs.append(y)
                finals.append(final)
            x = outputs[0] if sides == 1 else jnp.concatenate(outputs, axis=-1)
        by_part = [jnp.stack(part) for part in zip(*finals, strict=True)]
        return x, tuple(part.reshape(layers, sides, *part.shape[1:]) for part in by_part)

    def run(
        self, at: int, x: Array, first: State, mask: Array | None, reverse: bool
    ) -> tuple[Array, State]:
        """One direction of one layer: its outputs [b, t, h], and its final state."""
        a = jnp.swapaxes(self.input[at](x), 0, 1).astype(jnp.float32)
        h, *rest = first
        first = (h.astype(x.dtype), *(part.astype(jnp.float32) for part in rest))
        hidden = self.hidden[at]

        def step(state: State, given: tuple) -> tuple[State, Array]:
            u = product(hidden.weight, hidden.bias, state[0])
            return stepped(self.cell, given[0], u, state, given[1])

        final, ys = jax.lax.scan(step, first, (a, mask), reverse=reverse)
        return jnp.swapaxes(ys, 0, 1), final

    def check(self, x: Array, state: State, mask: Array | None) -> None:
        """Raises ValueError for a state or a mask that does not fit x."""
        layers, sides, width = self.state_shape
        shape, parts = (layers, sides, len(x), width), CELLS[self.cell].parts
        if len(state) != parts or any(part.shape != shape for part in state):
            raise ValueError(
                f"state has shapes {[part.shape for part in state]}; the {self.cell} takes "
                f"{parts} of {shape}"
            )
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(f"mask has shape {mask.shape}, the rows {x.shape[:2]}")


def product(weight: Weight, bias: Array | None, h: Float[Array, "*t b h"]) -> Array:
    """h @ w + b, in float32."""
    u = weight.matmul(h).astype(jnp.float32)
    return u if bias is None else u + bias.astype(jnp.float32)


def stepped(cell: str, a: Array, u: Array, state: State, mask: Array | None) -> tuple[State, Array]:
    """The state after one step, in the dtypes of the one before it, and the step's output."""
    new = CELLS[cell].step(a, u, tuple(part.astype(jnp.float32) for part in state))
    new = tuple(part.astype(old.dtype) for part, old in zip(new, state, strict=True))
    if mask is None:
        return new, new[0]
    kept = tuple(jnp.where(mask, part, old) for part, old in zip(new, state, strict=True))
    return kept, jnp.where(mask, new[0], jnp.zeros((), new[0].dtype))


def uniform(key: Array, shape: tuple[int, ...], dtype: DTypeLike, *, bound: float) -> Array:
    """U(-bound, bound)."""
    return jax.random.uniform(key, shape, dtype, -bound, bound)
