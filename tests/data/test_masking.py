"""Tokens hidden and found: how many, which, what they become, and the windows of a text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.data import MaskedBatches, Masking, TextBatches, masked_windows, masking_of
from ffnlab.errors import ConfigError, FFNLabError
from ffnlab.formats import Tokenizer
from ffnlab.parallel import held_out_masked

RULE = Masking(mask=99, size=50, special=(0, 99), first=(1,), last=(2, 3))


def test_shares_are_those_of_the_paper():
    rows = np.arange(4, 44)[None].repeat(2000, 0)
    hidden, targets = RULE.draw(rows, np.random.default_rng(0))
    chosen = targets >= 0
    # Four standard deviations of 80,000 draws, and of the 12,000 that are chosen.
    assert chosen.mean() == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / 80_000) ** 0.5)
    np.testing.assert_array_equal(targets[chosen], rows[chosen])
    np.testing.assert_array_equal(hidden[~chosen], rows[~chosen])
    became = hidden[chosen]
    kept = became == rows[chosen]
    for share, found in (
        (0.8, became == 99),
        (0.1 + 0.1 / 50, kept),
        (0.098, ~kept & (became < 50)),
    ):
        assert found.mean() == pytest.approx(share, abs=4 * (share * (1 - share) / 12_000) ** 0.5)
    assert set(became[~kept & (became < 50)].tolist()) > {0, 1, 49}, "any token of the vocabulary"


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 49), min_size=1, max_size=60),
    st.integers(4, 12),
    st.integers(0, 2**32 - 1),
)
def test_windows_hold_every_token_once(text, length, seed):
    tokens = np.array(text, np.int32)
    counted = np.random.default_rng(seed).random(len(text)) < 0.9
    rule = Masking(99, 50, (0, 99), (1,), (2, 3), share=1.0)
    if not (counted & (tokens > 0)).any():
        with pytest.raises(ConfigError, match="none of which is hidden"):
            masked_windows(tokens, length, rule, counted)
        return
    found = masked_windows(tokens, length, rule, counted)
    assert found.tokens.shape[1] == length
    inside = np.s_[:, 1 : length - 2]
    assert (found.tokens[:, 0] == 1).all() and (found.tokens[:, -2:] == [2, 3]).all()
    ends = np.ones(length, bool)
    ends[1 : length - 2] = False
    assert (found.targets[:, ends] == -1).all() and found.valid[:, ends].all()
    valid = found.valid[inside].ravel()
    assert valid.sum() == len(text) and valid[: len(text)].all()
    targets = found.targets[inside].ravel()[: len(text)]
    np.testing.assert_array_equal(targets, np.where(counted & (tokens > 0), tokens, -1))
    np.testing.assert_array_equal(
        found.tokens, masked_windows(tokens, length, rule, counted).tokens
    )


def test_batches_are_framed_rows_drawn_by_position():
    text = np.arange(4, 49, dtype=np.int32).repeat(20)
    batches = MaskedBatches(TextBatches(text, batch=4, length=10, seed=3), RULE)
    hidden, targets = batches(5)
    assert hidden.shape == targets.shape == (4, 10)
    rows = np.where(targets >= 0, targets, hidden)
    np.testing.assert_array_equal(rows[:, 1:-2], TextBatches(text, 4, 10, 3)(5)[:, :7])
    assert (rows[:, 0] == 1).all() and (rows[:, -2:] == [2, 3]).all()
    for one, other in zip(batches(5), batches(5), strict=True):
        np.testing.assert_array_equal(one, other)
    parts = [batches.part(i, 2)(5) for i in range(2)]
    for whole, *pieces in zip((hidden, targets), *parts, strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(pieces))
    later = MaskedBatches(TextBatches(text[::-1], 4, 10, 3), RULE)(6)[1]
    assert ((later >= 0) != (targets >= 0)).any(), "another position, another draw"


def test_the_mask_of_a_tokenizer():
    rule = masking_of(Tokenizer.bytes(), 257)
    assert (rule.mask, rule.size, rule.special) == (256, 256, (0, 256))
    assert (rule.first, rule.last) == ((0,), ())
    with pytest.raises(ConfigError, match="vocab=256: the model has no token for the mask"):
        masking_of(Tokenizer.bytes(), 256)


def test_what_is_not_taken():
    with pytest.raises(ConfigError, match=r"share=1.5 must lie in 0..1"):
        Masking(1, 2, share=1.5)
    with pytest.raises(ConfigError, match="length=3 leaves no token between the 3"):
        masked_windows(np.arange(9), 3, RULE)
    with pytest.raises(ConfigError, match="length=3 leaves no token"):
        MaskedBatches(TextBatches(np.arange(90), 2, 3), RULE)
    with pytest.raises(FFNLabError, match="does not divide"):
        MaskedBatches(TextBatches(np.arange(90), 3, 8), RULE).part(0, 2)


def test_bits_of_a_known_model():
    windows = masked_windows(np.arange(4, 40, dtype=np.int32), 9, RULE)
    table = np.random.default_rng(1).normal(size=(100, 100)).astype(np.float32)
    bits, found = held_out_masked(lambda x: table[np.asarray(x["tokens"])], windows, rows=4)
    logits = table[windows.tokens].astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = windows.targets >= 0
    own = logp[at, windows.targets[at]]
    assert bits == pytest.approx(-own.mean() / np.log(2), rel=1e-5)
    assert found == pytest.approx((logits.argmax(-1) == windows.targets)[at].mean())
