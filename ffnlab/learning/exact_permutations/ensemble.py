"""Ensembles of wide networks that learn a permutation from its k basis vectors (arXiv 2502.16763).

A network is an `MLP` of sizes (k, n, k) without biases, drawn from N(0, 1 / inputs). Gradient
descent on it in the NTK parametrization, whose weights have variance 1 and are divided by
sqrt(inputs) in the forward pass, is descent on the network as it is with each matrix's gradient
divided by its inputs: `by_inputs`. Without it the parametrization is the standard one, that of the
authors' code, whose last layer moves n / k times as fast as the first.

The authors train by a fixed small rate; here it is the inverse of the largest eigenvalue of the
kernel, with which what is slowest falls by a share of the order of 1 / k a step.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ffnlab.data import Labelled
from ffnlab.errors import ConfigError, NumericalError, at_least
from ffnlab.layers import MLP
from ffnlab.learning.backprop import backprop
from ffnlab.learning.exact_permutations.closed_form import Kernel, last_layer, ntk
from ffnlab.learning.members import members
from ffnlab.rule import Rule

__all__ = [
    "PARAMETRIZATIONS",
    "averaged",
    "basis",
    "binary_inputs",
    "by_inputs",
    "decided",
    "exact_permutations",
    "kernel_of",
    "networks",
    "ntk_sgd",
    "one_hot_squares",
    "permuted_bits",
]

PARAMETRIZATIONS = ("ntk", "standard")
Permutation = Sequence[int] | np.ndarray


def basis(permutation: Permutation) -> Labelled:
    """The k basis vectors, and to which output each is sent.

    Args:
      permutation: of 0 .. k - 1; input i is output permutation[i].
    Returns:
      x [k, k] float32, y [k] int32; a batch of all that is learned from.
    Raises:
      ConfigError: it is no permutation.
    """
    to = destinations(permutation)
    return Labelled(np.eye(len(to), dtype=np.float32), to)


def destinations(permutation: Permutation) -> Int[np.ndarray, "k"]:
    """A permutation as int32; ConfigError where it is none."""
    to = np.asarray(permutation)
    is_whole = to.ndim == 1 and len(to) > 0 and np.issubdtype(to.dtype, np.integer)
    if not is_whole or sorted(to.tolist()) != list(range(len(to))):
        raise ConfigError(
            f"permutation={to.tolist()} is none; each of 0 to {max(to.size - 1, 0)} is needed once"
        )
    return to.astype(np.int32)


def binary_inputs(bits: np.ndarray) -> Float[np.ndarray, "n k"]:
    """Binary rows divided by their norm, as networks are given them.

    Args:
      bits: [n, k] of 0 and 1.
    Raises:
      ConfigError: other values, or a row of zeros, which has no direction.
    """
    ones = checked_bits(bits).sum(1, keepdims=True)
    if not (ones > 0).all():
        raise ConfigError(f"bits: row {int(np.argmin(ones))} is zero, which has no direction")
    return (bits / np.sqrt(ones)).astype(np.float32)


def permuted_bits(bits: np.ndarray, permutation: Permutation) -> Bool[np.ndarray, "n k"]:
    """P applied to binary rows: output permutation[i] is bit i.

    Args:
      bits: [n, k] of 0 and 1.
      permutation: of 0 .. k - 1.
    Raises:
      ConfigError: other values, rows of another length, or it is no permutation.
    """
    bits, to = checked_bits(bits), destinations(permutation)
    if bits.shape[1] != len(to):
        raise ConfigError(f"bits of shape {bits.shape}: permutation is of {len(to)}")
    moved = np.empty(bits.shape, bool)
    moved[:, to] = bits
    return moved


def checked_bits(bits: np.ndarray) -> np.ndarray:
    """Binary rows, [n, k]; ConfigError where they are none."""
    bits = np.asarray(bits)
    if bits.ndim != 2 or bits.dtype.kind not in "biuf" or not np.isin(bits, (0, 1)).all():
        raise ConfigError(f"bits of shape {bits.shape}: rows of 0 and 1 are accepted, [n, k]")
    return bits


def kernel_of(parametrization: str, k: int, width: int) -> Kernel:
    """The kernel of a network's training, times k, in the limit of its width.

    Args:
      parametrization: "ntk" or "standard".
      k: inputs and outputs.
      width: hidden units, by which the last layer outweighs the first where it is "standard".
    Raises:
      ConfigError: another parametrization, or sizes below 1.
    """
    if parametrization not in PARAMETRIZATIONS:
        raise ConfigError(f"parametrization={parametrization!r} is not one of {PARAMETRIZATIONS}")
    at_least(1, k=k, width=width)
    if parametrization == "ntk":
        return ntk
    # k0(u) u of the first layer is ntk less the last layer.
    return lambda u: width * last_layer(u) + k * (ntk(u) - last_layer(u))


def networks(k: int, width: int, count: int, key: Array) -> MLP:
    """So many networks, each leaf [count, …], drawn from N(0, 1 / inputs) without biases."""
    at_least(1, k=k, width=width, count=count)
    init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    make = lambda key: MLP((k, width, k), key=key, bias=False, init=init)  # noqa: E731
    return jax.vmap(make)(jax.random.split(key, count))


def one_hot_squares(
    model: Callable, batch: tuple[Array, Array]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Half the squared distance of outputs from the one-hot class, a mean over rows.

    Args:
      model: inputs [n, d] -> outputs [n, c].
      batch: inputs and their classes.
    Returns:
      (the mean, {"furthest": the largest deviation of an output}).
    """
    x, y = batch
    outputs = model(x)
    off = outputs - jax.nn.one_hot(y, outputs.shape[-1], dtype=outputs.dtype)
    return 0.5 * jnp.mean(jnp.sum(off**2, -1)), {"furthest": jnp.abs(off).max()}


