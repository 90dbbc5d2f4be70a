"""Layers against closed forms written out in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab import weights
from ffnlab.errors import ConfigError
from ffnlab.layers import Attention, AttentionSpec, Block, Context, Linear, Rope
from ffnlab.layers.attention.attention import attend
from ffnlab.layers.attention.rope import frequencies, rotate, tables
from ffnlab.layers.attention.spec import causal_mask
from ffnlab.layers.linear import together
from tests.contracts import OUT, input_of, linear, sparse_ffn


def brute_attention(q, k, v, window, softcap):
    """Loops over every query, head and key."""
    b, t, heads, hd = q.shape
    out = np.zeros_like(q)
    for row, i, head in np.ndindex(b, t, heads):
        group = head // (heads // k.shape[2])
        first = 0 if window is None else max(0, i - window + 1)
        scores = np.array([q[row, i, head] @ k[row, j, group] for j in range(first, i + 1)])
        scores = scores / np.sqrt(hd)
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        p = np.exp(scores - scores.max())
        out[row, i, head] = (p / p.sum()) @ v[row, first : i + 1, group]
    return out


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_is_the_sum_over_visible_keys(window, softcap, key):
    q, k, v = (
        np.asarray(jax.random.normal(s, (2, 7, n, 4)), np.float64)
        for s, n in zip(jax.random.split(key, 3), (4, 2, 2), strict=True)
    )
    spec = AttentionSpec(4, 2, 4, Rope(), window=window, softcap=softcap)
    q32, k32, v32 = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    ours = attend(q32, k32, v32, None, spec)
    np.testing.assert_allclose(ours, brute_attention(q, k, v, window, softcap), atol=1e-5)
    slots = jnp.arange(7)
    mask = jnp.broadcast_to(causal_mask(slots, slots, window), (2, 1, 7, 7))
    np.testing.assert_allclose(attend(q32, k32, v32, mask, spec), ours, atol=1e-5)


def test_a_huge_soft_cap_is_no_cap(key):
    q, k, v = (jax.random.normal(s, (1, 5, 2, 4)) for s in jax.random.split(key, 3))
    capped = AttentionSpec(2, 2, 4, Rope(), softcap=1e6)
    plain = AttentionSpec(2, 2, 4, Rope())
    np.testing.assert_allclose(
        attend(q, k, v, None, capped), attend(q, k, v, None, plain), atol=1e-5
    )


@given(st.integers(0, 2000), st.integers(-500, 500))
def test_rotation_keeps_lengths_and_depends_on_distance(position, shift):
    rope = Rope(theta=100.0)
    q, k = input_of((1, 1, 2, 6)), input_of((1, 1, 2, 6)) * 2 + 1

    def score(a: int, b: int) -> np.ndarray:
        turned_q = rotate(q, *tables(rope, 6, jnp.array([[a]])))
        turned_k = rotate(k, *tables(rope, 6, jnp.array([[b]])))
        np.testing.assert_allclose(
            jnp.linalg.norm(turned_q, axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-4
        )
        return np.asarray((turned_q * turned_k).sum(-1))

    # Float32 rounds angles of 2000, 2500 and 500 radians by 6e-5, 1.2e-4 and 1.5e-5 at most.
    other = position + abs(shift)
    error = np.abs(score(position, 0) - score(other, abs(shift)))
    assert (error <= 2e-4 * jnp.linalg.norm(q, axis=-1) * jnp.linalg.norm(k, axis=-1)).all()


def test_partial_rotation_leaves_the_rest():
    rope = Rope(fraction=0.5)
    x = input_of((1, 3, 2, 8))
    turned = rotate(x, *tables(rope, 8, jnp.arange(3)[None]))
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    assert not np.allclose(turned[0, 1:, :, :4], x[0, 1:, :, :4])


def test_texts_share_a_call_where_their_frequencies_are_the_same():
    ropes = {
        scaling: Rope(scaling=scaling, factor=2.0, original=8, short=(1.0,) * 4, long=(3.0,) * 4)
        for scaling in (None, "longrope", "dynamic")
    }

    def alike(rope, first, other):
        turns = [tables(rope, 8, jnp.arange(n)[None])[0][0, :5] for n in (first, other)]
        return bool((turns[0] == turns[1]).all())

    for rope in ropes.values():
        for first, other in itertools.product((5, 8, 9, 12), repeat=2):
            same = rope.call_of(first, first) == rope.call_of(other, other)
            assert same == alike(rope, first, other), (rope.scaling, first, other)
    # Texts that grow over the original length while they are generated do so at the same step.
    for scaling, calls in ((None, 1), ("longrope", 6), ("dynamic", 7)):
        grown = {ropes[scaling].call_of(n, n + 5) for n in (2, 3, 4, 5, 7, 8, 9, 11)}
        assert len(grown) == calls, scaling


def test_rope_scalings_follow_their_formulas():
    plain = frequencies(Rope(), 16).astype(np.float64)
    np.testing.assert_allclose(
        frequencies(Rope(scaling="linear", factor=4.0), 16), plain / 4, rtol=1e-6
    )
    llama = frequencies(Rope(scaling="llama3", factor=8.0, original=64), 16)
    wavelength = 2 * np.pi / plain
    for ours, f, length in zip(llama, plain, wavelength, strict=True):
        if length < 64 / 4:
            expected = f
        elif length > 64 / 1:
            expected = f / 8
        else:
            smooth = (64 / length - 1) / (4 - 1)
            expected = (1 - smooth) * f / 8 + smooth * f
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_follows_its_formula(truncate):
    """arXiv 2309.00071, section 3.2, pair by pair; `truncate` widens the band to whole pairs."""
    rope = Rope(scaling="yarn", factor=4.0, original=4096, low=1.0, high=32.0, truncate=truncate)
    plain = frequencies(Rope(), 64).astype(np.float64)

    def pair(turns):
        return 32 * np.log(4096 / (2 * np.pi * turns)) / np.log(1e4)

    low, high = pair(32.0), pair(1.0)
    low, high = (np.floor(low), np.ceil(high)) if truncate else (low, high)
    for i, found in enumerate(frequencies(rope, 64)):
        share = min(max((i - low) / (high - low), 0.0), 1.0)
        np.testing.assert_allclose(found, plain[i] * (1 - share + share / 4), rtol=1e-6)
    np.testing.assert_allclose(rope.magnitude, 0.1 * np.log(4) + 1)


LONG = Rope(scaling="longrope", factor=4.0, original=8, short=(1.0, 1.5), long=(2.0, 8.0))
DYNAMIC = Rope(scaling="dynamic", factor=3.0, original=8)


@pytest.mark.parametrize("rope", [LONG, DYNAMIC])
@pytest.mark.parametrize("length", [1, 8, 9, 20])
def test_frequencies_that_depend_on_the_length(rope, length):
    """The length is that of the longest row of the call."""
    positions = jnp.stack([jnp.arange(length), jnp.arange(length) // 2])
    theta = 1e4
    if rope is DYNAMIC and length > 8:
        theta *= (3.0 * length / 8 - 2.0) ** (4 / 2)
    expected = theta ** -np.array([0.0, 0.5])
    if rope is LONG:
        expected = expected / (rope.long if length > 8 else rope.short)
    cos, sin = (np.asarray(x)[:, :, 0] / rope.magnitude for x in tables(rope, 4, positions))
    angles = np.asarray(positions)[..., None] * expected
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-5)


def test_an_odd_share_of_channels_is_rounded_up():
    rope = Rope(fraction=0.75)
    np.testing.assert_allclose(frequencies(rope, 4), [1.0, 1e4 ** (-2 / 3)], rtol=1e-6)
    x = input_of((1, 3, 2, 12))
    turned = rotate(x, *tables(Rope(fraction=0.25), 12, jnp.arange(3)[None]))  # 3 of 12, so 4
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    assert not np.allclose(turned[0, 1:, :, 3], x[0, 1:, :, 3])


def test_linear_replace_keeps_bias_and_axes_and_refuses_other_shapes(key):
    layer = linear(key)
    new = layer.replace(weights.Dense(layer.weight.dense() * 2))
    assert new.w.axes == layer.w.axes and new.bias is not None
    with pytest.raises(ValueError, match=r"weight has shape \(3, 4\), the layer \(24, 16\)"):
        layer.replace(weights.Dense(jnp.ones((3, 4))))


@pytest.mark.parametrize("rows", [1, 63, 64, 130])
def test_maps_together_are_the_maps_apart(rows, key):
    x = jax.random.normal(key, (rows, 12))
    maps = [linear(key, 12, n) for n in (8, 4, 6)]
    maps[0] = maps[0].replace(maps[0].weight, bias=jnp.arange(8.0))
    maps[1] = maps[1].replace(weights.Dense(maps[1].weight.w.astype(jnp.bfloat16)))
    for y, m in zip(together(x, *maps), maps, strict=True):
        np.testing.assert_allclose(y, m(x), rtol=1e-6, atol=1e-6)


def test_maps_together_are_one_product_where_they_can_be(key):
    x, maps = jax.random.normal(key, (64, 12)), [linear(key, 12, n) for n in (8, 4, 6)]
    products = lambda *m: str(jax.make_jaxpr(lambda x: together(x, *m))(x)).count("dot_general")  # noqa: E731
    assert products(*maps) == 1
    rounded = maps[0].replace(weights.Dense(maps[0].weight.w, act="e4m3"))
    assert products(rounded, *maps[1:]) == 3
    assert products(*(m.replace(weights.Transposed(m.weight.transpose())) for m in maps)) == 3


def test_sparse_ffn_equals_the_masked_formula(key):
    ffn = sparse_ffn(key)
    x = input_of((5, 24))
    a = jax.nn.silu(ffn.gate(x))
    kept = jnp.where(jnp.abs(a) > 0.1, a, 0)
    np.testing.assert_allclose(ffn(x), ffn.down(kept * ffn.up(x)), rtol=1e-5, atol=1e-6)
    assert 0.05 < float((ffn.activate(x) == 0).mean()) < 0.95


@pytest.mark.parametrize("rows", [(1,), (1, 1), (3,)])
@pytest.mark.parametrize("threshold", [-1.0, 0.1, jnp.inf])
def test_sparse_ffn_of_one_row_is_that_of_many(rows, threshold, key):
    ffn = sparse_ffn(key)
    ffn.threshold.set_value(jnp.full((OUT,), threshold))
    x = input_of((*rows, 24))
    many = ffn(jnp.concatenate([x.reshape(-1, 24)] * 2))[: x.size // 24]
    np.testing.assert_allclose(ffn(x).reshape(-1, 24), many, rtol=1e-5, atol=1e-6)
    if threshold == jnp.inf:
        bias = ffn.down.bias
        np.testing.assert_array_equal(ffn(x).reshape(-1, 24), jnp.broadcast_to(bias, many.shape))


def test_sparse_ffn_refuses_a_threshold_of_another_size(key):
    ffn = sparse_ffn(key)
    with pytest.raises(ConfigError, match="threshold has shape"):
        type(ffn)(ffn.gate, ffn.up, ffn.down, jnp.ones(3), activation="silu")


def test_block_without_both_sublayers_is_the_identity(key):
    empty = Block(None, None, None, None)
    h = input_of((1, 3, 16))
    out, cache, outputs = empty(h, Context({}, {}))
    assert out is h and cache is None and outputs.reports == {}
    with pytest.raises(ValueError, match="no such sublayer"):
        empty.without("attn")


def test_unknown_names_are_refused(key):
    from ffnlab.layers import GatedFFN

    with pytest.raises(ConfigError, match="activation='swish' is not one of"):
        GatedFFN(4, 4, key=key, activation="swish")


def test_post_scale_changes_no_score(key):
    """Keys times s and queries over s: FireQ's post-RoPE scale is a re-parameterisation."""
    from flax import nnx

    spec = AttentionSpec(4, 2, 4, Rope())
    attn = Attention(spec, 16, key=key)
    x = input_of((2, 5, 16))
    angles = {spec.rope: tables(spec.rope, 4, jnp.arange(5)[None])}
    plain = attn(x, Context(angles, {None: None}))[0]
    scale = jnp.exp(jax.random.normal(key, (2, 4)))
    attn.post_scale = nnx.data(nnx.Param(scale, axes=("kv_heads", "head_dim")))
    np.testing.assert_allclose(attn(x, Context(angles, {None: None}))[0], plain, atol=1e-5)


def test_linear_draws_at_its_scale(key):
    w = Linear(400, 300, key=key, axes=("a", "b"), scale=0.5).weight.dense()
    assert abs(float(w.std()) / (0.5 / 20) - 1) < 0.02


def test_a_linear_map_is_drawn_by_an_initializer(key):
    init = jax.nn.initializers.glorot_uniform()
    drawn = init(key, (24, 16), jnp.float32)
    layer = Linear(24, 16, key=key, axes=("a", "b"), init=init)
    np.testing.assert_array_equal(layer.weight.dense(), drawn)
    rounded = Linear(24, 16, key=key, axes=("a", "b"), init=init, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(rounded.weight.dense(), drawn.astype(jnp.bfloat16))
    with pytest.raises(ConfigError, match="scale=2.0 and init"):
        Linear(24, 16, key=key, axes=("a", "b"), init=init, scale=2.0)


def test_the_default_draw_is_that_of_the_key(key):
    layer = Linear(24, 16, key=key, axes=("a", "b"), scale=0.7, dtype=jnp.bfloat16)
    drawn = jax.random.normal(key, (24, 16), jnp.float32) * (0.7 * 24**-0.5)
    np.testing.assert_array_equal(layer.weight.dense(), drawn.astype(jnp.bfloat16))
