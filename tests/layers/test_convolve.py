"""The forms of a grouped convolution against XLA's, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.layers import Conv
from ffnlab.layers.convolve import FEW_GROUPS, FEW_TAPS, by_group, by_taps, by_xla, convolve
from ffnlab.models.cost import multiply_adds
from tests.contracts import input_of

# Float32 sums of up to 45 products of about one, in another order.
ATOL = 2e-5
# (grid, size, stride, pads, dilation)
SHAPES = {
    "1d": ((11,), (4,), (1,), ((1, 2),), (1,)),
    "1d-stride": ((12,), (3,), (2,), ((0, 0),), (3,)),
    "1d-causal": ((9,), (5,), (1,), ((8, 0),), (2,)),
    "2d": ((6, 7), (3, 2), (1, 2), ((1, 1), (0, 1)), (1, 2)),
    "3d": ((4, 5, 3), (2, 3, 1), (2, 1, 2), ((1, 0), (1, 1), (0, 0)), (1, 1, 1)),
}


def operands(grid, size, channels, ins, out):
    x = input_of((2, *grid, channels))
    return x, jax.random.normal(jax.random.key(2), (*size, ins, out))


def both(form, x, kernel, *rest):
    """Values and gradients of a form."""

    def loss(x, kernel):
        y = form(x, kernel, *rest)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, kernel)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("form", "groups", "channels", "out"),
    [(by_taps, 3, 3, 6), (by_group, 3, 6, 9)],
)
def test_a_form_is_xla_s(name, form, groups, channels, out):
    grid, size, *rest = SHAPES[name]
    x, kernel = operands(grid, size, channels, channels // groups, out)
    (_, y), gradients = both(form, x, kernel, *rest, groups)
    (_, same), wanted = both(by_xla, x, kernel, *rest, groups)
    np.testing.assert_allclose(y, same, atol=ATOL)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=5 * ATOL), gradients, wanted)


def test_products_by_taps_are_summed_in_float32():
    x, kernel = (v.astype(jnp.bfloat16) for v in operands((64,), (33,), 4, 1, 4))
    y = by_taps(x, kernel, (1,), ((0, 0),), (1,), 4)
    wide = by_xla(*(v.astype(jnp.float32) for v in (x, kernel)), (1,), ((0, 0),), (1,), 4)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


def equations(conv, x):
    """The names of what a convolution's program does, those of its kernels first."""
    return str(jax.make_jaxpr(lambda x: conv(x))(x))


def test_gradients_of_taps_are_counted():
    grid, size, *rest = SHAPES["1d"]
    x, kernel = operands(grid, size, 6, 1, 6)
    loss = lambda x, kernel: by_taps(x, kernel, *rest, 6).sum()  # noqa: E731
    values = multiply_adds(loss, x, kernel)
    assert values == 2 * 11 * 6 * 4
    assert multiply_adds(jax.value_and_grad(loss, (0, 1)), x, kernel) == 3 * values


def test_a_cpu_has_forms_of_its_own_where_they_pay(key, monkeypatch):
    x = input_of((1, 100, 18))
    depthwise = Conv(18, 18, key=key, size=(3,), groups=18)
    few = Conv(18, 18, key=key, size=(3,), groups=2)
    many = Conv(18, 36, key=key, size=(3,), groups=9)
    long = Conv(18, 18, key=key, size=(FEW_TAPS + 1,), groups=18)
    assert few.groups <= FEW_GROUPS < many.groups
    counts = [equations(c, x).count("conv_general_dilated[") for c in (depthwise, few, many, long)]
    assert counts == [0, 2, 1, 1]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [equations(c, x).count("conv_general_dilated[") for c in (depthwise, few)] == [1, 1]


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_the_forms_cost_the_same(groups):
    grid, size, *rest = SHAPES["2d"]
    x, kernel = operands(grid, size, 6, 6 // groups, 12)
    got = multiply_adds(lambda x, kernel: convolve(x, kernel, *rest, groups), x, kernel)
    assert got == multiply_adds(lambda x, kernel: by_xla(x, kernel, *rest, groups), x, kernel)
