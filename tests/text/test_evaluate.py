"""Perplexity: against a token at a time, and against closed forms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import tree
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.text.evaluate import nats_of, perplexity

CONFIG = DecoderConfig(
    vocab=30, width=16, hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, max_positions=32
)
TOKENS = np.random.default_rng(0).integers(0, 30, 23)


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, key=jax.random.key(0))


forward = jax.jit(lambda model, tokens: model(tokens))


def token_by_token(model, tokens, window, stride):
    """-ln p of each token from a forward pass over exactly the context its window gives it."""
    total = 0.0
    for target in range(1, len(tokens)):
        late = max(0, target - window)  # windows that had to start later
        start = -(-late // stride) * stride
        padded = np.zeros((1, window), np.int32)
        padded[0, : target - start] = tokens[start:target]
        logits = np.asarray(forward(model, padded)[0, target - start - 1], np.float64)
        total -= logits[tokens[target]] - np.log(np.exp(logits).sum())
    return total


@pytest.mark.parametrize(
    ("window", "stride", "batch"), [(8, 3, 1), (8, 8, 2), (8, 1, 4), (8, 5, 3), (32, 16, 1)]
)
def test_equals_a_forward_pass_per_token(model, window, stride, batch):
    report = perplexity(model, TOKENS, window=window, stride=stride, batch=batch, nbytes=50)
    expected = token_by_token(model, TOKENS, window, stride)
    # Float32 logits, summed in another order.
    assert math.isclose(report.nats, expected, rel_tol=1e-5)
    assert report.tokens == len(TOKENS) - 1
    assert math.isclose(report.nats_per_token, expected / 22, rel_tol=1e-5)
    assert math.isclose(report.perplexity, math.exp(expected / 22), rel_tol=1e-5)
    assert math.isclose(report.bits_per_byte, expected / math.log(2) / 50, rel_tol=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(model):
    flat = jax.tree.map(jnp.zeros_like, model)
    report = perplexity(flat, TOKENS, window=8)
    assert math.isclose(report.perplexity, 30, rel_tol=1e-5)
    assert report.bits_per_byte is None
    assert "perplexity 30.0" in str(report)
    assert (report.window, report.stride) == (8, 4)


def test_bytes_are_ids(model):
    text = bytes(TOKENS.tolist())
    assert perplexity(model, text, window=8) == perplexity(model, TOKENS, window=8)


def test_compiles_once_whatever_the_length(model):
    perplexity(model, TOKENS, window=7, stride=7, batch=2)
    before = nats_of._cache_size()
    perplexity(model, TOKENS[:9], window=7, stride=2, batch=2)
    assert nats_of._cache_size() == before


def test_unlikely_text_overflows_to_infinity_and_nan_is_an_error(model):
    larger = functools.partial(jax.tree.map, lambda x: x * 1e4)
    sure = tree.map_at(model, tree.at("embed"), larger)
    assert perplexity(sure, TOKENS, window=8).perplexity == math.inf
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), model)
    with pytest.raises(NumericalError, match="NaN"):
        perplexity(broken, TOKENS, window=8)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (TOKENS[:1], {}, "at least 2"),
        (np.array([1, 30]), {}, r"holds ids 1\.\.30; the model has 0\.\.29"),
        (TOKENS, {"window": 33}, r"window=33 must lie in 1\.\.32"),
        (TOKENS, {"window": 8, "stride": 9}, r"stride=9 must lie in 1\.\.8"),
        (TOKENS, {"stride": 0}, "stride=0"),
        (TOKENS, {"batch": 0}, "batch=0"),
    ],
)
def test_bad_arguments_are_named(model, tokens, options, message):
    with pytest.raises(ConfigError, match=message):
        perplexity(model, tokens, **options)
