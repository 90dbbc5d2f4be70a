"""Random features: a layer f(x w + b) as a product of what is made of x and what is made of (w, b).

    f(w . x + b) = E[ Phi(x) . Psi(w, b) ]

over the draw of projections that both share. Phi has no parameters; Psi(w, b) is a matrix that
training may start from (Scalable Neural Network Kernels, arXiv 2310.13225). Draws are `Statistic`s:
they belong to the function, are saved with it and never trained.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Complex, Float, Key

from ffnlab.errors import ConfigError, at_least
from ffnlab.layers.stacking import Statistic

__all__ = [
    "SPECTRA",
    "Features",
    "FourierFeatures",
    "ReluFeatures",
    "arc_cosine",
    "exponential_features",
    "projections",
    "relu_features",
    "scaled_to",
]

TINY = 1e-12  # of a vector's squared length, below which it stays as it is


def projections(
    key: Key[Array, ""], count: int, width: int, *, orthogonal: bool = True
) -> Float[Array, "m d"]:
    """Vectors of N(0, I), by themselves or orthogonal to each other.

    Orthogonal ones come in blocks of `width`: directions of a rotation drawn evenly (Haar), lengths
    of independent Gaussian vectors.

    Args:
      key: of the draw.
      count: m, >= 1.
      width: d, >= 1.
      orthogonal: whether blocks are.
    Raises:
      ConfigError: a count or width below 1.
    """
    at_least(1, count=count, width=width)
    if not orthogonal:
        return jax.random.normal(key, (count, width))
    turn, length = jax.random.split(key)
    blocks = -(-count // width)
    q, r = jnp.linalg.qr(jax.random.normal(turn, (blocks, width, width)))
    # Without the signs the rotations are not even, and what is averaged over them is biased.
    q = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None, :]
    lengths = jnp.linalg.norm(jax.random.normal(length, (blocks, width, width)), axis=-1)
    return (q * lengths[..., None]).reshape(-1, width)[:count]


def scaled_to(x: Float[Array, "*b d"], length: float | None) -> Float[Array, "*b d"]:
    """Vectors of one length, zeros as they are; as they are where it is None."""
    if length is None:
        return x
    square = jnp.sum(x.astype(jnp.float32) ** 2, -1, keepdims=True)
    return x * (length * jax.lax.rsqrt(jnp.maximum(square, TINY))).astype(x.dtype)


def relu_features(
    x: Float[Array, "*b d"], g: Float[Array, "m d"], *, floor: float = 0.0
) -> Float[Array, "*b m"]:
    """max(x g^T, floor) / sqrt(m), of inputs and of weights alike.

    With floor 0 their product is the arc-cosine kernel on average (`arc_cosine`), and not
    relu(w . x).
    """
    return jnp.maximum(x @ g.T.astype(x.dtype), floor) / math.sqrt(len(g))


def arc_cosine(x: Float[Array, "*#b d"], w: Float[Array, "*#b d"]) -> Float[Array, "*b"]:
    """E[relu(g x) relu(g w)], g ~ N(0, I): |x| |w| (sin t + (pi - t) cos t) / (2 pi), t the angle.

    Source:
      Cho and Saul, Kernel Methods for Deep Learning (2009), order 1, halved.
    """
    lengths = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(w, axis=-1)
    cosine = jnp.clip((x * w).sum(-1) / jnp.where(lengths > 0, lengths, 1.0), -1.0, 1.0)
    angle = jnp.arccos(cosine)
    return lengths * (jnp.sin(angle) + (math.pi - angle) * cosine) / (2 * math.pi)


def exponential_features(
    x: Float[Array, "*b d"],
    g: Float[Array, "m d"],
    a: Complex[Array, "m"],
    *,
    damping: float = 0.0,
) -> Complex[Array, "*b m"]:
    """Features whose products average to exp(a h x . w), of x by a and of w by h.

        m^-1/2 (1 + 4 M)^(d/4) exp(sqrt(1 + 4 M) a g . x - a^2 |x|^2 / 2 - M |g|^2)

    Args:
      x: inputs, or weights.
      g: projections.
      a: a number for each.
      damping: M >= 0; changes the variance, not the mean.
    """
    m, d = g.shape
    wide = math.sqrt(1 + 4 * damping)
    square = jnp.sum(x * x, -1)[..., None]
    exponent = wide * a * (x @ g.T) - a**2 * square / 2 - damping * jnp.sum(g * g, -1)
    return wide ** (d / 2) / math.sqrt(m) * jnp.exp(exponent)


class Spectrum(NamedTuple):
    """A real function by its Fourier transform, f(z) = Re E[weight exp(i frequency z)].

    Attributes:
      draw: (key, count) -> frequencies, radians.
      weight: of all of them.
    """

    draw: Callable[[Array, int], Float[Array, "m"]]
    weight: complex


SPECTRA: Mapping[str, Spectrum] = MappingProxyType(
    {
        "cos": Spectrum(lambda key, m: jnp.ones(m), 1.0),
        "sin": Spectrum(lambda key, m: jnp.ones(m), -1j),
        "gaussian": Spectrum(lambda key, m: jax.random.normal(key, (m,)), 1.0),  # exp(-z^2 / 2)
    }
)


class ReluFeatures(nnx.Module):
    """phi(x) = max(g x, floor) / sqrt(m), of x scaled to a length where one is given.

    Attributes:
      g: Statistic [m, width] float32, the projections.
      floor: below which no product goes (static).
      length: of the scaled inputs, or None (static).
    """

    def __init__(self, g: Float[Array, "m d"], *, floor: float = 0.0, length: float | None = None):
        """Features of ready projections.

        Raises:
          ConfigError: a length that is not above 0, or a floor that is no number.
        """
        check_length(length)
        if not floor < math.inf:
            raise ConfigError(f"floor={floor} must be a number below infinity")
        self.g = Statistic(g.astype(jnp.float32), axes=("features", "embed"))
        self.floor, self.length = float(floor), length

    @property
    def count(self) -> int:
        """Features of an input (m)."""
        return self.g.shape[-2]

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        return relu_features(scaled_to(x, self.length), self.g.get_value(), floor=self.floor)

    def flops_per_token(self, share: None) -> float:
        """Operations of a row, of its products with the projections."""
        return 2.0 * self.g.size

    def weights(
        self, w: Float[Array, "d n"], b: Float[Array, "n"] | None = None
    ) -> Float[Array, "m n"]:
        """Psi, the same features of every unit's weights; a bias is no part of this kernel."""
        return self(w.T.astype(jnp.float32)).T


