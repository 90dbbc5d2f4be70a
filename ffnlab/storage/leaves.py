"""The leaves of a tree in files: what stands for each, and what comes back in its place."""

from typing import Any

import jax
import numpy as np

from ffnlab.errors import FormatError
from ffnlab.storage import placing

__all__ = ["abstract", "is_key", "rebuild_leaf", "stored_as"]


def abstract(leaf: Any) -> Any:
    """What orbax is asked for in place of a leaf: NumPy unless `like` fixes a sharding."""
    if fixed_sharding(leaf) is not None and not is_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    shape, dtype = stored_as(leaf)
    # An array of the right shape that takes no memory: all its strides are zero.
    return np.broadcast_to(np.zeros((), dtype), shape)


def fixed_sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """The sharding a leaf of `like` asks for; None where the default device will do."""
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return getattr(leaf, "sharding", None)


def rebuild_leaf(like: Any, entry: dict, value: Any, source: str) -> Any:
    """One restored leaf, of the kind that stands in `like`."""
    if "python" in entry:
        return python_scalar(type(like), entry.get("value"), f"{source}: {entry['path']}")
    shape, dtype = stored_as(like)
    value = np.zeros(shape, dtype) if value is None else value
    if isinstance(like, np.ndarray):
        return np.asarray(value)
    if isinstance(like, np.generic):
        return np.asarray(value)[()]
    value = jax.numpy.asarray(value)
    if is_key(like):
        value = jax.random.wrap_key_data(value, impl=key_impl(like.dtype))
    sharding = fixed_sharding(like)
    return value if sharding is None else placing.put(value, sharding)


def stored_as(leaf: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of the array that stands for a leaf in a file; a key's are its data's."""
    if is_key(leaf):
        key = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        leaf = jax.eval_shape(jax.random.key_data, key)
    return tuple(leaf.shape), np.dtype(leaf.dtype)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed random key, concrete or abstract."""
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_impl(dtype: Any) -> str:
    """The generator's name for a key dtype, which abstract keys do not tell."""
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.eval_shape(lambda name=name: jax.random.key(0, impl=name)).dtype == dtype:
            return name
    raise FormatError(f"random keys of dtype {dtype} are not of a generator that jax ships")


def python_scalar(kind: type, value: object, source: str) -> Any:
    """A Python scalar from its sidecar entry: floats and complex numbers are stored as repr."""
    try:
        if kind in (bool, int, str):
            if type(value) is not kind:
                raise ValueError(f"{value!r} is not of type {kind.__name__}")
            return value
        return kind(str(value))
    except ValueError as error:
        raise FormatError(f"{source}: {error}") from None
