"""Every difference between the supported versions of jax and flax, in one place.

The two stacks that the tests cover: Python 3.11 with jax 0.10 and flax 0.12.8, Python 3.12 with
jax 0.12 and flax 0.12.12. Code elsewhere does not look at version numbers.
"""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

__all__ = ["make_mesh"]


def make_mesh(
    shape: Sequence[int], names: Sequence[str], *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Builds a mesh whose axes are sharded automatically by the compiler.

    `jax.make_mesh` gives explicit axes by default, under which a contraction over a sharded axis
    raises unless each call names its output sharding.

    Args:
      shape: devices along each axis; the product is at most the number of devices.
      names: one name per axis.
      devices: what to build from; default: all devices of the default backend.
    Returns:
      the mesh.
    Raises:
      ValueError: lengths differ, or there are too few devices.

    >>> make_mesh((1, 1), ("data", "model")).axis_names
    ('data', 'model')
    """
    if len(shape) != len(names):
        raise ValueError(f"shape={tuple(shape)} and names={tuple(names)} must have equal lengths")
    axis_types = (AxisType.Auto,) * len(names)
    return jax.make_mesh(tuple(shape), tuple(names), axis_types=axis_types, devices=devices)
