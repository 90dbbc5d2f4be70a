"""What a function costs, counted from its jaxpr: multiplications of its matrix products.

Counted are dot products, convolutions, grouped products and those with a sparse matrix, a loop as
often as it runs and of the branches of a condition the dearest. Elementwise work, reductions and
look-ups are not. It is exact where shapes decide the work, and knows nothing of how a compiler
fuses or expands; XLA's own count is no evidence beside it, as that takes a loop's body once and, on
a CPU, a grouped product as one over all groups.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax

from ffnlab.errors import ConfigError
from ffnlab.layers.convolve import by_taps
from pallas_kernels.grouped.api import grouped_multiply, grouped_outer

__all__ = ["multiply_adds"]


def multiply_adds(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Pairs of a multiplication and an addition that a call of a function does.

    Args:
      fn: of pytrees of arrays; it is traced and not run.
      args, kwargs: what it is called with; leaves may be abstract (`jax.ShapeDtypeStruct`).
    Returns:
      the count; floating-point operations are twice that.
    Raises:
      ConfigError: a product in a `while` loop, whose number of turns is not known, or in a kernel
        that is not written in jax.

    >>> import jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    >>> multiply_adds(lambda x: x @ x.T, x)
    48
    """
    return count(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr)


def count(jaxpr: Any) -> int:
    """The pairs of one jaxpr; see `multiply_adds`."""
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name in PRODUCTS:
        return PRODUCTS[name](equation)
    if name == "scan":
        return params["length"] * count(params["jaxpr"].jaxpr)
    if name == "cond":
        return max(count(branch.jaxpr) for branch in params["branches"])
    if params.get("name") == by_taps.__name__:
        return sum(_elementwise(jaxpr) for jaxpr in _inside(params))
    if params.get("name") in (grouped_multiply.__name__, grouped_outer.__name__):
        return _by_group(equation)
    inner = sum(count(jaxpr) for jaxpr in _inside(params))
    if inner and name == "while":
        raise ConfigError(
            "a while loop holds matrix products, and its number of turns is not known; "
            "use lax.scan, or lax.fori_loop between known bounds"
        )
    if name == "pallas_call":
        raise ConfigError("a Pallas kernel's products are not counted; choose backend='xla' for it")
    return inner


def _inside(params: Mapping[str, Any]) -> Iterator[Any]:
    """The jaxprs that an equation runs once each."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(one, "jaxpr", one)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def _elementwise(jaxpr: Any) -> int:
    """Elementwise multiplications: a depthwise convolution's, where it is computed by taps."""
    products = (e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "mul")
    return sum(math.prod(shape) for shape in products)


def _dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return math.prod(left[axis] for axis in contracted) * math.prod(out)


def _convolution(equation: Any) -> int:
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return math.prod(out) * math.prod(kernel) // outputs


def _by_group(equation: Any) -> int:
    """A grouped product by whatever backend: rows times in times out, [m, k] by [..., k, n]."""
    left, right = (v.aval.shape for v in equation.invars[:2])
    if equation.params["name"] == grouped_outer.__name__:
        return left[0] * left[1] * right[1]
    return left[0] * right[1] * right[2]


def _grouped(equation: Any) -> int:
    """Rows times in times out, whatever group a row is of."""
    left, right = (v.aval.shape for v in equation.invars[:2])
    out = equation.outvars[0].aval.shape
    if len(out) == 2:  # [m, k] by [e, k, n]
        return left[0] * left[1] * out[1]
    return left[0] * left[1] * right[1]  # [m, k] by [m, n]: one [k, n] for each group


def _sparse(equation: Any) -> int:
    """Numbers that are stored, [e], times columns of [m, d]."""
    stored, *_, right = (v.aval.shape for v in equation.invars)
    return stored[0] * right[1]


PRODUCTS: Mapping[str, Callable[[Any], int]] = MappingProxyType(
    {
        "bcsr_dot_general": _sparse,
        "conv_general_dilated": _convolution,
        "dot_general": _dot,
        "ragged_dot": _grouped,
        "ragged_dot_general": _grouped,
    }
)
