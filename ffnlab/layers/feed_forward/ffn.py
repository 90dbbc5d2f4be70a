"""Feed-forward networks of blocks: plain, gated, and gated with sparse activations."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.layers.activations import ACTIVATIONS, check_activation
from ffnlab.layers.linear import Linear
from ffnlab.layers.stacking import Statistic
from ffnlab.weights import Dense, JoinedInt4, Transposed, Weight, map_weights
from pallas_kernels import sparse


class FFN(nnx.Module):
    """y = down(act(up(x))), the ungated network of the original transformer (arXiv 1706.03762).

    Attributes:
      up: Linear map [width, hidden]; down: [hidden, width].
      activation: name of the non-linearity (static).
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        key: Array,
        activation: str = "gelu",
        bias: bool = True,
        out_scale: float = 1.0,
        dtype: DTypeLike = jnp.float32,
    ):
        check_activation(activation)
        up, down = jax.random.split(key)
        common = {"bias": bias, "dtype": dtype}
        self.up = Linear(width, hidden, key=up, axes=("embed", "mlp"), **common)
        self.down = Linear(
            hidden, width, key=down, axes=("mlp", "embed"), scale=out_scale, **common
        )
        self.activation = activation

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class GatedFFN(nnx.Module):
    """y = down(act(gate(x)) * up(x)): SwiGLU with "silu", GeGLU with "gelu_tanh" (arXiv
    2002.05202).

    Attributes:
      gate, up: Linear maps [width, hidden]; down: [hidden, width].
      activation: name of the gate's non-linearity (static).
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        key: Array,
        activation: str = "silu",
        bias: bool = False,
        out_scale: float = 1.0,
        dtype: DTypeLike = jnp.float32,
    ):
        check_activation(activation)
        gate, up, down = jax.random.split(key, 3)
        common = {"bias": bias, "dtype": dtype}
        self.gate = Linear(width, hidden, key=gate, axes=("embed", "mlp"), **common)
        self.up = Linear(width, hidden, key=up, axes=("embed", "mlp"), **common)
        self.down = Linear(
            hidden, width, key=down, axes=("mlp", "embed"), scale=out_scale, **common
        )
        self.activation = activation

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))

    def prepare(self, backend: str) -> "GatedFFN | JoinedGatedFFN":
        """This layer as `backend` reads it: gate and up in one where its kernel takes both."""
        new = map_weights(lambda weight: weight.prepare(backend), self)
        gate, up = new.gate, new.up
        if not (isinstance(gate, Linear) and isinstance(up, Linear)):  # what stands for one
            return new
        fused = new.activation == "silu" and gate.b is None and up.b is None
        if not (fused and JoinedInt4.fits(gate.weight, up.weight)):
            return new
        gate.w = nnx.Param(JoinedInt4.join(gate.weight, up.weight), axes=gate.w.axes)
        return JoinedGatedFFN(gate, new.down, activation=new.activation)


def is_plain(ffn: object) -> bool:
    """Whether this is an FFN or a gated one, and nothing stands for one of its linear maps."""
    if not isinstance(ffn, FFN | GatedFFN):
        return False
    maps = (ffn.up, ffn.down, ffn.gate) if isinstance(ffn, GatedFFN) else (ffn.up, ffn.down)
    return all(isinstance(each, Linear) for each in maps)


class JoinedGatedFFN(nnx.Module):
    """A gated FFN whose gate and up are one map, [gate | up]: what `prepare` makes of a `GatedFFN`
    for a GPU.

    Attributes:
      gate_up: Linear map [width, 2 * hidden]; of a `JoinedInt4` with "silu" one kernel computes
        act(gate(x)) * up(x).
      down: [hidden, width].
      activation: name of the gate's non-linearity (static).
    """

    def __init__(self, gate_up: Linear, down: Linear, *, activation: str):
        check_activation(activation)
        if gate_up.weight.shape[1] != 2 * down.weight.shape[0]:
            raise ConfigError(
                f"gate_up has {gate_up.weight.shape[1]} columns, expected twice the "
                f"{down.weight.shape[0]} rows of down"
            )
        self.gate_up, self.down = gate_up, down
        self.activation = activation

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        weight = self.gate_up.weight
        if isinstance(weight, JoinedInt4) and self.activation == "silu" and self.gate_up.b is None:
            return self.down(weight.glu(x))
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(ACTIVATIONS[self.activation](gate) * up)


class SparseGatedFFN(nnx.Module):
    """A gated FFN that drops hidden channels whose activated gate is small (CHESS, arXiv
    2409.01366).

    Channel j of act(gate(x)) is kept where its magnitude exceeds threshold[j]; the rest count as
    0, so their rows of `up` and `down` need not be read.

    Attributes:
      gate, up, down: as in GatedFFN; a dense up is stored transposed, one contiguous row per
        channel, and `prepare` makes it so of other formats.
      threshold: Statistic [hidden] float32; inf drops a channel always, -1 keeps it always.
      activation: name of the gate's non-linearity (static).
      strict: keep where |a| > threshold (True) or >= (False) (static).
    """

    def __init__(
        self,
        gate: Linear,
        up: Linear,
        down: Linear,
        threshold: Float[Array, "h"],
        *,
        activation: str,
        strict: bool = True,
    ):
        check_activation(activation)
        if threshold.shape != (gate.weight.shape[1],):
            raise ConfigError(
                f"threshold has shape {threshold.shape}, expected {(gate.weight.shape[1],)}"
            )
        self.gate, self.up, self.down = gate, up, down
        self.threshold = Statistic(threshold.astype(jnp.float32), axes=("mlp",))
        self.activation = activation
        self.strict = strict

    def activate(self, x: Float[Array, "*b d"]) -> Float[Array, "*b h"]:
        """The sparsified gate activations, exact zeros where dropped."""
        a = ACTIVATIONS[self.activation](self.gate(x))
        magnitude, threshold = jnp.abs(a.astype(jnp.float32)), self.threshold.get_value()
        keep = magnitude > threshold if self.strict else magnitude >= threshold
        return jnp.where(keep, a, jnp.zeros((), a.dtype))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        gate, up, down = self.activate(x), self.up.weight, self.down.weight
        # One row is a decoding step: the rows of dropped channels need not be read.
        one_row = x.size == x.shape[-1] and self.up.b is None and isinstance(down, Dense)
        if not (one_row and isinstance(up, Transposed) and isinstance(up.w, Dense)):
            return self.down(gate * self.up(x))
        x = up.w.rounded(x)
        if down.act is None:
            y = sparse.glu(gate, up.w.w, down.w, x)
        else:  # rounding needs the whole product first; what it rounds to 0 is skipped too
            y = sparse.matvec(down.rounded(sparse.rows(x, up.w.w, gate)), down.w)
        return y if self.down.b is None else y + self.down.bias.astype(y.dtype)

    def prepare(self, backend: str) -> "SparseGatedFFN":
        """This layer as `backend` reads it: on a CPU `up` has a contiguous row per channel."""
        new = map_weights(lambda weight: weight.prepare(backend), self)
        if backend == "cpu":
            new.up = map_weights(by_channel, new.up)
        return new


def by_channel(weight: Weight) -> Weight:
    """A dense weight stored one contiguous row per output channel; other formats as they are."""
    return Transposed(weight.transpose()) if isinstance(weight, Dense) else weight