class FourierFeatures(nnx.Module):
    """Features whose products with `weights(w, b)` average to f(w . x + b).

    Real and imaginary parts are features of their own, so all is real. Inputs are scaled to a
    length where one is given: the variance grows with exp(|x|^2 + |w|^2).

    Attributes:
      g: Statistic [m, width] float32, the projections.
      frequencies: Statistic [m] float32, radians.
      function: name of f, a key of `SPECTRA` (static).
      length: of the scaled inputs, or None (static).
      damping: see `exponential_features` (static).
    """

    def __init__(
        self,
        g: Float[Array, "m d"],
        frequencies: Float[Array, "f"],
        *,
        function: str = "cos",
        length: float | None = None,
        damping: float = 0.0,
    ):
        """Features of ready projections and frequencies.

        Raises:
          ConfigError: another function, a length that is not above 0, a negative damping, or other
            numbers of projections and frequencies.
        """
        check_length(length)
        if function not in SPECTRA:
            raise ConfigError(f"function={function!r} is not one of {list(SPECTRA)}")
        if not 0 <= damping < math.inf:
            raise ConfigError(f"damping={damping} must be at least 0 and finite")
        if frequencies.shape != g.shape[:1]:
            raise ConfigError(f"{frequencies.shape} frequencies of {g.shape[0]} projections")
        self.g = Statistic(g.astype(jnp.float32), axes=("features", "embed"))
        self.frequencies = Statistic(frequencies.astype(jnp.float32), axes=("features",))
        self.function, self.length, self.damping = function, length, damping

    @property
    def count(self) -> int:
        """Features of an input, two for each projection."""
        return 2 * self.g.shape[-2]

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b m2"]:
        given = scaled_to(x.astype(jnp.float32), self.length)
        phi = self.tower(given)
        return jnp.concatenate([phi.real, phi.imag], -1).astype(x.dtype)

    def flops_per_token(self, share: None) -> float:
        """Operations of a row, of its products with the projections."""
        return 2.0 * self.g.size

    def weights(
        self, w: Float[Array, "d n"], b: Float[Array, "n"] | None = None
    ) -> Float[Array, "m2 n"]:
        """Psi(w, b) of every unit, float32."""
        bias = jnp.zeros(w.shape[1]) if b is None else b.astype(jnp.float32)
        turn = jnp.exp(1j * self.frequencies.get_value() * bias[:, None])
        psi = SPECTRA[self.function].weight * turn * self.tower(w.T.astype(jnp.float32))
        return jnp.concatenate([psi.real, -psi.imag], -1).T

    def tower(self, x: Float[Array, "*b d"]) -> Complex[Array, "*b m"]:
        """Complex features of inputs or weights; both take half of i times the frequency.

        So the variance stays finite where frequencies are drawn from a Gaussian, which it does not
        where inputs take all of it.
        """
        a = jnp.sqrt(1j * self.frequencies.get_value())
        return exponential_features(x, self.g.get_value(), a, damping=self.damping)


Features = ReluFeatures | FourierFeatures


def check_length(length: float | None) -> None:
    """Raises ConfigError unless a length is above 0 and finite, or None."""
    if length is not None and not 0 < length < math.inf:
        raise ConfigError(f"length={length} must be above 0 and finite, or left out")
