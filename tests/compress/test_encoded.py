"""Encoders as a job's task: scores against NumPy, costs by hand, what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.compress import EncoderTask, Text
from ffnlab.data import masked_windows, masking_of
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.formats import Tokenizer
from ffnlab.models import Encoder, EncoderConfig, account
from ffnlab.models.encoder import sentence_vectors
from ffnlab.recipes import Calibration, Evaluation, parse_recipe
from ffnlab.testing import tiny

TEXT = Text(b"a bad cab. " * 9, b"deaf bees feed. " * 6, "words", "by hand")
CONFIG = {"vocab": 257, "width": 8, "hidden": 12, "layers": 1, "heads": 2, "head_dim": 4}
EVALUATION = Evaluation(tokens=0, window=10, batch=3)


@pytest.fixture(scope="module", params=["masked", None])
def model(request):
    config = EncoderConfig(**CONFIG, max_positions=12, head=request.param)
    return Encoder(config, key=jax.random.key(0))


@pytest.fixture(scope="module")
def task(model):
    return EncoderTask.of(model, Tokenizer.bytes(), TEXT)


def test_scores_are_those_of_the_rows(model, task):
    rows = task.held_out(model, EVALUATION)
    found = task.quality(model, rows, 3, label="x")
    assert list(found) == [score.name for score in task.scores] and task.axis in found
    # 96 bytes, of which the first is context alone; a row has nine behind its NUL.
    assert rows.tokens.shape == (11, 10) and rows.valid.sum() == 96 + 11
    if model.config.head is None:
        assert (rows.targets == -1).all() and found["cosine"] == pytest.approx(1, abs=1e-6)
        other = Encoder(model.config, key=jax.random.key(1))
        vectors = [
            np.asarray(
                sentence_vectors(
                    m.hidden(jnp.asarray(rows.tokens), valid=jnp.asarray(rows.valid)),
                    jnp.asarray(rows.valid),
                )
            )
            for m in (model, other)
        ]
        wanted = (vectors[0] * vectors[1]).sum(1).mean()
        assert task.quality(other, rows, 3, label="x")["cosine"] == pytest.approx(wanted, abs=1e-6)
        return
    again = masked_windows(
        np.frombuffer(TEXT.held_out, np.uint8).astype(np.int32),
        10,
        masking_of(Tokenizer.bytes(), 257),
        np.arange(96) > 0,
    )
    np.testing.assert_array_equal(rows.targets, again.targets)
    inputs = {"tokens": jnp.asarray(rows.tokens), "valid": jnp.asarray(rows.valid)}
    logits = np.asarray(model(**inputs), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = rows.targets >= 0
    bits = -logp[at, rows.targets[at]].mean() / np.log(2)
    assert found["bits_per_token"] == pytest.approx(bits, rel=1e-5)
    assert found["found"] == (logits.argmax(-1) == rows.targets)[at].mean()
    assert task.counts(rows) == {"tokens": 107, "windows": 11, "hidden": at.sum()}


def test_costs_are_of_one_token_in_a_row(model, task):
    rows = task.held_out(model, EVALUATION)
    cost = task.cost(model, model, rows, 3)
    # Four maps and scores and sums of attention over ten tokens, the FFN, and the head's products.
    products = 4 * 8 * 8 + 2 * 10 * 8 + 2 * 8 * 12
    products += 8 * 8 + 8 * 257 if model.config.head == "masked" else 0
    assert cost.flops == 2 * products and cost.cache_bytes == 0
    assert (cost.parameters, cost.nbytes) == (account.parameters(model), account.nbytes(model))


def test_rows_that_calibrate_are_whole_batches_of_training_text(model, task):
    batches = task.calibration(model, Calibration(tokens=40, window=10, batch=2))
    assert [b["tokens"].shape for b in batches] == [(2, 10)] * 2
    assert all(set(b) == {"tokens", "valid"} and (b["tokens"][:, 0] == 0).all() for b in batches)
    with pytest.raises(ConfigError, match="words gives 11 windows of 10 tokens"):
        task.calibration(model, Calibration(tokens=200, window=10, batch=12))
    assert task.held_out(model, Evaluation(tokens=0, window=500)).tokens.shape[1] == 12
    assert len(task.held_out(model, Evaluation(tokens=25, window=10)).tokens) == 3


def test_what_does_not_fit(model, task):
    recipe = parse_recipe('[[stage]]\ntransform = "nearest"')
    with pytest.raises(ConfigError, match="model is a Decoder; an Encoder is accepted"):
        task.problems(tiny(), recipe)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, model)
    with pytest.raises(NumericalError, match="the model is broken at this point"):
        task.quality(broken, task.held_out(model, EVALUATION), 3, label="x")
    empty = EncoderTask.of(model, Tokenizer.bytes(), Text(b"", b"", "none", "-"))
    with pytest.raises(ConfigError, match="none has no tokens"):
        empty.held_out(model, EVALUATION)
