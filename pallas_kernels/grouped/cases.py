"""What is compiled of the grouped products: 4096 tokens over 8 experts of 4096 x 2048."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.aot.cases import Case, named
from pallas_kernels.backend import lazy
from pallas_kernels.grouped.api import MULTIPLY, OUTER
from pallas_kernels.numerics import E4M3

KERNEL = "pallas_kernels.grouped.sm90"
TOKENS, EXPERTS, WIDTH, HIDDEN = 4096, 8, 4096, 2048
array = jax.ShapeDtypeStruct


def multiply(dtype, transposed):
    """The product and its abstract arguments."""
    call = functools.partial(
        lazy(KERNEL, "multiply"), transposed=transposed, out_dtype=jnp.bfloat16
    )
    shape = (EXPERTS, HIDDEN, WIDTH) if transposed else (EXPERTS, WIDTH, HIDDEN)
    sizes = array((EXPERTS,), jnp.int32)
    return call, (
        array((TOKENS, WIDTH), dtype),
        array(shape, dtype),
        array((TOKENS,), jnp.float32),
        sizes,
    )


def outer():
    """The gradient of the matrices and its abstract arguments."""
    x, dy = array((TOKENS, WIDTH), jnp.bfloat16), array((TOKENS, HIDDEN), jnp.bfloat16)
    return lazy(KERNEL, "outer"), (x, dy, array((EXPERTS,), jnp.int32))


def case(name, make, expect, table=MULTIPLY):
    """A case for Hopper, of a kernel in a table of backends."""
    return Case(f"grouped {name}", make, ("h200",), (expect,), backends=named(table, "sm90"))


CASES = (
    case("product, bfloat16", functools.partial(multiply, jnp.bfloat16, False), "HGMMA"),
    case("product, bfloat16 transposed", functools.partial(multiply, jnp.bfloat16, True), "HGMMA"),
    case("product, FP8", functools.partial(multiply, E4M3, True), "QGMMA"),
    case("gradient of the matrices, bfloat16", outer, "HGMMA", OUTER),
)
