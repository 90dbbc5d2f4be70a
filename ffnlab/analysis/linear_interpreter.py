"""A function as the affine map that it is where it was looked at
(A Tour of Convolutional Networks Guided by Linear Interpreters, ICCV 2019, arXiv 1908.05168).

All decisions of units are frozen as an input x0 made them: what is left is affine,

    y = F(x0) z + r(x0),   exact at z = x0.

Two inputs go through the function together, x0 as ever and z by what x0 decided; nothing is stored.
Any function of jax can be interpreted (`ffnlab.analysis.walk`), with no table of activations. A
chain of elementwise primitives whose inputs are one array is a scalar function f of its entries:

    secant   f(0) + z (f(x0) - f(0)) / x0     bounded; the tangent where x0 is 0, or so near to
                                              it that the difference is rounding
    tangent  f(x0) + f'(x0) (z - x0)          as jax.linearize has it
    mask     z f(x0) / x0                     without bound near 0 if f(0) is not; not exact at 0

Of two factors that follow the input the one that came through a nonlinearity is frozen: gates,
attention patterns, the deviation in a norm (its mean is linear, and follows). Denominators are. A
maximum takes the entry that x0 took, the first of equals; what is chosen by numbers (top-k, routes,
comparisons) is chosen as x0 did.

What differs from the paper's LinearScope: norms follow the mean of z; biases are part of the map
they belong to, in r.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ffnlab.analysis.pairs import Pairs, Settled, is_real, z_of
from ffnlab.analysis.walk import walk
from ffnlab.errors import ConfigError, NumericalError, is_known

__all__ = ["MODES", "Interpreter", "interpret"]

MODES = ("secant", "tangent", "mask")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Interpreter:
    """An affine map, `interpret`.

    A pytree: jitted functions take it, and `jax.vmap` over x0 gives one of many maps.

    Attributes:
      x0: what decided, [*in].
      consts: arrays that the function closes over.
      jaxpr: of the function (static).
      mode, frozen: see `interpret` (static).
    """

    x0: Any  # not typed as an array: jax puts other leaves in the place of one
    consts: list[Any]
    jaxpr: Any = dataclasses.field(metadata={"static": True})
    mode: str = dataclasses.field(metadata={"static": True})
    frozen: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def __call__(self, z: Float[Array, "*in"]) -> Float[Array, "*out"]:
        """F z + r.

        Raises:
          ConfigError: z has another shape.
        """
        if jnp.shape(z) != jnp.shape(self.x0):
            raise ConfigError(f"z has shape {jnp.shape(z)}, the input {jnp.shape(self.x0)}")
        z = jnp.asarray(z, self.x0.dtype)
        meaning = Pairs(self.mode, self.frozen)
        (out,) = walk(meaning, self.jaxpr, self.consts, [Settled(self.x0, z, False)])
        return z_of(out)

    @property
    def residual(self) -> Float[Array, "*out"]:
        """r: what is given for z = 0. The function of a zero input is another thing."""
        return self(jnp.zeros_like(self.x0))

    def matvec(self, v: Float[Array, "*in"]) -> Float[Array, "*out"]:
        """F v; of a unit vector a column: where that entry of the input goes.

        Raises:
          ConfigError: v has another shape.
        """
        if jnp.shape(v) != jnp.shape(self.x0):
            raise ConfigError(f"v has shape {jnp.shape(v)}, the input {jnp.shape(self.x0)}")
        zero = jnp.zeros_like(self.x0)
        return jax.jvp(self, (zero,), (jnp.asarray(v, zero.dtype),))[1]

    def rmatvec(self, u: Float[Array, "*out"]) -> Float[Array, "*in"]:
        """F' u; of a unit vector a row: what that output looks at."""
        out = jax.eval_shape(self, self.x0)
        if jnp.shape(u) != out.shape:
            raise ConfigError(f"u has shape {jnp.shape(u)}, the output {out.shape}")
        (found,) = jax.linear_transpose(self.matvec, self.x0)(jnp.asarray(u, out.dtype))
        return found


def interpret(
    fn: Callable[[Array], Array],
    x0: Array,
    *,
    mode: str = "secant",
    frozen: Sequence[str] = (),
) -> Interpreter:
    """A function as the affine map that x0's decisions leave of it.

    Args:
      fn: of one array to one array, both floating: a model or a part of one, logits rather than
        probabilities. What it draws by a key it closes over is the same for all z.
      x0: what decides, [*in] floating.
      mode: of elementwise nonlinearities, one of `MODES`.
      frozen: names (`jax.ad_checkpoint.checkpoint_name`) of values in `fn` that stay as x0 has
        them.
    Returns:
      the map; it is exact at x0 in every mode but "mask", there where no nonlinearity is given 0.
    Raises:
      ConfigError: another mode, x0 of integers, more than one array, or a primitive that cannot be
        interpreted, by name and line.
      NumericalError: x0 has NaN or infinity.

    >>> w, b = jnp.array([[1.0, 2.0]]), jnp.array([-1.0])
    >>> at = interpret(lambda x: jnp.maximum(w @ x + b, 0), jnp.ones(2))
    >>> at.residual.tolist(), at.rmatvec(jnp.ones(1)).tolist()
    ([-1.0], [1.0, 2.0])
    """
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r} is not one of {MODES}")
    if not is_real(x0):
        raise ConfigError(
            f"x0 is {jnp.result_type(x0)}; floating inputs are accepted. Of tokens, interpret what "
            "follows their embeddings"
        )
    if is_known(x0) and not np.isfinite(x0).all():
        raise NumericalError("x0 has NaN or infinity")
    x0 = jnp.asarray(x0)
    closed = jax.make_jaxpr(fn)(x0)
    outs = closed.out_avals
    if len(outs) != 1 or not jnp.issubdtype(outs[0].dtype, jnp.floating):
        raise ConfigError(f"fn gives {outs}; one floating array is accepted")
    made = Interpreter(x0, list(closed.consts), closed.jaxpr, mode, tuple(frozen))
    jax.eval_shape(made, x0)  # raises for what cannot be interpreted
    return made
