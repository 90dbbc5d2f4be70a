"""INT8 products: in chunks of rows on a CPU, as a whole elsewhere and where groups do not fit."""

import jax
import numpy as np
import pytest

from ffnlab.weights import Int8, int8


@pytest.mark.parametrize("group", [1, 2, 64, 128, 256, 48])
@pytest.mark.parametrize("shape", [(256,), (1, 1, 256), (2, 3, 256), (0, 256), (300, 256)])
def test_equals_the_dense_product(group, shape, key):
    weight = Int8.quantize(jax.random.normal(key, (256, 5)), group=group)
    x = jax.random.normal(key, shape)
    ours, expected = jax.jit(lambda x, w: (w.matmul(x), x @ w.dense()))(x, weight)
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)  # sums in another order


def test_gradients_and_vmap(key):
    weight = Int8.quantize(jax.random.normal(key, (256, 5)), group=64)
    x = jax.random.normal(key, (3, 256))

    @jax.jit
    def both(x):
        slope = lambda product: jax.grad(lambda x: (product(x) ** 2).sum())(x)  # noqa: E731
        ours = slope(weight.matmul), jax.vmap(weight.matmul)(x)
        return ours, (slope(lambda x: x @ weight.dense()), x @ weight.dense())

    for a, b in zip(*both(x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_the_whole_matrix_is_never_written(key):
    weight = Int8.quantize(jax.random.normal(key, (4 * int8.CPU_ROWS, 8)), group=64)
    x = jax.ShapeDtypeStruct((1, weight.shape[0]), "float32")
    jaxpr = str(jax.make_jaxpr(weight.matmul)(x))
    assert f"f32[{int8.CPU_ROWS},8]" in jaxpr and f"f32[{weight.shape[0]},8]" not in jaxpr
