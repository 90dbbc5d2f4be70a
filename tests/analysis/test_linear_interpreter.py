"""Functions as affine maps: exact at x0, affine everywhere, and frozen where the paper freezes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name

from ffnlab import models
from ffnlab.analysis import interpret, singular, votes
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.layers import MLP, GatedFFN, InstanceNorm, LayerNorm, max_pool
from ffnlab.models import ConvNet
from ffnlab.testing import tiny


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def in64(model):
    is_float = lambda a: jnp.issubdtype(a.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda a: a.astype(jnp.float64) if is_float(a) else a, model)


def draw(shape, seed=1):
    return jnp.asarray(normal(shape, seed))


def normal(shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


W, B = normal((7, 6), 11), normal((6,), 12)


def layer(name):
    """An elementwise function between two maps."""
    act = {
        "relu": jax.nn.relu,
        "leaky": lambda x: jax.nn.leaky_relu(x, 0.1),
        "clip": lambda x: jnp.clip(x, -0.5, 1),
        "abs": jnp.abs,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_tanh": jax.nn.gelu,
        "silu": jax.nn.silu,
        "sigmoid": jax.nn.sigmoid,
        "tanh": jnp.tanh,
        "softplus": jax.nn.softplus,
        "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
        "where": lambda x: jnp.where(x > 0.2, 3 * x, x**2),
    }[name]
    return lambda x: act(x @ W + B) @ W.T


ACTS = ("relu leaky clip abs gelu gelu_tanh silu sigmoid tanh softplus mish where").split()


def of64(make):
    """A layer in float64; made when it is called, in float64."""
    return lambda x: in64(make())(x)


ALONE = {name: (layer(name), (7,)) for name in ACTS}
NETS = {
    "elementwise": (lambda x: jnp.concatenate([fn(x) for fn, _ in ALONE.values()]), (7,)),
    "glu": (of64(lambda: GatedFFN(5, 8, key=jax.random.key(0))), (3, 5)),
    "geglu": (of64(lambda: GatedFFN(5, 8, key=jax.random.key(0), activation="gelu")), (5,)),
    "layer norm": (lambda x: jnp.tanh(of64(lambda: LayerNorm(5))(x)), (2, 5)),
    "instance norm": (of64(lambda: InstanceNorm(2)), (1, 4, 4, 2)),
    "max pool": (lambda x: max_pool(x, (2, 2)), (1, 4, 4, 2)),
    "overlapping max pool": (lambda x: max_pool(x, (3, 3), stride=1, padding="SAME"), (1, 4, 4, 2)),
    "softmax": (lambda x: jax.nn.softmax(x @ x.T) @ x, (4, 3)),
    "maximum": (lambda x: jnp.maximum(x @ W, B), (7,)),
    "reduce max": (lambda x: (x @ W).max(0) + x.min(), (4, 7)),
    "top k": (lambda x: jax.lax.top_k(x @ W, 2)[0], (7,)),
    "routed": (lambda x: x @ jnp.stack([W, 2 * W])[jnp.argmax(x[:2])], (7,)),
    "cond": (lambda x: jax.lax.cond(x[0] > 0, jnp.tanh, lambda x: 2 * x, x), (7,)),
    "scan": (
        lambda x: jax.lax.scan(lambda c, w: (jnp.tanh(c * w), c.sum()), x, B)[0] + 1,
        (4,),
    ),
    "began as a constant": (
        lambda x: jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c + x), jnp.zeros(4)),
        (4,),
    ),
    "remat": (jax.checkpoint(layer("tanh")), (7,)),
}
LINEAR_BY_PARTS = ("relu", "leaky", "abs", "max pool", "overlapping max pool", "maximum")


@pytest.mark.parametrize("name", NETS)
def test_it_is_exact_at_x0_affine_everywhere_and_has_a_transpose(name):
    fn, shape = NETS[name]
    x0, one, other = draw(shape), draw(shape, 2), 100 * draw(shape, 3)

    @jax.jit
    def found(x0, one, other):
        at, out = interpret(fn, x0), fn(x0)
        u = jax.random.normal(jax.random.key(5), out.shape)
        both = at(0.3 * one + 0.7 * other)
        products = jnp.vdot(u, at.matvec(one)), jnp.vdot(at.rmatvec(u), one)
        moved = at(one), at.residual + at.matvec(one)
        return (at(x0), out), (both, 0.3 * at(one) + 0.7 * at(other)), moved, products

    for (left, right), close in zip(found(x0, one, other), (-12, -10, -12, -10), strict=True):
        np.testing.assert_allclose(left, right, atol=10.0**close)


@pytest.mark.parametrize("name", LINEAR_BY_PARTS)
def test_of_what_is_linear_by_parts_it_is_the_derivative(name):
    fn, shape = (NETS | ALONE)[name]
    x0, v = draw(shape), draw(shape, 6)
    np.testing.assert_allclose(
        interpret(fn, x0).matvec(v), jax.jvp(fn, (x0,), (v,))[1], rtol=0, atol=1e-15 * 100
    )


def test_of_a_relu_network_it_is_the_derivative_bit_for_bit():
    net, x0 = in64(MLP((6, 9, 9, 4), key=jax.random.key(3))), draw((6,))
    at, jacobian = interpret(net, x0), jax.jacobian(net)(x0)
    columns = jax.vmap(at.matvec, 0, 1)(jnp.eye(6))
    assert jnp.abs(columns - jacobian).max() <= 1e-15
    np.testing.assert_allclose(at.residual, net(x0) - jacobian @ x0, atol=1e-14)


@pytest.mark.parametrize("name", ["gelu", "sigmoid", "instance norm", "softmax", "glu"])
def test_elsewhere_it_is_not_the_derivative(name):
    """The freeze is real."""
    fn, shape = (NETS | ALONE)[name]
    x0, v = draw(shape), draw(shape, 6)
    assert jnp.abs(interpret(fn, x0).matvec(v) - jax.jvp(fn, (x0,), (v,))[1]).max() > 1e-3


def test_a_feed_forward_network_has_its_closed_form():
    up, down, x0 = draw((7, 9), 1), draw((9, 3), 2), draw((7,), 3)
    b, c, f = draw((9,), 4), draw((3,), 5), jax.nn.sigmoid
    at = interpret(lambda x: f(x @ up + b) @ down + c, x0)
    pre = x0 @ up + b
    slope = (f(pre) - 0.5) / pre
    np.testing.assert_allclose(
        jax.vmap(at.matvec, 0, 0)(jnp.eye(7)), (up * slope) @ down, atol=1e-12
    )
    np.testing.assert_allclose(at.residual, (slope * b + 0.5) @ down + c, atol=1e-12)


def test_a_gate_is_frozen_and_what_it_gates_follows():
    ffn = in64(GatedFFN(5, 8, key=jax.random.key(0)))
    x0, z = draw((5,)), draw((5,), 2)
    gate = jax.nn.silu(ffn.gate(x0))
    np.testing.assert_allclose(interpret(ffn, x0)(z), ffn.down(gate * ffn.up(z)), atol=1e-12)


def test_attention_patterns_are_frozen():
    fn = NETS["softmax"][0]
    x0, z = draw((4, 3)), draw((4, 3), 2)
    np.testing.assert_allclose(interpret(fn, x0)(z), jax.nn.softmax(x0 @ x0.T) @ z, atol=1e-12)


def test_a_deviation_is_frozen_and_a_mean_follows():
    x0, z = draw((1, 4, 4, 2)), draw((1, 4, 4, 2), 2)
    norm = in64(InstanceNorm(2))
    deviation = jnp.sqrt(x0.var((1, 2), keepdims=True) + norm.eps)
    want = (z - z.mean((1, 2), keepdims=True)) / deviation
    np.testing.assert_allclose(interpret(norm, x0)(z), want, atol=1e-12)


@pytest.mark.parametrize(
    ("mode", "want"),
    [("secant", (0.5, 0.25)), ("tangent", (0.5, 0.25)), ("mask", (0.0, 0.25))],
)
def test_at_zero_a_secant_is_the_slope(mode, want):
    at = interpret(jax.nn.sigmoid, jnp.zeros(()), mode=mode)
    assert (float(at.residual), float(at.matvec(jnp.ones(())))) == pytest.approx(want)


def test_a_relu_has_no_slope_at_zero():
    for relu in (jax.nn.relu, lambda x: jnp.maximum(x, 0), lambda x: jnp.maximum(jnp.zeros(2), x)):
        assert interpret(relu, jnp.zeros(2)).matvec(jnp.ones(2)).tolist() == [0, 0]


def test_modes_are_what_they_say():
    x0, f = jnp.array([0.7]), jnp.cos
    found = {mode: interpret(f, x0, mode=mode) for mode in ("secant", "tangent", "mask")}
    slopes = {mode: float(at.matvec(jnp.ones(1))[0]) for mode, at in found.items()}
    assert slopes["secant"] == pytest.approx((np.cos(0.7) - 1) / 0.7)
    assert slopes["tangent"] == pytest.approx(-np.sin(0.7))
    assert slopes["mask"] == pytest.approx(np.cos(0.7) / 0.7)
    rest = {mode: float(at.residual[0]) for mode, at in found.items()}
    assert rest == pytest.approx(
        {"secant": 1, "tangent": np.cos(0.7) + 0.7 * np.sin(0.7), "mask": 0}
    )


def test_equal_entries_are_taken_as_the_first():
    x0 = jnp.array([[2.0, 1.0], [1.0, 2.0]])[None, :, :, None]
    for fn in (lambda x: max_pool(x, (2, 2)), lambda x: x.max((1, 2))):
        assert interpret(fn, x0).rmatvec(jnp.ones_like(fn(x0))).ravel().tolist() == [1, 0, 0, 0]


@jax.jit
def pooled(x0, z):
    return interpret(lambda x: max_pool(x, (2, 2), stride=1), x0)(z)


@given(st.lists(st.integers(-2, 2), min_size=16, max_size=16))
def test_windows_take_what_x0_took(values):
    """Of entries that are often equal, the first; against plain loops."""
    with jax.enable_x64(True):
        x0 = jnp.array(values, jnp.float64).reshape(1, 4, 4, 1)
        z = draw((1, 4, 4, 1), 7)
        found = pooled(x0, z)[0, :, :, 0]
        for i in range(3):
            for j in range(3):
                window = np.asarray(x0[0, i : i + 2, j : j + 2, 0]).ravel()
                taken = np.asarray(z[0, i : i + 2, j : j + 2, 0]).ravel()[window.argmax()]
                assert found[i, j] == taken


def test_whole_models_are_interpreted(key):
    net, images = in64(ConvNet((2, 4), 3, key=key)), draw((1, 2, 2, 2))
    np.testing.assert_allclose(interpret(net, images)(images), net(images), atol=1e-12)
    model = tiny()
    h = model.embed_tokens(jnp.array([[1, 2, 3, 4]]))
    stacked = models.stack(model)  # one scan, which is entered; a list is the slow test's
    fn = lambda h: stacked.logits(stacked.hidden(embeddings=h))  # noqa: E731
    here, want, twice = at_and_beyond(fn, h)
    np.testing.assert_allclose(here, want, atol=1e-5)
    np.testing.assert_allclose(twice, 2 * here, atol=1e-4)


@pytest.mark.slow
def test_blocks_in_a_list_are_interpreted():
    model = tiny()
    h = model.embed_tokens(jnp.array([[1, 2, 3, 4]]))
    here, want, twice = at_and_beyond(lambda h: model.logits(model.hidden(embeddings=h)), h)
    np.testing.assert_allclose(here, want, atol=1e-5)
    np.testing.assert_allclose(twice, 2 * here, atol=1e-4)


def at_and_beyond(fn, h):
    """(at x0, the function there, at 2 x0 and the residual)."""

    @jax.jit
    def found(h):
        at = interpret(fn, h)
        return at(h), fn(h), at(2 * h) + at.residual

    return found(h)


def test_many_inputs_have_their_maps():
    fn, shape = ALONE["gelu"]
    x = draw((3, *shape))
    many = jax.jit(jax.vmap(lambda x: interpret(fn, x)))(x)
    z = draw(shape, 9)
    found = jax.vmap(lambda at: at(z))(many)
    for i in range(3):
        np.testing.assert_allclose(found[i], interpret(fn, x[i])(z), atol=1e-12)


def test_names_freeze_what_could_not_follow():
    fn = lambda x: checkpoint_name(x @ W, "left") * (x @ (2 * W))  # noqa: E731
    x0, z = draw((7,)), draw((7,), 2)
    with pytest.raises(ConfigError, match=r"mul of two factors that both follow.*test_linear_int"):
        interpret(fn, x0)
    at = interpret(fn, x0, frozen=("left",))
    np.testing.assert_allclose(at(z), (x0 @ W) * (z @ (2 * W)), atol=1e-12)


def test_votes_add_up():
    fn, shape = ALONE["gelu"]
    x0 = draw(shape)
    at = interpret(fn, x0)
    for i in range(7):
        found = votes(at, i)
        np.testing.assert_allclose(found.of.sum() + found.residual, fn(x0)[i], atol=1e-12)
        parts = abs(found.residual), abs(found.of.sum())
        np.testing.assert_allclose(found.share, parts[0] / sum(parts))
        np.testing.assert_allclose(found.of, at.rmatvec(jnp.eye(7)[i]) * x0)


def test_singular_vectors_are_those_of_the_matrix():
    fn, shape = ALONE["gelu"]
    at = interpret(fn, draw(shape))
    matrix = jax.vmap(at.matvec, 0, 1)(jnp.eye(7))
    found = singular(at, 3, key=jax.random.key(0), turns=300)
    u, s, v = np.linalg.svd(matrix)
    np.testing.assert_allclose(found.s, s[:3], rtol=1e-6)
    for i in range(3):
        assert abs(float(found.v[i] @ v[i])) == pytest.approx(1, abs=1e-6)
        assert abs(float(found.u[i] @ u[:, i])) == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(matrix @ found.v[i], found.s[i] * found.u[i], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("fn", [jax.nn.sigmoid, jax.nn.softplus, jnp.exp])
def test_a_secant_near_zero_is_not_rounding(fn, dtype):
    """At 1e-8 in float32 sigmoid is 1 / 2, and its slope was 0."""
    x = jnp.array([1e-20, -1e-8, 1e-6, 3e-5, 1e-4, -1e-3, 0.1, 6.0], dtype)
    at = interpret(fn, x)
    exact = np.asarray(x, np.float64)
    with jax.enable_x64(True):
        zero, there = (np.asarray(fn(jnp.asarray(v, jnp.float64))) for v in (0.0, exact))
    want = np.where(np.abs(exact) > 1e-6, (there - zero) / exact, np.asarray(jax.grad(fn)(0.0)))
    rounding = float(jnp.finfo(dtype).eps) ** 0.5
    np.testing.assert_allclose(at.rmatvec(jnp.ones(8, dtype)), want, rtol=max(rounding, 2e-6) * 2)
    np.testing.assert_allclose(at(x), fn(x), rtol=4 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: interpret(jnp.tanh, jnp.ones(2), mode="other"), "mode='other'"),
        (lambda: interpret(jnp.tanh, jnp.ones(2, int)), "int64"),
        (lambda: interpret(lambda x: (x, x), jnp.ones(2)), "one floating array"),
        (lambda: interpret(lambda x: x > 0, jnp.ones(2)), "one floating array"),
        (lambda: interpret(lambda x: jnp.sort(x), jnp.ones(2)), "nothing is known of 'sort'"),
        (lambda: interpret(jnp.tanh, jnp.ones(2))(jnp.ones(3)), r"z has shape \(3,\)"),
        (lambda: interpret(jnp.tanh, jnp.ones(2)).rmatvec(jnp.ones(3)), r"u has shape \(3,\)"),
        (lambda: interpret(jnp.tanh, jnp.ones(2)).matvec(jnp.ones(3)), r"v has shape \(3,\)"),
        (lambda: votes(interpret(jnp.tanh, jnp.ones(2)), 2), "index=.*outside"),
        (lambda: singular(interpret(jnp.tanh, jnp.ones(2)), 3, key=jax.random.key(0)), "k=3"),
    ],
)
def test_what_cannot_be_is_said(call, says):
    with pytest.raises(ConfigError, match=says):
        call()


def test_an_input_that_is_no_number_is_said():
    with pytest.raises(NumericalError, match="x0 has NaN"):
        interpret(jnp.tanh, jnp.array([1.0, jnp.nan]))
