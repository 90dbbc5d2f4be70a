"""Distances of FinerCut: the authors' values, exact zeros, chunks that add up."""

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from ffnlab.pruning.finercut_core import DISTANCES

# float32 sums of 165 terms against the authors' function run in float64.
RELATIVE = 1e-5
OFFICIAL = ("js", "kl", "norm", "angular")
TOTALS = {name: jax.jit(distance.total) for name, distance in DISTANCES.items()}
COMPARING = tuple(name for name in DISTANCES if name != "perplexity")


def total(name: str, original, pruned, tokens) -> float:
    """Sum over one chunk, compiled once per shape."""
    return float(TOTALS[name](*(jnp.asarray(a) for a in (original, pruned, tokens)), None))


def mean(name: str, original, pruned, tokens=None) -> float:
    """Total over count of one chunk."""
    tokens = np.zeros(original.shape[:2], np.int32) if tokens is None else tokens
    return total(name, original, pruned, tokens) / terms(name, *original.shape)


def terms(name: str, samples: int, tokens: int, vocab: int) -> int:
    """How many terms logits of a shape have, all of them counting."""
    return DISTANCES[name].terms(samples, samples * tokens, vocab)


def textbook(original, pruned):
    """[KL(P||M) + KL(Q||M)] / 2, mean over tokens, float64."""
    p, q = (np.exp(jax.nn.log_softmax(jnp.asarray(x))) for x in (original, pruned))
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    m = (p + q) / 2
    return float(np.mean(np.sum(p * np.log(p / m) + q * np.log(q / m), -1)) / 2)


@pytest.mark.parametrize("case", ["far", "near", "equal", "opposite", "extreme"])
@pytest.mark.parametrize("name", OFFICIAL)
def test_equals_the_official_distance(fixtures, name, case):
    with np.load(fixtures / "finercut" / "distances.npz", allow_pickle=False) as recorded:
        original, pruned = recorded["original"], recorded[f"{case}.logits"]
        expected = float(recorded[f"{case}.{name}"])
    ours = mean(name, original, pruned)
    # Absolute, one float32 epsilon: of unit vectors that are parallel but not equal, and of the
    # official float64 arccosine, which is 3e-8 where it should be 0.
    assert ours == pytest.approx(expected, rel=RELATIVE, abs=1.2e-7 if name == "angular" else 3e-8)


def test_official_js_is_the_reverse_of_the_textbook(fixtures):
    with np.load(fixtures / "finercut" / "distances.npz", allow_pickle=False) as recorded:
        original, pruned = recorded["original"], recorded["far.logits"]
    p, q = (np.asarray(jax.nn.softmax(jnp.asarray(x)), np.float64) for x in (original, pruned))
    m = (p + q) / 2
    reverse = np.mean(np.sum(m * np.log(m / p) + m * np.log(m / q), -1)) / 2
    assert mean("js", original, pruned) * original.shape[-1] == pytest.approx(reverse, rel=RELATIVE)
    ours = mean("js_textbook", original, pruned)
    assert ours == pytest.approx(textbook(original, pruned), rel=RELATIVE)
    assert ours < reverse


LOGITS = hnp.arrays(
    np.float32,
    st.sampled_from([(1, 1, 1), (3, 4, 5), (2, 1, 7)]),  # few: each shape compiles
    elements=st.floats(-60, 60, width=32),
)


@pytest.mark.parametrize("name", COMPARING)
@hypothesis.settings(max_examples=25)
@hypothesis.given(logits=LOGITS)
def test_equal_logits_have_distance_zero_exactly(name, logits):
    assert mean(name, logits, logits) == 0.0


@pytest.mark.parametrize("name", COMPARING)
@hypothesis.settings(max_examples=25)
@hypothesis.given(logits=LOGITS, seed=st.integers(0, 99), scale=st.sampled_from([1e-3, 1.0, 50.0]))
def test_distances_are_finite_not_negative_and_add_over_samples(name, logits, seed, scale):
    noise = np.random.default_rng(seed).normal(size=logits.shape) * scale
    other = (logits + noise).astype(np.float32)
    whole = mean(name, logits, other)
    assert np.isfinite(whole) and whole >= 0.0
    b, t, v = logits.shape
    tokens = np.zeros((1, t), np.int32)
    parts = [total(name, logits[i : i + 1], other[i : i + 1], tokens) for i in range(b)]
    count = sum(terms(name, 1, t, v) for _ in range(b))
    assert sum(parts) / count == pytest.approx(whole, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("name", [n for n in COMPARING if DISTANCES[n].per != "sample"])
def test_chunks_may_cut_a_sample_unless_the_term_is_a_sample(name):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(2, 6, 7)).astype(np.float32) for _ in range(2))
    left, right = mean(name, a[:, :2], b[:, :2]), mean(name, a[:, 2:], b[:, 2:])
    assert (left * 2 + right * 4) / 6 == pytest.approx(mean(name, a, b), rel=1e-5)


