"""What is compiled of prefill attention: Llama-3-8B's heads over a prompt of 4096."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import attention
from pallas_kernels.aot.cases import Case

PROMPT, HEADS, KV_HEADS = 4096, 32, 8


def make(precision, d, window):
    """Prefill over INT4 codes ("fp8") or bfloat16 ("float32"), and its abstract arguments."""
    shape, keys = jax.ShapeDtypeStruct, (1, PROMPT, KV_HEADS, d)
    q, codes = shape((1, PROMPT, HEADS, d), jnp.bfloat16), precision == "fp8"
    k = shape(keys, jnp.int8 if codes else jnp.bfloat16)
    scales = shape(keys[:3], jnp.float8_e4m3fn) if codes else None
    options = {"precision": precision, "window": window, "backend": "sm90"}

    def run(q, k, v, k_scale, v_scale):
        return attention.prefill(q, k, v, k_scale=k_scale, v_scale=v_scale, **options)

    return run, (q, k, k, scales, scales)


def case(precision, d, window=None):
    """A case of the Hopper kernel."""
    products = {"fp8": ("QGMMA", "e4m3"), "float32": ("HGMMA", "bfloat16")}
    instruction, operands = products[precision]
    suffix = "" if window is None else f", window of {window}"
    return Case(
        f"attention prefill, {operands}, heads of {d}{suffix}",
        functools.partial(make, precision, d, window),
        ("h200",),
        expect=(instruction,),
        max_spill=0,
    )


CASES = (
    *(case(precision, d) for precision in ("fp8", "float32") for d in (64, 128)),
    case("fp8", 128, 1024),
)
