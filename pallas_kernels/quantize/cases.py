"""What is compiled of the roundings."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import quantize
from pallas_kernels.aot.cases import Case, named
from pallas_kernels.numerics import E4M3
from pallas_kernels.quantize.api import GROUPS, TOKENS


def make(function, shape, given, options):
    """A public function and its abstract argument."""
    call = functools.partial(function, backend="mosaic", **dict(options))
    return call, (jax.ShapeDtypeStruct(shape, given),)


def case(name, function, shape, given, expect, **options):
    """A case on every chip that converts to e4m3."""
    build = functools.partial(make, function, shape, given, tuple(options.items()))
    backends = named(TOKENS if function is quantize.tokens else GROUPS, "mosaic")
    chips = ("h200", "l4")
    return Case(f"quantize {name}", build, chips, expect, max_spill=0, backends=backends)


CASES = (
    case("tokens, whole tiles", quantize.tokens, (1, 4096), jnp.bfloat16, ("E4M3",), rows=8),
    case("tokens, k = 4096", quantize.tokens, (64, 4096), jnp.bfloat16, ("LDG.E.128", "E4M3")),
    case("tokens, k = 14336", quantize.tokens, (64, 14336), jnp.bfloat16, ("LDG.E.128", "E4M3")),
    case("tokens, k = 11008", quantize.tokens, (64, 11008), jnp.bfloat16, ("E4M3",)),
    case("groups, float32 scales", quantize.groups, (4096, 14336), jnp.bfloat16, ("LDG.E.64",)),
    case(
        "groups, e4m3 scales",
        quantize.groups,
        (4096, 14336),
        jnp.float32,
        ("LDG.E.128", "E4M3"),
        dtype=E4M3,
    ),
)