def by_inputs() -> optax.GradientTransformation:
    """Divides the gradient of a matrix [in, out] by its inputs, and leaves vectors alone.

    With a rate after it, plain descent is that of the NTK parametrization.
    """

    def scaled(g: Array) -> Array:
        return g / g.shape[-2] if g.ndim > 1 else g

    return optax.stateless(lambda updates, params: jax.tree.map(scaled, updates))


def ntk_sgd(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Descent in the NTK parametrization, as `[optimizer]` of a training file names it.

    Args:
      rate: of a mean over k basis vectors, k^2 / (K(1) + (k - 1) K(0)) is fastest
        (`exact_permutations`).
    """
    return optax.chain(by_inputs(), optax.sgd(rate))


def exact_permutations(
    k: int,
    width: int,
    count: int,
    *,
    parametrization: str = "ntk",
    chunk: int | None = 50,
) -> Rule:
    """The rule that trains an ensemble on `basis` by gradient descent on squares.

    Its model is `networks(k, width, count, key)`, its batch always all of `basis`.

    Args:
      k: inputs and outputs.
      width: hidden units.
      count: networks.
      parametrization: "ntk", or "standard" as in the authors' code.
      chunk: networks that learn at once, which bounds memory; all when None.
    Returns:
      a Rule of members (`ffnlab.learning.members`): `predict` gives [count, n, k].
    Raises:
      ConfigError: sizes below 1, or another parametrization.
      ValueError: from `check`, a batch that is not the basis and a permutation.
    """
    kernel = kernel_of(parametrization, k, width)
    # Of a mean over k rows, whose kernel is that of the limit / k: descent is slower by k^2.
    rate = k * k / (kernel(1.0) + (k - 1) * kernel(0.0))
    optimizer = ntk_sgd(rate) if parametrization == "ntk" else optax.sgd(rate)
    rule = members(lambda: backprop(one_hot_squares, optimizer), count, chunk=chunk)

    def check(state: PyTree, batch: PyTree) -> None:
        if not isinstance(batch, tuple) or len(batch) != 2:
            raise ValueError(f"batch is a {type(batch).__name__}; inputs and classes (`basis`)")
        x, y = batch
        if np.shape(x) != (k, k) or not np.array_equal(np.asarray(x), np.eye(k)):
            raise ValueError(
                f"batch has inputs of shape {np.shape(x)}; the {k} basis vectors are needed"
            )
        basis(np.asarray(y))

    return Rule(
        f"{count} x exact-permutations", rule.init, rule.step, rule.predict, rule.model, check
    )


def averaged(outputs: Float[Array | np.ndarray, "count n k"]) -> Float[np.ndarray, "count n k"]:
    """Averages of the first network, of the first two, …, of all: rows of a curve by size."""
    outputs = np.asarray(outputs, np.float64)
    return np.cumsum(outputs, 0) / np.arange(1, len(outputs) + 1)[:, None, None]


def decided(
    outputs: Float[Array | np.ndarray, "*b n k"], threshold: float
) -> Bool[np.ndarray, "*b n k"]:
    """Bits of averages: those above a threshold (`closed_form.safe_threshold`).

    Raises:
      ConfigError: a threshold that is not positive: 0 is where outputs of training inputs lie.
      NumericalError: outputs that are no finite numbers.
    """
    if not 0 < threshold < math.inf:
        raise ConfigError(
            f"threshold={threshold} must be positive: the outputs of a training input that are to "
            "be 0 are 0 up to rounding; closed_form.safe_threshold(k) parts all"
        )
    if not np.isfinite(outputs).all():
        raise NumericalError("outputs are no finite numbers; descent went astray, or too far")
    return np.asarray(outputs) > threshold
