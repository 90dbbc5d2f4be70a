"""Quantiles, importance and thresholds, against sorting and the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ffnlab.errors import ConfigError
from ffnlab.sparsity import chess_core as core

EXAMPLES = settings(max_examples=40, deadline=None)
# Few shapes, because each compiles; the values do the work. Subnormals are flushed on a CPU.
SHAPES = st.sampled_from([(1,), (7,), (4, 5)])
numbers = st.floats(width=32, allow_nan=False, allow_subnormal=False)
magnitudes = st.floats(0, 2.0**100, width=32, allow_subnormal=False)
any_float = hnp.arrays(np.float32, SHAPES, elements=numbers)
quantile = jax.jit(core.quantile, static_argnums=1)


@EXAMPLES
@given(x=any_float, q=st.sampled_from([0.3, 0.5, 0.7, 0.99]))
def test_quantile_is_the_order_statistic(x, q):
    k = int(x.size * q)
    if k < 1:
        with pytest.raises(ConfigError, match="at least"):
            core.quantile(jnp.asarray(x), q)
        return
    assert float(quantile(x, q)) == np.sort(x, axis=None)[k - 1]


def test_quantile_with_ties_infinities_and_nan():
    x = np.float32([np.nan, np.inf, -np.inf, 0.0, 0.0, 0.0, 2.0, -1.0])
    expected = np.sort(x)  # NaN last
    for k in range(1, 8):
        assert float(quantile(x, k / 8)) == expected[k - 1]


@pytest.mark.parametrize("q", [0.0, 1.0, -0.1, float("nan")])
def test_quantile_bad_level(q):
    with pytest.raises(ConfigError, match="outside"):
        core.quantile(jnp.ones(5), q)


def test_rank_is_the_authors():
    """int(n q), not rounded: 7 * 0.7 is 4.9."""
    assert [core.rank(n, 0.7) for n in (2, 7, 10)] == [1, 4, 7]


@EXAMPLES
@given(
    x=hnp.arrays(
        np.float32, SHAPES, elements=st.floats(0, 2.0**100, width=32, allow_subnormal=False)
    ),
    q=st.sampled_from([0.5, 0.7]),
)
def test_histogram_quantile_is_close_to_the_exact_one(x, q):
    x = np.concatenate([x.ravel(), np.float32([1e-3, 5.0])])
    half = len(x) // 2
    counts = core.histogram(jnp.asarray(x[:half])) + core.histogram(jnp.asarray(x[half:]))
    assert int(counts.sum()) == x.size
    exact = np.sort(x)[core.rank(x.size, q) - 1]
    if exact:
        assert abs(core.histogram_quantile(counts, q) / exact - 1) <= 1 / 512
    else:
        assert core.histogram_quantile(counts, q) < 1e-37  # the middle of the bin that begins at 0


def test_histogram_counts_past_int32():
    counts = np.zeros(core.BINS, np.int32)
    counts[[100, 200]] = 2**31 - 1
    low, high = core.histogram_quantile(counts, 0.4), core.histogram_quantile(counts, 0.6)
    assert low < high


@pytest.mark.parametrize("kind", ["sq", "abs"])
def test_importance_above_the_cut_is_gate_above_its_threshold(kind, key):
    gate, up = jax.random.normal(key, (2, 300, 8)) * jnp.exp(jnp.arange(8.0) - 4.0)
    s = core.statistic(up, kind)
    np.testing.assert_allclose(s, np.mean(up**2 if kind == "sq" else np.abs(up), axis=0), rtol=1e-5)
    scores = core.scores(gate, s, kind)
    cut = core.quantile(scores, 0.6)
    thresholds = core.thresholds(np.float32(cut), s, kind)
    kept = core.keep_mask(gate, thresholds, strict=kind == "sq")
    by_score = scores > cut if kind == "sq" else scores >= cut
    # An element on the cut itself may fall on either side by rounding.
    assert int(jnp.sum(kept != by_score)) <= 1
    assert abs(float(jnp.mean(kept)) - 0.4) <= 2 / gate.size


@pytest.mark.parametrize("kind", ["sq", "abs"])
def test_scaling_the_up_projection_changes_nothing(kind, key):
    """T scales with c or c^2, t_i does not."""
    gate, up = jax.random.normal(key, (2, 200, 8))

    def thresholds(scale):
        s = core.statistic(scale * up, kind)
        return core.thresholds(np.float32(core.quantile(core.scores(gate, s, kind), 0.5)), s, kind)

    np.testing.assert_array_equal(thresholds(1.0), thresholds(8.0))  # a power of two: exact
    np.testing.assert_allclose(thresholds(1.0), thresholds(0.37), rtol=1e-5)


@pytest.mark.parametrize("kind", ["sq", "abs"])
@pytest.mark.parametrize("cut", [0.0, 0.3])
def test_dead_channel_is_always_dropped_and_never_nan(kind, cut):
    s = jnp.float32([0.0, 2.0])
    thresholds = core.thresholds(np.float32(cut), s, kind)
    assert np.isinf(thresholds[0]) and np.isfinite(thresholds[1])
    kept = core.keep_mask(jnp.float32([[1e30, 1e30]]), thresholds, strict=kind == "sq")
    np.testing.assert_array_equal(kept, [[False, True]])


@EXAMPLES
@given(t=st.floats(2.0**-100, 2.0**100, width=32))
def test_inclusive_turns_greater_into_at_least(t):
    t = np.float32(t)
    below = np.nextafter(t, np.float32(0))
    assert np.float32(t) > core.inclusive(t) and not below > core.inclusive(t)


def test_a_magnitude_equal_to_its_threshold_is_dropped_where_strict():
    gate, t = jnp.array([[-2.0, -1.0, 1.0, 2.0]]), jnp.array([1.0, 1.0, 1.0, 3.0])
    assert core.keep_mask(gate, t, strict=True).tolist() == [[True, False, False, False]]
    assert core.keep_mask(gate, t, strict=False).tolist() == [[True, True, True, False]]


def test_inclusive_of_zero_keeps_every_non_zero():
    assert np.float32(1e-30) > core.inclusive(0.0)


def test_error_ordering_on_a_drawn_ffn():
    """Card, point 2: at 50 %, against numpy in float64 and an oracle that knows up."""
    d, h, tokens = 64, 256, 2048
    for spread, allowed in ((0.0, 1.0), (0.5, 0.6), (1.0, 0.15)):
        rng = np.random.default_rng(0)
        w_gate, w_up, down = (rng.normal(size=(d, h)) / 8 for _ in range(3))
        scales = np.exp(spread * rng.normal(size=h))

        def activations(x, w_gate=w_gate, w_up=w_up * scales):
            z = x @ w_gate
            return z / (1 + np.exp(-z)), x @ w_up

        seen_gate, seen_up = activations(rng.normal(size=(tokens, d)))
        gate, up = activations(rng.normal(size=(tokens, d)))

        def error(kept, product=gate * up, down=down):
            lost = np.where(kept, 0, product) @ down.T
            return np.sum(lost**2) / np.sum((product @ down.T) ** 2)

        cats = error(np.abs(gate) > float(quantile(np.float32(np.abs(seen_gate)), 0.5)))
        product = np.abs(gate * up)
        oracle = error(product > np.median(product))
        for kind in ("sq", "abs"):
            s = core.statistic(jnp.float32(seen_up), kind)
            cut = quantile(core.scores(jnp.float32(seen_gate), s, kind), 0.5)
            t = core.thresholds(np.float32(cut), s, kind)
            kept = np.asarray(core.keep_mask(jnp.float32(gate), t, strict=kind == "sq"))
            assert 0.95 * oracle <= error(kept) <= allowed * cats, (spread, kind)
