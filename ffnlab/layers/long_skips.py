"""Scaling of long skip connections: ScaleLong (2023, arXiv 2310.13545).

A U-shaped network keeps what its first half makes and gives it to its second half, the last first.
Before it is given, s_j becomes kappa_j s_j:

    "original"   1
    "root"       2^(-1/2)
    "constant"   kappa^(N - 1 - j), so that the outermost skip, the last, keeps its scale
    "learned"    sigmoid(W2 relu(W1 mean(s_j) + b1) + b2), one gate for all skips
    "apart"      the same, with a gate of each skip's own

Symbols. N: skips; j: their order of use, the innermost is 0.

What differs from the authors' code, which has no licence and of which facts alone are taken: gates
of images (`over="channels"`) average over space and scale channels; theirs are of tokens.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.layers.linear import Linear
from ffnlab.weights import Dense

__all__ = ["SCALINGS", "SkipGate", "SkipScaling", "scale_skips"]

SCALINGS = ("original", "root", "constant", "learned", "apart")
LEARNED = ("learned", "apart")
OVER = ("tokens", "channels")
REDUCED = 16  # W1 has a sixteenth of the gates as its outputs


class SkipGate(nnx.Module):
    """y = gate s, gate = sigmoid(up(relu(down(mean of s)))) in (0, 1).

    Attributes:
      down, up: Linear [n, n // 16] and back, with biases.
      over: what has a gate each: "tokens" of [b, n, d], by the mean of their channels, or
        "channels" of [b, ..., n], by the mean of their places (static).
    """

    def __init__(
        self, size: int, *, key: Array, over: str = "tokens", dtype: DTypeLike = jnp.float32
    ):
        """Draws maps and biases as torch does, U(-1, 1) / sqrt(in): gates begin near a half.

        Args:
          size: tokens, or channels (n), at least 16.
          key: of the draw.
          over: see above.
          dtype: of the parameters.
        Raises:
          ConfigError: fewer than 16, or over something else.
        """
        if over not in OVER:
            raise ConfigError(f"over={over!r} is not one of {OVER}")
        if size < REDUCED:
            raise ConfigError(f"size={size}: a learned gate needs at least {REDUCED} {over}")
        first, second = jax.random.split(key)
        inner = size // REDUCED
        self.down = as_torch(size, inner, first, ("embed", "mlp"), dtype)
        self.up = as_torch(inner, size, second, ("mlp", "embed"), dtype)
        self.over = over

    def __call__(self, s: Float[Array, "b *n d"]) -> Float[Array, "b *n d"]:
        """The skip, scaled.

        Raises:
          ConfigError: a skip of other axes, or of another number of tokens or channels.
        """
        is_tokens, size = self.over == "tokens", self.down.weight.shape[0]
        if (is_tokens and s.ndim != 3) or s.shape[1 if is_tokens else -1] != size:
            wanted = f"[b, {size}, d]" if is_tokens else f"[b, ..., {size}]"
            raise ConfigError(f"skip {s.shape}; {wanted} is accepted by gates of {self.over}")
        mean = s.mean(-1) if is_tokens else s.mean(tuple(range(1, s.ndim - 1)))
        gate = jax.nn.sigmoid(self.up(jax.nn.relu(self.down(mean))))
        gate = gate[..., None] if is_tokens else gate.reshape(len(s), *(1,) * (s.ndim - 2), -1)
        return gate.astype(s.dtype) * s


def as_torch(d_in: int, d_out: int, key: Array, axes: tuple[str, str], dtype: DTypeLike) -> Linear:
    """A map and a bias, both drawn from U(-1, 1) / sqrt(in)."""
    bound = d_in**-0.5
    w, b = (
        jax.random.uniform(k, shape, dtype, -bound, bound)
        for k, shape in zip(jax.random.split(key), ((d_in, d_out), (d_out,)), strict=True)
    )
    return Linear.of(Dense(w), b, axes=axes)


class SkipScaling(nnx.Module):
    """scaled = scaling(skips): the skips in the order of their use, innermost first.

    Attributes:
      gates: nnx.List of `SkipGate`, one for all skips or one each; empty of constants.
      method: one of `SCALINGS` (static).
      kappa: of "constant" (static).
    """

    def __init__(self, gates: Sequence[SkipGate], *, method: str, kappa: float):
        self.gates = nnx.List(gates)
        self.method, self.kappa = method, kappa

    def __call__(self, skips: Sequence[Float[Array, "..."]]) -> list[Float[Array, "..."]]:
        """The skips scaled; those given stay as they are.

        Raises:
          ConfigError: another number of skips than there are gates of their own.
        """
        if self.method == "apart" and len(skips) != len(self.gates):
            raise ConfigError(f"{len(skips)} skips for {len(self.gates)} gates of their own")
        if self.method in LEARNED:
            gates = list(self.gates) if self.method == "apart" else [self.gates[0]] * len(skips)
            return [gate(s) for gate, s in zip(gates, skips, strict=True)]
        factors = self.factors(len(skips))
        return [
            s if c == 1 else s * jnp.asarray(c, s.dtype)
            for c, s in zip(factors, skips, strict=True)
        ]

    def factors(self, count: int) -> tuple[float, ...]:
        """kappa_j of so many skips, of a method that learns none.

        >>> scale_skips("constant", kappa=0.5).factors(3)
        (0.25, 0.5, 1.0)
        """
        if self.method == "constant":
            return tuple(self.kappa ** (count - 1 - j) for j in range(count))
        return (2**-0.5 if self.method == "root" else 1.0,) * count


def scale_skips(
    method: str = "constant",
    *,
    kappa: float = 0.5,
    allow: bool = False,
    sizes: Sequence[int] = (),
    over: str = "tokens",
    key: Array | None = None,
    dtype: DTypeLike = jnp.float32,
) -> SkipScaling:
    """How long skips are scaled, of any list of them: `scale_skips(method)(skips)`.

    Args:
      method: one of `SCALINGS`.
      kappa: of "constant", in (0, 1]; the paper suggests .5 to .95.
      allow: a kappa above 1, too.
      sizes: of what is learned: tokens or channels of each skip, in the order of their use.
      over: see `SkipGate`.
      key: of what is drawn; needed where something is learned.
      dtype: of the parameters.
    Raises:
      ConfigError: another method, a kappa out of range, or nothing to learn gates of: no key, no
        sizes, fewer than 16 of something, sizes that differ for one gate.

    >>> [float(s[0]) for s in scale_skips("constant")([jnp.ones(1)] * 3)]
    [0.25, 0.5, 1.0]
    """
    if method not in SCALINGS:
        raise ConfigError(f"method={method!r} is not one of {SCALINGS}")
    if not (0 < kappa < math.inf and (kappa <= 1 or allow)):
        raise ConfigError(f"kappa={kappa} must lie in (0, 1]; allow=True takes larger ones")
    if method not in LEARNED:
        return SkipScaling([], method=method, kappa=kappa)
    if key is None or not sizes:
        raise ConfigError(f"method={method!r} needs a key and sizes={tuple(sizes)} of the skips")
    if method == "learned" and len(set(sizes)) > 1:
        raise ConfigError(f"sizes={tuple(sizes)} differ: method='apart' has a gate of each size")
    own = sizes if method == "apart" else sizes[:1]
    keys = jax.random.split(key, len(own))
    gates = [SkipGate(n, key=k, over=over, dtype=dtype) for n, k in zip(own, keys, strict=True)]
    return SkipScaling(gates, method=method, kappa=kappa)
