"""Every difference between the supported versions of jax and flax, in one place.

The two stacks that the tests cover: Python 3.11 with jax 0.10 and flax 0.12.8, Python 3.12 with
jax 0.12 and flax 0.12.12. Code elsewhere does not look at version numbers.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.core
from flax import nnx
from flax.nnx import pytreelib
from jax.sharding import AxisType, Mesh

__all__ = ["bare_module", "eagerly", "make_mesh", "scan_groups"]


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


def eagerly() -> AbstractContextManager[None]:
    """A context in which what is known is computed, even where a function is being traced.

    `jax.ensure_compile_time_eval` also folds constants of what is lowered inside it, draws of
    random numbers among them, which compiles one program while another is made.

    >>> with eagerly():
    ...     isinstance(jax.random.normal(jax.random.key(0)), jax.core.Tracer)
    False
    """
    return jax.core.eval_context()


def bare_module(
    kind: type[nnx.Module], children: Mapping[str, object], static: Mapping[str, object]
) -> nnx.Module:
    """A module with given attributes, whose `__init__` has not run.

    It is what calling the class makes around `__init__` (`flax.nnx.pytreelib`), with each attribute
    marked as it is told instead of guessed.

    Args:
      kind: the class.
      children: attributes that are parts of the tree: modules, variables, None.
      static: attributes that belong to its structure.

    >>> module = bare_module(nnx.List, {"0": nnx.Param(1.0)}, {"_length": 1})
    >>> len(module), jax.tree.leaves(module)
    (1, [1.0])
    """
    module = object.__new__(kind)
    marks = dict.fromkeys(children, True) | dict.fromkeys((*static, "_pytree__nodes"), False)
    object.__setattr__(module, "_pytree__state", pytreelib.PytreeState())
    object.__setattr__(module, "_pytree__nodes", kind._pytree__nodes.update(marks))
    for name, value in (*children.items(), *static.items()):
        object.__setattr__(module, name, value)
    return module


def scan_groups(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many of a scan equation's inputs are constants, and how many are carried.

    Args:
      params: of an equation of the primitive `scan` in a jaxpr.

    >>> import jax.numpy as jnp
    >>> f = lambda w, x: jax.lax.scan(lambda c, _: (w * c, None), x, None, length=3)[0]
    >>> scan_groups(jax.make_jaxpr(f)(2.0, jnp.ones(2)).eqns[0].params)
    (1, 1)
    """
    if "num_carry" in params:  # jax 0.10
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)
