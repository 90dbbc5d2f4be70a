"""Black boxes: pure functions (params, h, key) -> h that learning looks at from outside alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree

from ffnlab.errors import ConfigError, at_least

__all__ = ["Function", "external", "opaque"]

Function = Callable[[PyTree, Array, Array | None], Array]
NO_SEED = 2  # words of a key's data


def opaque(fn: Function) -> Function:
    """The same function, whose differentiation raises: nobody knows its inside.

    Args:
      fn: (params, h, key) -> h.
    Returns:
      a function of the same arguments and results.
    Raises:
      ConfigError: from what is returned, where it is differentiated, by reverse or forward mode;
        the message names the box.

    >>> square = opaque(lambda params, h, key: params * h**2)
    >>> float(square(2.0, jnp.float32(3), None))
    18.0
    """

    @jax.custom_jvp
    def closed(params: PyTree, h: Array, key: Array | None) -> Array:
        return fn(params, h, key)

    @closed.defjvp
    def refuse(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
        raise ConfigError(
            f"black box {name_of(fn, primals[0])!r} was differentiated; learn by a rule that asks "
            "for no slope of it (physical_ff), through a model of it (digital_twin), or put "
            "jax.lax.stop_gradient around what it reads"
        )

    return closed


def name_of(fn: Function, params: PyTree) -> str:
    """What a box is called: its module, else its function."""
    fn = getattr(params, "fn", fn)
    is_system = isinstance(params, nnx.Module) and not callable(getattr(params, "fn", None))
    return type(params).__name__ if is_system else getattr(fn, "__name__", type(fn).__name__)


def external(
    fn: Callable[[PyTree, np.ndarray, np.ndarray], np.ndarray], shape: int | tuple[int, ...]
) -> Function:
    """A black box outside of JAX: hardware, or a simulator of another library.

    It works inside compiled steps, under `jax.vmap` (one call after the other) and in scanned
    loops. What it gives is taken to depend on its arguments alone: a call may be left out where
    nobody uses it, and done again.

    Args:
      fn: (params, h, seed) -> y, all NumPy arrays: h [n, d], y [n, *shape] and seed words that
        `numpy.random.default_rng` takes, zeros where no noise is asked for.
      shape: of what it gives for a row, a width for instance.
    Returns:
      (params, h, key) -> y of the dtype of h; it has no derivative.
    Raises:
      ConfigError: a shape that has no numbers. A call that gives another shape than it says ends
        the computation with an error that names the box and both shapes.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    at_least(1, shape=min(shape, default=1))
    name = getattr(fn, "__name__", type(fn).__name__)

    def asked(params: PyTree, h: Array, seed: Array) -> np.ndarray:
        params, h, seed = jax.tree.map(np.asarray, (params, h, seed))
        y, wanted = np.asarray(fn(params, h, seed)), (*h.shape[:-1], *shape)
        if y.shape != wanted:
            raise ValueError(f"black box {name!r} gives shape {y.shape}, and not {wanted}")
        return y.astype(h.dtype)

    def box(params: PyTree, h: Array, key: Array | None) -> Array:
        out = jax.ShapeDtypeStruct((*h.shape[:-1], *shape), h.dtype)
        seed = jnp.zeros(NO_SEED, jnp.uint32) if key is None else words(key)
        return jax.pure_callback(asked, out, params, h, seed, vmap_method="sequential")

    box.__name__ = name
    return box


def words(key: Array) -> Array:
    """The data of a key, typed or not."""
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(key) if is_typed else key