@pytest.mark.parametrize("name", ["js", "js_textbook", "kl", "angular"])
@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6])
def test_small_differences_keep_their_digits_in_float32(name, gap):
    """Late rounds and small models differ by this little; log P - log M would round it away.

    Logits near 0 so that the gap is representable; expected: the second-order forms in float64.
    """
    rng = np.random.default_rng(0)
    base = np.zeros((1, 4, 9), np.float32)
    base[..., 0] = 1.0 if name == "angular" else 0.0
    step = (rng.normal(size=base.shape) * gap).astype(np.float32)
    other = base + step
    step = other.astype(np.float64) - base
    if name == "angular":
        along = np.linalg.norm(step[..., 1:], axis=-1) / (1 + step[..., 0])
        expected = float(np.mean(np.arctan(along)))
    else:
        variance = np.mean(np.var(step, axis=-1))
        scale = {"js": 1 / 8 / 9, "js_textbook": 1 / 8, "kl": 1 / 2 / 9}[name]
        expected = float(variance * scale)
    # Relative: third-order terms of size `gap`, and log-softmax rounding 1e-7 over `gap`.
    assert mean(name, base, other) == pytest.approx(expected, rel=2 * gap + 1e-6 / gap)


def test_kl_between_series_and_difference_is_that_of_float64():
    """Where log Q - log P is 0.5 to 1 the series is cut too early: 4e-6 at 0.95."""
    p = np.log(np.full((1, 32, 2), 0.5))
    gap = np.linspace(-0.98, -0.9, 32)
    q = np.stack([p[..., 0] + gap, np.log1p(-np.exp(p[..., 0] + gap))], axis=-1)
    p, q = p.astype(np.float32), q.astype(np.float32)
    expected = float((np.exp(p) * (p.astype(np.float64) - q)).sum(-1).mean()) / 2
    # Relative: float32 rounding of log-probabilities, 1e-7, over the term itself, 0.24.
    assert mean("kl", p, q) == pytest.approx(expected, rel=1e-6)


def test_textbook_js_is_bounded_by_log_two():
    far = np.zeros((1, 1, 2), np.float32)
    far[..., 0] = 200.0
    assert mean("js_textbook", far, -far) == pytest.approx(np.log(2), rel=1e-6)


def test_bfloat16_logits_are_scored_in_float32():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(1, 3, 5)), jnp.bfloat16) for _ in range(2))
    tokens = np.zeros((1, 3), np.int32)
    for name in DISTANCES:
        narrow = total(name, a, b, tokens)
        wide = total(name, a.astype(jnp.float32), b.astype(jnp.float32), tokens)
        assert narrow == wide, name


def test_angle_of_zero_vectors():
    zero, one = np.zeros((1, 1, 3), np.float32), np.ones((1, 1, 3), np.float32)
    assert mean("angular", zero, zero) == 0.0
    assert mean("angular", zero, one) == pytest.approx(np.pi / 2)


def test_perplexity_of_uniform_logits_is_the_vocabulary():
    logits, tokens = np.zeros((2, 4, 7), np.float32), np.ones((2, 4), np.int32)
    assert mean("perplexity", logits, logits, tokens) == pytest.approx(7, rel=1e-6)


@pytest.mark.parametrize("name", DISTANCES)
def test_positions_that_are_not_valid_have_no_terms(name):
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(rng.normal(size=(3, 6, 5)), jnp.float32) for _ in range(2))
    tokens, lengths = jnp.asarray(rng.integers(0, 5, (3, 6))), (6, 2, 4)
    valid = jnp.arange(6) < jnp.array(lengths)[:, None]
    whole = DISTANCES[name].total(a, jnp.where(valid[..., None], b, 9.0), tokens, valid)
    rows = [
        float(DISTANCES[name].total(a[i, None, :n], b[i, None, :n], tokens[i, None, :n], None))
        for i, n in enumerate(lengths)
    ]
    assert float(whole) == pytest.approx(sum(rows), rel=1e-5)


@pytest.mark.parametrize("name", COMPARING)
def test_outputs_of_whole_samples_are_those_of_one_position(name):
    rng = np.random.default_rng(2)
    a, b = (jnp.asarray(rng.normal(size=(3, 5)), jnp.float32) for _ in range(2))
    found = DISTANCES[name].total(a, b, None, None)
    want = DISTANCES[name].total(a[:, None], b[:, None], jnp.zeros((3, 1), jnp.int32), None)
    assert float(found) == pytest.approx(float(want), rel=1e-6)
