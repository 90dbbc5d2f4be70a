"""A gated FFN whose gate and up were joined for a GPU: the same function, in one kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, tree, weights
from ffnlab.layers import GatedFFN, JoinedGatedFFN, Linear
from ffnlab.testing import tiny
from pallas_kernels.aot import lower_for

WIDTH, HIDDEN = 96, 160  # neither a multiple of 128


def int4(linear, *, lowest=-8, act="e4m3", group=128):
    """A Linear with random INT4 codes of its shape."""
    rows, columns = linear.weight.shape
    random = np.random.default_rng(rows + columns)
    q = random.integers(lowest, 8, (rows, columns))
    q[0, 0] = lowest
    scales = random.uniform(0.01, 0.1, (-(-rows // group), columns))
    return linear.replace(
        weights.Int4.from_codes(
            jnp.asarray(q, jnp.int8),
            jnp.asarray(scales, jnp.float32),
            group=group,
            divisor=2.0,
            act=act,
        )
    )


def layer(*, bias=False, activation="silu", **options):
    """A GatedFFN in INT4; `options` are of gate and down, up keeps the defaults."""
    ffn = GatedFFN(WIDTH, HIDDEN, key=jax.random.key(0), bias=bias, activation=activation)
    ffn.gate, ffn.up = int4(ffn.gate, **options), int4(ffn.up)
    ffn.down = int4(ffn.down, **options)
    return ffn


def apart(ffn):
    """The layer prepared for a GPU without joining: two products."""
    return weights.map_weights(lambda w: w.prepare("cuda"), ffn)


def test_joined_it_computes_what_two_products_do():
    ffn = layer()
    ready = weights.prepare(ffn, "cuda")
    assert isinstance(ready, JoinedGatedFFN) and isinstance(ffn, GatedFFN)
    x = jax.random.normal(jax.random.key(1), (3, WIDTH))
    run = jax.jit(lambda ffn, x: ffn(x))
    np.testing.assert_allclose(run(ready, x), run(apart(ffn), x), rtol=1e-6, atol=1e-6)
    half = x.astype(jnp.bfloat16)
    y, exact = (np.asarray(run(f, half), np.float32) for f in (ready, apart(ffn)))
    assert y.shape == exact.shape
    # Apart gate, up and their product are rounded to bfloat16, joined only the product.
    assert np.linalg.norm(y - exact) < 0.03 * np.linalg.norm(exact)
    # Twice prepared is once prepared; on a CPU it is dense.
    assert weights.prepare(ready, "cuda").gate_up.weight.words is ready.gate_up.weight.words
    dense = weights.prepare(ready, "cpu")
    assert isinstance(dense.gate_up.weight, weights.Dense)
    np.testing.assert_allclose(run(dense, x), run(ready, x), rtol=1e-4, atol=1e-3)


def test_the_halves_come_apart_again():
    gate, up = (w.weight.prepare("cuda") for w in (layer().gate, layer().up))
    joined = weights.JoinedInt4.join(gate, up)
    for half, w in zip(joined.halves(), (gate, up), strict=True):
        assert jax.tree.structure(half) == jax.tree.structure(w)
        for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(w), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "options", [{"bias": True}, {"activation": "gelu_tanh"}, {"lowest": -7}, {"act": None}]
)
def test_what_does_not_fit_stays_two_products(options):
    ffn = layer(**options)
    ready = weights.prepare(ffn, "cuda")
    assert isinstance(ready, GatedFFN)
    assert isinstance(ready.up.weight, weights.PackedInt4)
    x = jax.random.normal(jax.random.key(1), (2, WIDTH))
    run = jax.jit(lambda ffn, x: ffn(x))
    np.testing.assert_allclose(run(ready, x), run(ffn, x), rtol=1e-4, atol=1e-3)


def test_weights_that_differ_name_themselves():
    narrow, wide = (f.weight.prepare("cuda") for f in (layer(lowest=-7).gate, layer().up))
    with pytest.raises(ValueError, match="gate is .*'sm'.* and up .*'tc'.* one shape, encoding"):
        weights.JoinedInt4.join(narrow, wide)
    joined = weights.JoinedInt4.join(wide, wide)
    with pytest.raises(ValueError, match=r"8 tiles and 512 columns for twice columns=200"):
        weights.JoinedInt4(joined.words[:4], *jax.tree.leaves(joined)[1:], WIDTH, 200, "tc")
    with pytest.raises(ValueError, match="gate_up has 320 columns, expected twice the 96 rows"):
        gate = layer().gate
        wide = Linear(WIDTH, 2 * HIDDEN, key=jax.random.key(0), axes=("embed", "mlp"))
        JoinedGatedFFN(wide, gate, activation="silu")


def test_a_stacked_decoder_joins_all_its_layers():
    model = tree.map_at(tiny(), tree.at("layers[*].ffn.*") & tree.of_type(Linear), int4)
    model = models.stack(model)
    ready, tokens = weights.prepare(model, "cuda"), jnp.arange(12).reshape(2, 6)
    (joined,) = tree.select(ready, tree.of_type(JoinedGatedFFN)).values()
    (plain,) = tree.select(apart(model), tree.of_type(GatedFFN)).values()
    halves, expected = joined.gate_up.weight.halves(), (plain.gate.weight, plain.up.weight)
    for a, b in zip(jax.tree.leaves(halves), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert joined.gate_up.w.axes == plain.gate.w.axes
    assert jax.eval_shape(ready, tokens).shape == (2, 6, 64)


def test_on_a_hopper_gate_and_up_are_one_kernel():
    x = jax.ShapeDtypeStruct((70, WIDTH), jnp.bfloat16)
    run = lambda x, ffn: ffn(x)  # noqa: E731
    counts = [
        lower_for(run, (x, jax.eval_shape(lambda f=f: f)), "h200").count("@mosaic_gpu")
        for f in (weights.prepare(layer(), "cuda"), apart(layer()))
    ]
    assert counts[0] < counts[1]  # one product less, and one rounding of x
