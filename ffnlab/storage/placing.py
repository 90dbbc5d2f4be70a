"""Arrays onto devices and back, also those of other processes.

`jax.device_put` takes only shardings whose devices are all of this process. Here every process
holds the whole value and gives its own devices their parts, typed random keys included; nothing is
sent between processes.
"""

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import PyTree

__all__ = ["gather", "put"]


def put(value: jax.Array | np.ndarray, sharding: Sharding) -> jax.Array:
    """An array placed by a sharding.

    Args:
      value: the whole array; the same in every process that the sharding names.
      sharding: of devices of any process.
    Returns:
      the placed array, of the shape and dtype of `value`.
    """
    if isinstance(value, jax.Array) and value.sharding == sharding:
        return value
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    if jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = put(np.asarray(jax.random.key_data(value)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def gather(tree: PyTree) -> PyTree:
    """A tree with its arrays whole in process 0; a tree of one process as it is.

    Every process calls it. Arrays are gathered one after the other; elsewhere than in process 0
    only their shapes are left.

    Args:
      tree: of arrays, each either of this process or placed over all of them.
    Returns:
      the tree: NumPy arrays in process 0, `jax.ShapeDtypeStruct` in the others.
    """
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    def of_leaf(leaf: jax.Array) -> np.ndarray | jax.ShapeDtypeStruct:
        whole = multihost_utils.process_allgather(leaf, tiled=True)
        first = jax.process_index() == 0
        return whole if first else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    return jax.tree.map(of_leaf, tree)
