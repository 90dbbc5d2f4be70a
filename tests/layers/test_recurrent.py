"""Recurrent networks against torch (recorded), and the scan that the layer owns."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ffnlab import tree, weights
from ffnlab.errors import ConfigError, SelectionError
from ffnlab.layers import CELLS, Linear, Recurrent
from tests.contracts import input_of
from tests.fixtures.layers import record

ATOL = 1e-5  # float32 against float64, of values of about one
GRADIENT = 1e-4  # gradients are sums of 21 products of up to about ten


def network(cell, layout, key):
    """Our network with the recorded parameters."""
    layers, both = record.LAYOUTS[layout]
    options = {"layers": layers, "direction": "both" if both else "forward"}
    net = Recurrent(record.WIDTH, record.HIDDEN, key=key, cell=cell, **options)
    maps = [m for layer in record.recurrent(cell, layout) for m in layer]
    for i, m in enumerate(maps):
        m = {name: jnp.asarray(value, jnp.float32) for name, value in m.items()}
        net.input[i] = net.input[i].replace(weights.Dense(m["input"]), m["input_bias"])
        bias = m["hidden_bias"] if cell == "gru" else None
        net.hidden[i] = net.hidden[i].replace(weights.Dense(m["hidden"]), bias)
    return net


def ragged_mask():
    return jnp.arange(record.STEPS) < jnp.array(record.LENGTHS)[:, None]


@pytest.fixture(scope="module")
def expected(fixtures):
    return np.load(fixtures / "layers" / "expected.npz")


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("layout", record.LAYOUTS)
@pytest.mark.parametrize("cell", record.CELLS)
def test_it_is_torch_s(cell, layout, ragged, expected, key):
    net, name = network(cell, layout, key), f"{cell}/{layout}/{'ragged' if ragged else 'full'}"
    x = jnp.asarray(record.normal(3, record.STEPS, record.WIDTH), jnp.float32)
    state = tuple(jnp.asarray(s, jnp.float32) for s in record.first_state(cell, layout))
    mask = ragged_mask() if ragged else None
    weigh = jnp.asarray(record.normal(*expected[name].shape, seed=9), jnp.float32)

    def loss(net, x):
        y, final = net(x, state, mask=mask)
        return (y * weigh).sum(), (y, final)

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, (y, final)), (of_net, of_x) = run(net, x)
    np.testing.assert_allclose(y, expected[name], atol=ATOL)
    for i, part in enumerate(final):
        found = part.reshape(-1, *part.shape[2:])
        np.testing.assert_allclose(found, expected[f"{name}/final/{i}"], atol=ATOL)
    assert len(final) == CELLS[cell].parts
    np.testing.assert_allclose(of_x, expected[f"{name}/gradient/input"], atol=GRADIENT)
    np.testing.assert_allclose(
        of_net.hidden[0].weight.dense(), expected[f"{name}/gradient/hidden"], atol=GRADIENT
    )


@pytest.mark.parametrize("cell", CELLS)
def test_a_row_in_two_pieces_is_the_row(cell, key):
    net = Recurrent(5, 4, key=key, cell=cell, layers=2)
    # A product of four steps rounds in another order than one of nine; of bfloat16 in the last bit
    # of values below one, at every step.
    for dtype, atol in ((jnp.float32, ATOL), (jnp.bfloat16, 2**-6)):
        x = input_of((2, 9, 5)).astype(dtype)
        whole, final = net(x)
        first, state = net(x[:, :4])
        rest, last = net(x[:, 4:], state)
        pieces = (jnp.concatenate([first, rest], 1), *last)
        for ours, same in zip(pieces, (whole, *final), strict=True):
            np.testing.assert_allclose(*(np.float32(v) for v in (ours, same)), rtol=0, atol=atol)
        assert whole.dtype == final[0].dtype == dtype
        assert cell != "lstm" or final[1].dtype == jnp.float32


@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
def test_steps_that_are_not_there_change_nothing(direction, key):
    """Padding on either side, with anything in it, and a row of nothing."""
    net = Recurrent(5, 4, key=key, layers=2, direction=direction)
    x = input_of((1, 6, 5))
    y, final = net(x)
    for before, after in itertools.product((0, 2), (0, 3)):
        padded = jnp.pad(x, ((0, 0), (before, after), (0, 0)), constant_values=7.0)
        mask = (jnp.arange(padded.shape[1]) - before) % padded.shape[1] < 6
        found, last = net(padded, mask=mask[None])
        np.testing.assert_allclose(found[:, before : before + 6], y, atol=ATOL)
        np.testing.assert_array_equal(jnp.where(mask[None, :, None], 0, found), 0)
        for ours, same in zip(last, final, strict=True):
            np.testing.assert_allclose(ours, same, atol=ATOL)
    state = tuple(input_of(s.shape) for s in final)
    found, last = net(x, state, mask=jnp.zeros((1, 6), bool))
    np.testing.assert_array_equal(found, 0)
    jax.tree.map(np.testing.assert_array_equal, last, state)


def test_both_ways_are_one_network_each_way(key):
    both = Recurrent(5, 4, key=key, direction="both")
    x = input_of((2, 7, 5))
    y, (h, c) = both(x)
    for side, direction in enumerate(("forward", "reverse")):
        one = Recurrent(5, 4, key=key, direction=direction)
        one.input[0], one.hidden[0] = both.input[side], both.hidden[side]
        alone, final = one(x)
        np.testing.assert_array_equal(y[..., 4 * side : 4 * side + 4], alone)
        np.testing.assert_array_equal(h[0, side], final[0][0, 0])
        np.testing.assert_array_equal(c[0, side], final[1][0, 0])
    np.testing.assert_array_equal(h[0, 0], y[:, -1, :4])
    np.testing.assert_array_equal(h[0, 1], y[:, 0, 4:])


class Tagger(nnx.Module):
    """Two recurrent layers, of which the outputs are given."""

    def __init__(self, key):
        self.net = Recurrent(5, 4, key=key, layers=2)

    def __call__(self, x):
        return self.net(x)[0]


def test_capture_sees_the_layer_and_its_input_maps_and_no_tracer_of_the_scan(key):
    model, x = Tagger(key), input_of((2, 7, 5))
    capture = jax.jit(lambda m, x, at: tree.capture(m, tree.at(at), x)[1], static_argnums=2)
    found = capture(model, x, "net") | capture(model, x, "net.input[*]")
    assert found.keys() == {"net", "net.input[0]", "net.input[1]"}
    np.testing.assert_array_equal(found["net"].input[0], x)
    np.testing.assert_allclose(found["net"].output[0], model(x), atol=ATOL)
    first = Recurrent(5, 4, key=key)
    first.input[0], first.hidden[0] = model.net.input[0], model.net.hidden[0]
    np.testing.assert_allclose(found["net.input[1]"].input[0], first(x)[0], atol=ATOL)
    with pytest.raises(SelectionError, match="did not run as calls"):
        tree.capture(model, tree.at("net.hidden[*]"), x)


def test_weights_may_be_of_any_format(key):
    net, x = Recurrent(8, 8, key=key), input_of((2, 5, 8))
    int8 = tree.map_at(
        net,
        tree.of_type(Linear),
        lambda m: m.replace(weights.Int8.quantize(m.weight.dense(), group=8)),
    )
    dense = tree.map_at(
        int8, tree.of_type(Linear), lambda m: m.replace(weights.Dense(m.weight.dense()))
    )
    np.testing.assert_allclose(int8(x)[0], dense(x)[0], atol=ATOL)
    trained, fixed = tree.trained(int8)
    loss = lambda t: (tree.combine(t, fixed)(x)[0] ** 2).sum()  # noqa: E731
    gradient = jax.tree.leaves(jax.grad(loss)(trained))
    assert [g.shape for g in gradient] == [(32,)] and float(jnp.abs(gradient[0]).max()) > 0


def test_draws_are_torch_s_and_an_initializer_s(key):
    net = Recurrent(50, 64, key=key, cell="gru", layers=2)
    for m in (*net.input, *net.hidden):
        w = np.asarray(m.weight.dense())
        assert 0.99 / 8 < np.abs(w).max() <= 1 / 8 and abs(w.mean()) < 0.01
        np.testing.assert_array_equal(m.bias, 0)
    drawn = [np.asarray(m.weight.dense()).ravel()[:9] for m in (*net.input, *net.hidden)]
    assert len({w.tobytes() for w in drawn}) == 4
    plain = Recurrent(5, 4, key=key, bias=False, init=jax.nn.initializers.ones)
    assert [leaf.shape for leaf in jax.tree.leaves(plain)] == [(4, 16), (5, 16)]
    np.testing.assert_array_equal(plain.hidden[0].weight.dense(), 1)


def test_refusals(key):
    for options, message in (
        ({"cell": "rnn"}, r"cell='rnn' is not one of \['elman', 'gru', 'lstm'\]"),
        ({"direction": "backward"}, "direction='backward'"),
        ({"layers": 0}, "layers=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Recurrent(5, 4, key=key, **options)
    net, x = Recurrent(5, 4, key=key), input_of((2, 7, 5))
    h = jnp.zeros((1, 1, 2, 4))
    for state in ((h,), (h, h[0]), (h, h[..., :3])):
        with pytest.raises(ValueError, match=r"the lstm takes 2 of \(1, 1, 2, 4\)"):
            net(x, state)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 6\), the rows \(2, 7\)"):
        net(x, mask=jnp.ones((2, 6), bool))
