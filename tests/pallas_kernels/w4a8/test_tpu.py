"""The TPU kernel of the INT4 x FP8 product: interpreted on a CPU and lowered for a TPU."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import w4a8
from pallas_kernels.aot import lower_for
from pallas_kernels.numerics import E4M3, quantize_tokens
from tests.w4a8_operands import error, tokens, weights

WIDE = 1e-6  # relative norm: float32 sums in another order


@pytest.mark.parametrize(
    ("m", "n", "k", "scales"),
    [(1, 128, 256, jnp.float32), (17, 256, 2048, jnp.bfloat16), (130, 128, 128, E4M3)],
)
def test_equals_the_reference(m, n, k, scales):
    codes, _, scales = weights(n, k, encoding="tc", scales=scales)
    call = functools.partial(w4a8.matmul, tokens(m, k), codes, scales, group=128, divisor=2.0)
    y = call(backend="tpu_interpret")
    assert y.shape == (m, n) and error(y, call(backend="reference")) < WIDE


def test_quantized_and_unrounded_activations():
    codes, _, scales = weights(128, 256)
    x8, sx = quantize_tokens(tokens(3, 256))
    call = functools.partial(w4a8.matmul, codes=codes, scales=scales, group=128)
    y = call(x8, x_scale=sx, backend="tpu_interpret")
    assert error(y, call(x8, x_scale=sx, backend="reference")) < WIDE
    wide = functools.partial(call, tokens(3, 256, jnp.bfloat16), act=None, out_dtype=jnp.float32)
    assert error(wide(backend="tpu_interpret"), wide(backend="reference")) < WIDE


@pytest.mark.parametrize("chip", ["v5e", "v6e", "h200"])
def test_calls_lower_to_the_kernel_on_a_tpu(chip):
    codes, _, scales = weights(128, 256)
    arguments = jax.eval_shape(lambda: (tokens(2, 256, jnp.bfloat16), codes, scales))
    text = lower_for(functools.partial(w4a8.matmul, group=128), arguments, chip)
    assert ("tpu_custom_call" in text) == (chip != "h200")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"treatment": "table"}, "scales partial sums, treatment='table'"),
        ({"act": None}, "multiplies in bfloat16, x is float32 and act=None"),
        ({"group": 64, "scales": jnp.ones((4, 128))}, "takes groups of 128"),
    ],
)
def test_the_kernel_says_why_it_cannot_run(change, message):
    codes, fragments, scales = weights(128, 256)
    call = {"codes": codes, "scales": scales, "group": 128, "backend": "tpu_interpret"} | change
    with pytest.raises(ValueError, match=message):
        w4a8.matmul(tokens(1, 256), **call)
    with pytest.raises(ValueError, match="takes canonical codes, these are packed for a GPU"):
        w4a8.matmul(tokens(1, 256), fragments, scales, group=128, backend="tpu_interpret")
