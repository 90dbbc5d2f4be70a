"""Convolution against torch (recorded), against its definition and as the product of a weight."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import weights
from ffnlab.errors import ConfigError
from ffnlab.layers import Conv
from ffnlab.models.convnet import ConvNet
from ffnlab.storage import structure
from tests.contracts import input_of
from tests.fixtures.layers import record

ATOL = 1e-5  # float32 sums of up to 45 products of about one, against float64


@pytest.fixture(scope="module")
def expected(fixtures):
    return np.load(fixtures / "layers" / "expected.npz")


@pytest.mark.parametrize("name", record.CONVS)
def test_it_is_torch_s(name, expected, key):
    shape, out, options = record.CONVS[name]
    conv = Conv(shape[-1], out, key=key, **options)
    bias = jnp.asarray(record.normal(out, seed=2), jnp.float32) if conv.b is not None else None
    w = weights.Dense(jnp.asarray(record.kernel(shape, out, options), jnp.float32))
    conv = conv.replace(w, bias)
    y = conv(jnp.asarray(record.normal(*shape), jnp.float32))
    np.testing.assert_allclose(y, expected[f"conv/{name}"], atol=ATOL)
    assert conv.channels == (shape[-1], out)


def brute(conv, x):
    """Sums over taps, position by position, in float64."""
    window = conv.window
    padding = conv.pads(x.shape[1:-1])
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
    w = np.asarray(conv.weight.dense(), np.float64).reshape(*window.size, -1, conv.channels[1])
    reach = [(n - 1) * d + 1 for n, d in zip(window.size, window.dilation, strict=True)]
    cells = [(n - r) // s + 1 for n, r, s in zip(x.shape[1:-1], reach, window.stride, strict=True)]
    y = np.zeros((len(x), *cells, conv.channels[1]))
    ins, outs = x.shape[-1] // conv.groups, conv.channels[1] // conv.groups
    for cell, tap, group in itertools.product(
        np.ndindex(*cells), np.ndindex(*window.size), range(conv.groups)
    ):
        at = zip(cell, window.stride, tap, window.dilation, strict=True)
        place = tuple(c * s + t * d for c, s, t, d in at)
        seen = x[(slice(None), *place, slice(group * ins, (group + 1) * ins))]
        columns = slice(group * outs, (group + 1) * outs)
        y[(slice(None), *cell, columns)] += seen @ w[(*tap, slice(None), columns)]
    return y


@pytest.mark.parametrize("padding", ["SAME", "VALID", "causal", 1, ((2, 0), (0, 3), 1)])
@pytest.mark.parametrize("groups", [1, 2])
def test_it_is_its_definition_in_three_dimensions(padding, groups, key):
    options = {"size": (2, 3, 1), "stride": (2, 1, 2), "dilation": (1, 2, 1)}
    conv = Conv(4, 6, key=key, padding=padding, groups=groups, **options)
    x = input_of((2, 5, 6, 4, 4))
    np.testing.assert_allclose(conv(x), brute(conv, x), atol=ATOL)


def test_a_causal_output_sees_nothing_after_it(key):
    conv = Conv(3, 3, key=key, size=(4,), dilation=2, padding="causal")
    x = input_of((1, 12, 3))
    seen = jax.jacobian(lambda x: conv(x)[0, :, 0])(x)[:, 0, :, 0]
    distance = np.arange(12)[:, None] - np.arange(12)[None]
    np.testing.assert_array_equal(
        seen != 0, (distance >= 0) & (distance <= 6) & (distance % 2 == 0)
    )


def test_draws_of_the_layer_and_of_the_network_are_what_they_were(key):
    """U(-1, 1) / sqrt(rows), of the same key."""
    w = jax.random.uniform(key, (27, 4), jnp.float32, -(27**-0.5), 27**-0.5)
    np.testing.assert_array_equal(Conv(3, 4, key=key).weight.dense(), w)
    first, second, _ = jax.random.split(key, 3)
    net = ConvNet((3, 4, 5), 2, key=key)
    np.testing.assert_array_equal(net.convs[0].weight.dense(), Conv(3, 4, key=first).weight.dense())
    np.testing.assert_array_equal(
        net.convs[1].weight.dense(), Conv(4, 5, key=second).weight.dense()
    )
    assert net.sizes == [3, 4, 5, 2]


def test_layers_of_older_files_have_the_same_structure(key):
    """A 3 x 3 kernel over two dimensions with zeros around is written as it always was."""
    (root, *_), leaves = (structure.describe(Conv(3, 4, key=key))[k] for k in ("nodes", "leaves"))
    assert root["type"] == "Conv" and root["static"] == {"size": 3}
    assert [leaf["path"] for leaf in leaves] == ["w.value.w"]
    same = Conv(3, 4, key=key, size=(3, 3), stride=(1, 1), dilation=1, padding="SAME", groups=1)
    assert jax.tree.structure(same) == jax.tree.structure(Conv(3, 4, key=key))
    other = structure.describe(Conv(4, 4, key=key, size=(3,), groups=2, padding=1, stride=2))
    assert other["nodes"][0]["static"] == {
        "size": [3],
        "stride": [2],
        "groups": 2,
        "padding": [[1, 1]],
    }


def test_an_initializer_sees_the_kernel_with_its_taps(key):
    fan_out = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    w = Conv(16, 64, key=key, size=(3, 5), init=fan_out).weight.dense()
    assert float(w.std()) == pytest.approx(math.sqrt(2 / (15 * 64)), rel=0.02)
    same = fan_out(key, (3, 5, 16, 64), jnp.float32).reshape(240, 64)
    np.testing.assert_array_equal(w, same)
    rounded = Conv(16, 64, key=key, size=(3, 5), init=fan_out, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(rounded.weight.dense(), same.astype(jnp.bfloat16))


@pytest.mark.parametrize("size", [1, 3])
def test_a_quantized_weight_is_its_dense_matrix(size, key):
    conv = Conv(16, 8, key=key, size=size)
    x = input_of((2, 4, 5, 16))
    quantized = conv.replace(weights.Int8.quantize(conv.weight.dense(), group=8))
    dense = conv.replace(weights.Dense(quantized.weight.dense()))
    np.testing.assert_allclose(quantized(x), dense(x), atol=ATOL)
    assert not np.allclose(quantized(x), conv(x), atol=1e-4)


@pytest.mark.parametrize(
    "form",
    [
        lambda w: weights.Dense(w, act="e4m3"),
        lambda w: weights.SparseInput(weights.Dense(w), jnp.float32(0.5)),
        lambda w: weights.Masked(weights.Dense(w, act="e4m3"), w > 0),
    ],
)
def test_a_format_that_changes_its_input_needs_a_kernel_of_one_tap(form, key):
    conv = Conv(4, 3, key=key, size=1, stride=2)
    changed = conv.replace(form(conv.weight.dense()))
    x = input_of((2, 5, 4, 4))
    np.testing.assert_array_equal(changed(x), changed.weight.matmul(x[:, ::2, ::2]))
    wide = Conv(4, 3, key=key)
    with pytest.raises(ValueError, match="there are no patches to do it to"):
        wide.replace(form(wide.weight.dense()))(x)


def test_no_patches_are_laid_out(key):
    """Nothing in the program is larger than the input, the output and the kernel."""
    conv = Conv(4, 4, key=key, size=(9,))
    program = jax.make_jaxpr(lambda x: conv(x))(input_of((1, 512, 4)))
    largest = max(v.aval.size for eqn in program.eqns for v in eqn.outvars)
    assert largest == 512 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0 must be"),
        ({"size": ()}, "1 to 3 dimensions"),
        ({"size": (1, 1, 1, 1)}, "1 to 3 dimensions"),
        ({"stride": (1, 2, 1)}, r"stride=\(1, 2, 1\) must be one positive integer, or 2"),
        ({"dilation": -1}, "dilation=-1"),
        ({"groups": 3}, "groups=3 must divide the channels 4 -> 6"),
        ({"groups": 4}, "groups=4 must divide"),
        ({"padding": "same"}, "padding='same' must be one of"),
        ({"padding": -1}, "padding=-1"),
        ({"padding": (1,)}, r"padding=\(1,\)"),
        ({"padding": ((1, 2, 3), 1)}, "padding="),
    ],
)
def test_settings_that_are_refused(options, message, key):
    with pytest.raises(ConfigError, match=message):
        Conv(4, 6, key=key, **options)


def test_inputs_that_are_refused(key):
    conv = Conv(4, 6, key=key, padding="VALID")
    with pytest.raises(ValueError, match=r"expected \[n, 2 dimensions, 4\]"):
        conv(input_of((2, 5, 4)))
    with pytest.raises(ValueError, match=r"expected \[n, 2 dimensions, 4\]"):
        conv(input_of((2, 5, 5, 3)))
    with pytest.raises(ValueError, match=r"over \(3, 3\) positions do not fit a grid of \(5, 2\)"):
        conv(input_of((2, 5, 2, 4)))
