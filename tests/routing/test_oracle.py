"""The oracle over patterns, against a loop over all of them."""

import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import models, transform, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import LayerInputs
from ffnlab.models.cost import multiply_adds
from ffnlab.routing import OracleReport, duo, oracle, pattern_losses
from ffnlab.testing import batches, tiny, tiny_encoder


def made(**options: object) -> models.Decoder:
    """The tiny decoder as a duo."""
    return transform.apply(duo(ratio=8, seed=3, **options), tiny())[0]


@pytest.mark.parametrize("stacked", [False, True])
def test_losses_are_those_of_every_pattern_by_itself(stacked):
    model, tokens = made(skip=True), batches()[0]
    found = pattern_losses(models.stack(model) if stacked else model, tokens, memory=1)
    assert found.shape == (2, 11, 27)
    call = jax.jit(lambda choice: model(tokens[:, :-1], inputs=LayerInputs(choice=choice)))
    for i, pattern in enumerate(itertools.product(range(3), repeat=3)):
        choice = jnp.broadcast_to(jnp.array(pattern)[:, None, None], (3, 2, 11))
        nats = optax.softmax_cross_entropy_with_integer_labels(call(choice), tokens[:, 1:])
        near = {"atol": 2e-6, "rtol": 1e-6}  # some units in the last place of float32
        np.testing.assert_allclose(found[..., i], nats, **near, err_msg=str(pattern))


def test_layers_without_a_choice_take_part():
    model, tokens = made(where=tree.at("layers[1].ffn")), batches()[0]
    found = pattern_losses(model, tokens)
    assert found.shape == (2, 11, 2)
    big = optax.softmax_cross_entropy_with_integer_labels(tiny()(tokens[:, :-1]), tokens[:, 1:])
    np.testing.assert_allclose(found[..., 0], big, atol=1e-6)


def test_what_patterns_share_is_computed_once():
    """Attention once for each prefix, branches once for each prefix and choice."""
    model, tokens = made(), batches()[0]
    rows, t, width = 2, 11, 16
    attention = rows * t * (2 * width * 16 + 2 * width * 8 + 2 * 16 * t)
    branches = rows * t * 3 * width * (32 + 4)
    head = rows * t * width * 64
    expected = 7 * (attention + branches) + 8 * head
    assert multiply_adds(pattern_losses, model, tokens) == expected


LOSSES = np.array([[[4, 3, 2, 1], [1, 2, 3, 4]], [[2, 2, 2, 2], [5, 1, 6, 0]]], np.float32)
PATTERNS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])


def test_what_follows_from_losses_by_hand(monkeypatch):
    found = OracleReport(LOSSES, PATTERNS)
    assert found.oracle() == (1 + 1 + 2 + 0) / 4
    assert [found.oracle(b) for b in range(3)] == [7 / 4, (2 + 2 + 2 + 1) / 4, 12 / 4]
    assert [found.fixed(b) for b in range(3)] == [7 / 4, 8 / 4, 12 / 4]
    assert [found.mean(b) for b in range(3)] == [7 / 4, (8 + 13) / 8, 12 / 4]
    assert found.fixed() == 7 / 4 and found.mean() == (12 + 8 + 13 + 7) / 16
    np.testing.assert_array_equal(found.best(1), [[2, 1], [1, 1]])
    np.testing.assert_array_equal(found.gap(), [[0, 3], [0, 0]])
    # In the first layer tokens 1, 2, 3 of the four take the big branch: patterns 2, 1, 1, 1.
    np.testing.assert_array_equal(found.shares(1), [[0.5, 1], [0.5, 0]])
    np.testing.assert_array_equal(found.shares(1, choice=1), [[0.5, 0], [0.5, 1]])
    assert found.sampled(4) == found.oracle() and found.sampled(1, 0) == found.fixed(0)
    module = importlib.import_module("ffnlab.routing.oracle")
    monkeypatch.setattr(module, "DRAWS", 2000)  # of standard deviation .625
    assert found.sampled(1, 1) == pytest.approx(found.mean(1), abs=0.06)
    assert found.fixed() <= found.random(3) <= 13 / 4
    rows = found.rows()
    assert [row["patterns"] for row in rows] == [1, 2, 1]
    assert rows[1]["oracle"] == 7 / 4 and [("oracle of 2" in row) for row in rows] == [
        False,
        True,
        False,
    ]
    assert rows[1]["oracle of 2"] == 7 / 4


def test_inequalities_of_any_losses():
    model = made(skip=True)
    with_skip = oracle()(model, batches(), progress=False)
    plain = oracle()(made(), batches(), progress=False)
    for found in (with_skip, plain):
        for b in range(4):
            assert found.oracle() <= found.oracle(b) + 1e-7
            assert found.oracle(b) <= found.fixed(b) + 1e-7 <= found.mean(b) + 2e-7
            count = len(found.feasible(b))
            assert found.oracle(b) <= found.sampled(1 + count // 2, b) + 1e-7
        assert (found.gap() >= 0).all()
        assert found.oracle(3) == pytest.approx(found.figures()["big"], abs=1e-6)
    assert plain.oracle(0) == pytest.approx(plain.figures()["small"], abs=1e-6)
    assert with_skip.oracle() <= plain.oracle() + 1e-7


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="no choices"):
        oracle()(tiny(), batches(), progress=False)
    with pytest.raises(ConfigError, match="Decoder"):
        oracle()(tiny_encoder(), batches(), progress=False)
    for wrong in (jnp.full((2, 5), 64), jnp.zeros((2, 1), jnp.int32), jnp.zeros((2, 5))):
        with pytest.raises(ConfigError, match="token"):
            oracle()(made(), [wrong], progress=False)
    with pytest.raises(ConfigError, match="memory"):
        oracle(memory=0)
    config = models.DecoderConfig(
        vocab=4, width=2, hidden=2, layers=17, heads=1, kv_heads=1, head_dim=2
    )
    deep, _ = transform.apply(duo(ratio=2), models.Decoder(config, key=jax.random.key(0)))
    with pytest.raises(ConfigError, match="131072 patterns"):
        oracle()(deep, batches(), progress=False)
    found = OracleReport(LOSSES, PATTERNS)
    for call in (
        lambda: found.oracle(3),
        lambda: found.fixed(-1),
        lambda: found.of([2, 2]),
        lambda: found.random(0),
        lambda: found.sampled(3, 1),
        lambda: OracleReport(LOSSES, PATTERNS[:2]),
    ):
        with pytest.raises(ConfigError, match="accepted|none of|at least 1"):
            call()
