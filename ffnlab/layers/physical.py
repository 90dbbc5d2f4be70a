"""Physical systems that compute: fixed nonlinear maps between the trained ones of a network.

Light through a medium that scatters it, a chain of oscillators and a system driven by two bits a
value are simulated; `BlackBox` is any function of one's own, hardware too. What a system is made of
lies in `Statistic`s: it is saved and sharded, and never trained. All take a row at a time and what
they give is `[..., outputs]`; a key draws their noise, and without one there is none.

The simulations follow the experiments of physical local learning (arXiv 2304.11042), whose own
systems are measurements that are not public. A row is brought to a mean square of 1 before it goes
in, as a source of limited power does; a row of zeros stays one.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from ffnlab.errors import ConfigError, at_least
from ffnlab.layers.stacking import Statistic

__all__ = ["BlackBox", "TanhChain", "Transmission", "TwoBit"]

EPS = 1e-6  # added to the root mean square of a row, as the authors do


class Transmission(nnx.Module):
    """y = |x' t|, x' = x / rms(x): what a camera sees behind a medium that scatters light.

    Attributes:
      t: Statistic holding [in, 2, out], real and imaginary parts of the transmission matrix.
      noise: standard deviation of what is added to y, whose mean square is 1 (static).
    """

    def __init__(self, d_in: int, d_out: int, *, key: Array, noise: float = 0.0):
        """Draws both parts of the matrix from N(0, 1 / (2 in)).

        Args:
          d_in, d_out: widths.
          key: of the draw.
          noise: see the class, >= 0.
        Raises:
          ConfigError: a width below 1, noise below 0.
        """
        check_system(noise, d_in=d_in, d_out=d_out)
        t = jax.random.normal(key, (d_in, 2, d_out)) * (2 * d_in) ** -0.5
        self.t = Statistic(t, axes=(None, None, None))
        self.noise = noise

    @property
    def outputs(self) -> int:
        """Width of y."""
        return self.t.get_value().shape[-1]

    def redrawn(self, key: Array) -> "Transmission":
        """Another medium of the same size."""
        d_in, _, d_out = self.t.get_value().shape
        return Transmission(d_in, d_out, key=key, noise=self.noise)

    def __call__(
        self, x: Float[Array, "*b in"], key: Array | None = None
    ) -> Float[Array, "*b out"]:
        t = self.t.get_value().astype(x.dtype)
        parts = jnp.tensordot(of_unit_power(x), t, 1)
        square = jnp.sum(parts * parts, axis=-2)
        return noisy(root(square), self.noise, key)


class TanhChain(nnx.Module):
    """Oscillators in a row, each driven by one value and coupled to its neighbours.

        s_i <- tanh(a_i u_i + b_i s_{i-1} + c_i s_{i+1}), `rounds` times from 0;   u = |x| / rms(x)

    Attributes:
      gains: Statistic holding [3, d]: a, b, c.
      rounds: how often a value is passed on (static).
      noise: standard deviation of what is added to s (static).
    """

    def __init__(self, d: int, *, key: Array, rounds: int = 8, noise: float = 0.0):
        """Draws all gains from N(0, 1).

        Args:
          d: width, of inputs and outputs.
          key: of the draw.
          rounds: see the class, >= 1.
          noise: see the class, >= 0.
        Raises:
          ConfigError: a width or rounds below 1, noise below 0.
        """
        check_system(noise, d=d, rounds=rounds)
        self.gains = Statistic(jax.random.normal(key, (3, d)), axes=(None, None))
        self.rounds = rounds
        self.noise = noise

    @property
    def outputs(self) -> int:
        """Width of s."""
        return self.gains.get_value().shape[-1]

    def redrawn(self, key: Array) -> "TanhChain":
        """Another chain of the same length."""
        return TanhChain(self.outputs, key=key, rounds=self.rounds, noise=self.noise)

    def __call__(self, x: Float[Array, "*b d"], key: Array | None = None) -> Float[Array, "*b d"]:
        drive, left, right = self.gains.get_value().astype(x.dtype)
        u = drive * of_unit_power(jnp.abs(x))
        edge = jnp.zeros((*x.shape[:-1], 1), x.dtype)

        def passed_on(_: Array, s: Array) -> Array:
            before = jnp.concatenate([edge, s[..., :-1]], axis=-1)
            after = jnp.concatenate([s[..., 1:], edge], axis=-1)
            return jnp.tanh(u + left * before + right * after)

        return noisy(
            jax.lax.fori_loop(0, self.rounds, passed_on, jnp.zeros_like(x)), self.noise, key
        )


class TwoBit(nnx.Module):
    """A system that can be driven by on and off alone: two bits of each value, then a medium.

    A value's place between the least and the largest of its row is rounded down to a quarter, and
    its two bits, the higher first, drive a `Transmission` of twice as many inputs. Bits have no
    slope: the derivative by x is zero wherever there is one.

    The authors' code gives only the least value 00 and both middle quarters 10; here each of the
    four codes stands for a quarter. A row whose values are all equal is 00 throughout.

    Attributes:
      medium: Transmission of 2 in inputs.
    """

    def __init__(self, d_in: int, d_out: int, *, key: Array, noise: float = 0.0):
        """Draws the medium; arguments and errors as those of `Transmission`."""
        self.medium = Transmission(2 * d_in, d_out, key=key, noise=noise)

    @property
    def outputs(self) -> int:
        """Width of y."""
        return self.medium.outputs

    def redrawn(self, key: Array) -> "TwoBit":
        """Another medium behind the same coding."""
        new = jax.tree.map(lambda leaf: leaf, self)
        new.medium = self.medium.redrawn(key)
        return new

    def __call__(
        self, x: Float[Array, "*b in"], key: Array | None = None
    ) -> Float[Array, "*b out"]:
        return self.medium(bits(x), key)


class BlackBox(nnx.Module):
    """A system of one's own: y = fn(params, x, key).

    Attributes:
      params: the function's, each array in a Statistic.
      fn: pure (static); `ffnlab.learning.external` makes one of what runs outside of JAX.
      outputs: width of y (static).

    The native format knows no functions: a network with a box of one's own is saved without it, or
    kept as a checkpoint.
    """

    def __init__(
        self,
        fn: Callable[[PyTree, Array, Array | None], Array],
        outputs: int,
        params: PyTree = (),
    ):
        """Wraps a function.

        Args:
          fn: (params, x [..., in], key or None) -> y [..., outputs].
          outputs: width of y.
          params: its arrays, in any tree.
        Raises:
          ConfigError: outputs below 1.
        """
        at_least(1, outputs=outputs)
        held = lambda leaf: Statistic(jnp.asarray(leaf), axes=(None,) * jnp.ndim(leaf))  # noqa: E731
        self.params = nnx.data(jax.tree.map(held, params))
        self.fn = fn
        self.outputs = outputs

    def __call__(
        self, x: Float[Array, "*b in"], key: Array | None = None
    ) -> Float[Array, "*b out"]:
        is_held = lambda node: isinstance(node, Statistic)  # noqa: E731
        params = jax.tree.map(lambda held: held.get_value(), self.params, is_leaf=is_held)
        return self.fn(params, x, key)


def check_system(noise: float, **sizes: int) -> None:
    """Raises ConfigError for sizes below 1, and noise below 0 or without bound."""
    at_least(1, **sizes)
    check_noise(noise)


def check_noise(noise: float) -> None:
    """Raises ConfigError for noise below 0 or without bound."""
    if not 0 <= noise < math.inf:
        raise ConfigError(f"noise={noise} must not be negative, and be finite")


def root(square: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The square root, with a derivative of zero at zero."""
    is_positive = square > 0
    return jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, square, 1)), 0)


def of_unit_power(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Rows divided by the root of their mean square; zero rows stay zero."""
    return x / (root(jnp.mean(x * x, axis=-1, keepdims=True)) + EPS)


def bits(x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
    """Two bits, 0 or 1, of each value's place between the least and the largest of its row."""
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    place = (x - low) / jnp.where(high > low, high - low, 1)
    quarter = jnp.minimum(jnp.floor(4 * place), 3)
    upper = jnp.floor(quarter / 2)
    pair = jnp.stack([upper, quarter - 2 * upper], axis=-1)
    return pair.reshape(*x.shape[:-1], -1)


def noisy(y: Float[Array, "*b"], noise: float, key: Array | None) -> Float[Array, "*b"]:
    """y with noise of a standard deviation, where there is a key to draw it by."""
    if key is None or not noise:
        return y
    return y + noise * jax.random.normal(key, y.shape, y.dtype)
