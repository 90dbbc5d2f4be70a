"""What is compiled of the sparse products: the FFN of Llama-3-8B, 14336 channels of 4096."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import sparse
from pallas_kernels.aot.cases import Case, named
from pallas_kernels.aot.report import REGISTERS
from pallas_kernels.sparse import blocks
from pallas_kernels.sparse.api import BACKENDS

HIDDEN, WIDTH = 14336, 4096
GPUS = {
    "bfloat16": ("h200", "a100", "l4"),
    "float16": ("t4",),
    "int4": ("h200", "a100", "l4", "t4"),
}


def weight(kind):
    """Abstract [HIDDEN, WIDTH] weight of a dtype, or "int4"."""
    dense = jax.ShapeDtypeStruct((HIDDEN, WIDTH), jnp.float32 if kind == "int4" else kind)
    return jax.eval_shape(sparse.pack, dense) if kind == "int4" else dense


def make(name, kind, m, backend):
    """The product `name` of m rows by a backend, and its abstract arguments."""
    shape, dtype = jax.ShapeDtypeStruct, jnp.float16 if kind == "float16" else jnp.bfloat16
    inner, outer, w = shape((m, HIDDEN), dtype), shape((m, WIDTH), dtype), weight(kind)
    arguments = {
        "matvec": (inner, w),
        "take": (inner, w, shape((HIDDEN // 2,), jnp.int32), shape((), jnp.int32)),
        "rows": (outer, w, inner),
        "glu": (inner, w, w, outer),
    }[name]
    return functools.partial(getattr(sparse, name), backend=backend), arguments


def mosaic(name, kind, m):
    """A case of the Mosaic kernels; 128-bit loads of the weights, no spills, and registers for as
    many blocks per multiprocessor as the plan counts on."""
    threads = blocks.THREADS * blocks.resident(name, m, weight(kind))
    return Case(
        f"sparse {name}, {kind}, {m} {'row' if m == 1 else 'rows'}",
        functools.partial(make, name, kind, m, "mosaic"),
        GPUS[kind],
        expect=("LDG.E.128",),
        max_spill=0,
        backends=named(BACKENDS[name], "mosaic"),
        registers=min(255, REGISTERS // threads // 8 * 8),
    )


def triton(name, kind):
    """A case of the Triton kernels."""
    return Case(
        f"sparse {name} by Triton, {kind}, 1 row",
        functools.partial(make, name, kind, 1, "triton"),
        tuple(chip for chip in GPUS[kind] if chip != "h200"),
        expect=("LDG.E",),
        max_spill=0,
        backends=named(BACKENDS[name], "triton"),
    )


def tpu(name, kind, m):
    """A case of the TPU kernels."""
    return Case(
        f"sparse {name} on a TPU, {kind}, {m} {'row' if m == 1 else 'rows'}",
        functools.partial(make, name, kind, m, "tpu"),
        ("v5e", "v6e"),
        expect=("tpu_custom_call",),
        backends=named(BACKENDS[name], "tpu"),
    )


PRODUCTS = (("matvec", 1), ("matvec", 4), ("take", 1), ("rows", 4), ("glu", 1))
CASES = tuple(mosaic(name, kind, m) for kind in GPUS for name, m in PRODUCTS) + tuple(
    triton(name, kind) for kind in GPUS for name in ("matvec", "rows")
)
CASES += tuple(tpu(name, kind, m) for kind in ("bfloat16", "int4") for name, m in PRODUCTS)
