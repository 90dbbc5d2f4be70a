"""The selective state space layer (Gu and Dao, Mamba, arXiv 2312.00752, algorithm 2 and figure 3).

    u, z = W_in x,   u = silu(conv(u)),   (r, B, C) = W_select u,   delta = softplus(W_step r + b)
    h_t = exp(delta_t A) h_(t-1) + delta_t u_t B_t,   y_t = C_t h_t + D u_t
    out = W_out (y * silu(z))

A = -exp(log_rate) is diagonal, one row of rates for each channel; what is kept and what is let in
is selected by the input. The recurrence is in float32 (`linear_scan`). Rows may be read piece by
piece: the state is what the convolution still has to see, and h.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError, at_least
from ffnlab.layers.conv import Conv
from ffnlab.layers.linear import Linear
from ffnlab.layers.linear_scan import linear_scan
from ffnlab.layers.recurrent import uniform

__all__ = ["Mamba", "MambaState"]

STEPS = (1e-3, 0.1)  # delta of an input of zeros is drawn between these, evenly in its logarithm
LEAST_STEP = 1e-4


class MambaState(NamedTuple):
    """What a row leaves behind.

    Attributes:
      inputs: of the convolution, the last but one for each tap after the first.
      h: in float32.
    """

    inputs: Float[Array, "b k e"]
    h: Float[Array, "b e n"]


class Mamba(nnx.Module):
    """x [b, t, d] -> [b, t, d], each place reading those before it.

    Attributes:
      input: Linear [d, 2 e], u beside z.
      conv: Conv of each of the e channels alone, causal.
      select: Linear [e, r + 2 n], r beside B beside C.
      step: Linear [r, e] with a bias.
      log_rate: Param [e, n], log(-A).
      skip: Param [e], D.
      output: Linear [e, d].
    """

    def __init__(
        self,
        d: int,
        *,
        key: Array,
        states: int = 16,
        expand: int = 2,
        taps: int = 4,
        rank: int | None = None,
        dtype: DTypeLike = jnp.float32,
    ):
        """Draws as the authors do: maps from U(-1, 1) / sqrt(in), A = -(1, …, n), D = 1.

        Args:
          d: width.
          key: of the draws.
          states: n, numbers that each channel remembers.
          expand: e / d.
          taps: of the convolution.
          rank: r, of the map to delta; ceil(d / 16) when None.
          dtype: of the parameters.
        Raises:
          ConfigError: a size below 1.
        """
        rank = -(-d // 16) if rank is None else rank
        at_least(1, d=d, states=states, expand=expand, taps=taps, rank=rank)
        keys, e = jax.random.split(key, 6), expand * d

        def linear(key: Array, rows: int, out: int, axes: tuple[str, str], **more: bool) -> Linear:
            init = functools.partial(uniform, bound=rows**-0.5)
            return Linear(rows, out, key=key, axes=axes, init=init, dtype=dtype, **more)

        self.input = linear(keys[0], d, 2 * e, ("embed", "mlp"))
        self.conv = Conv(
            e, e, key=keys[1], size=(taps,), groups=e, padding="causal", bias=True, dtype=dtype
        )
        self.select = linear(keys[2], e, rank + 2 * states, ("mlp", "features"))
        step = linear(keys[3], rank, e, ("features", "mlp"), bias=True)
        self.step = step.replace(step.weight, first_steps(keys[4], e).astype(dtype))
        rates = jnp.broadcast_to(jnp.arange(1, states + 1, dtype=jnp.float32), (e, states))
        self.log_rate = nnx.Param(jnp.log(rates).astype(dtype), axes=("mlp", "features"))
        self.skip = nnx.Param(jnp.ones(e, dtype), axes=("mlp",))
        self.output = linear(keys[5], e, d, ("mlp", "embed"))

    def __call__(
        self, x: Float[Array, "b t d"], state: MambaState | None = None
    ) -> tuple[Float[Array, "b t d"], MambaState]:
        """The outputs of all places, and the state behind the last.

        Args:
          x: rows.
          state: that rows before these left; None for none.
        Raises:
          ConfigError: a state of other rows or sizes.
        """
        u, z = jnp.split(self.input(x), 2, axis=-1)
        state = self.start(u) if state is None else self.checked(state, u)
        seen = jnp.concatenate([state.inputs.astype(u.dtype), u], axis=1)
        kept = state.inputs.shape[1]
        u = jax.nn.silu(self.conv(seen)[:, kept:])
        y, h = self.recurred(u, state.h)
        y = self.output(y * jax.nn.silu(z))
        return y, MambaState(seen[:, seen.shape[1] - kept :], h)

    def recurred(
        self, u: Float[Array, "b t e"], h: Float[Array, "b e n"]
    ) -> tuple[Float[Array, "b t e"], Float[Array, "b e n"]]:
        """The recurrence: its outputs, and h behind the last."""
        n, rank = self.log_rate.shape[1], self.step.weight.shape[0]
        low, b, c = jnp.split(self.select(u), [rank, rank + n], axis=-1)
        wide = [value.astype(jnp.float32) for value in (self.step(low), u, b, c)]
        # Places first, which is how the recurrence reads them.
        raw, v, b, c = (jnp.swapaxes(value, 0, 1) for value in wide)
        delta = jax.nn.softplus(raw)
        rate = -jnp.exp(self.log_rate.get_value().astype(jnp.float32))
        decay = jnp.exp(delta[..., None] * rate)
        hs = linear_scan(decay, (delta * v)[..., None] * b[:, :, None], h)
        y = jnp.sum(hs * c[:, :, None], -1) + self.skip.get_value().astype(jnp.float32) * v
        return jnp.swapaxes(y, 0, 1).astype(u.dtype), hs[-1]

    def start(self, u: Float[Array, "b t e"]) -> MambaState:
        """The state before the first place: zeros."""
        e, n = self.log_rate.shape
        kept = self.conv.window.size[0] - 1
        return MambaState(jnp.zeros((len(u), kept, e), u.dtype), jnp.zeros((len(u), e, n)))

    def checked(self, state: MambaState, u: Float[Array, "b t e"]) -> MambaState:
        """The state; raises ConfigError unless it is one of these rows."""
        shapes = [part.shape for part in state]
        wanted = [part.shape for part in jax.eval_shape(self.start, u)]
        if shapes != wanted:
            raise ConfigError(f"state has shapes {shapes}; {wanted} are accepted for these rows")
        return state


def first_steps(key: Array, count: int) -> Float[Array, "e"]:
    """Biases of which softplus is drawn between `STEPS`, evenly in its logarithm."""
    low, high = (jnp.log(step) for step in STEPS)
    steps = jnp.exp(jax.random.uniform(key, (count,), minval=low, maxval=high))
    steps = jnp.maximum(steps, LEAST_STEP)
    return steps + jnp.log(-jnp.expm1(-steps))
