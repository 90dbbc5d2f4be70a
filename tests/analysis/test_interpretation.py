"""Answers as votes: against what is interpreted by hand, of rows, images and tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.analysis import after_embedding, interpret, interpretation, votes
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP
from ffnlab.models import ConvNetConfig
from ffnlab.testing import tiny


def test_rows_are_told_as_by_hand():
    net = MLP((5, 8, 3), key=jax.random.key(0))
    net = jax.tree.map(lambda leaf: leaf + 0.3 if leaf.ndim == 1 else leaf, net)  # biases
    x = jax.random.normal(jax.random.key(1), (6, 5))
    report = interpretation(inputs=4)(net, [(x[:2], np.zeros(2)), (x[2:], np.zeros(4))])
    assert report.count == 6 and len(report.inputs) == 4
    shares = []
    for i, row in enumerate(x):
        at = interpret(net, row)
        named = int(net(row).argmax())
        found = votes(at, named)
        shares.append(float(found.share))
        if i < 4:
            told = report.inputs[i]
            assert told.named == named and told.logit == pytest.approx(float(net(row)[named]))
            assert told.votes == pytest.approx(np.asarray(found.of), abs=1e-5)
            assert told.residual == pytest.approx(float(found.residual), abs=1e-5)
            assert told.votes.sum() + told.residual == pytest.approx(told.logit, abs=1e-5)
            assert report.rows()[i]["most votes"] == f"({int(np.argmax(found.of))})"
    assert report.share == pytest.approx(np.mean(shares), abs=1e-5)
    assert 0 < report.share < 1 and report.error < 1e-5
    tangent = interpretation(mode="tangent")(net, [x])
    assert tangent.inputs[0].votes == pytest.approx(report.inputs[0].votes, abs=1e-5)  # ReLU


def test_channels_of_an_image_vote_together():
    net = ConvNetConfig((2, 3, 4), 5).make(key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, 4, 4, 2))
    report = interpretation()(net, [x])
    at = interpret(lambda row: net(row[None])[0], x[2])
    parts = votes(at, int(net(x)[2].argmax())).of
    assert report.inputs[2].votes == pytest.approx(np.asarray(parts.sum(-1)), abs=1e-5)
    assert report.inputs[2].votes.shape == (4, 4)


@pytest.mark.slow
def test_tokens_vote_for_the_next_one():
    model = tiny()
    tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, model.config.vocab)
    report = interpretation()(model, [tokens])
    h = model.embed_tokens(tokens)[1]
    fn = after_embedding(model)
    assert np.asarray(fn(h)) == pytest.approx(np.asarray(model(tokens)[1, -1]), abs=1e-5)
    told = report.inputs[1]
    assert told.named == int(model(tokens)[1, -1].argmax()) and told.votes.shape == (7,)
    by_hand = votes(interpret(fn, h), told.named)
    assert told.votes == pytest.approx(np.asarray(by_hand.of.sum(-1)), abs=1e-4)


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="mode='chord' is not one of"):
        interpretation(mode="chord")
    with pytest.raises(ConfigError, match="inputs=0"):
        interpretation(inputs=0)
    net = MLP((3, 3), key=jax.random.key(0))
    with pytest.raises(ConfigError, match=r"an output is \[4, 3\]; a row of logits is accepted"):
        interpretation()(net, [jnp.ones((2, 4, 3))])
    with pytest.raises(ConfigError, match="inputs are int32; floating ones are accepted"):
        interpretation()(net, [jnp.ones((2, 3), jnp.int32)])
