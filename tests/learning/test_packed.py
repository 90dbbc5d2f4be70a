"""The packed loss is that of each document alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ffnlab.data import PackedBatches
from ffnlab.learning import backprop, packed_next_token
from ffnlab.testing import tiny

# Compiled: op by op, the pieces of each length take some hundred programs.
loss_of = jax.jit(packed_next_token)


@jax.jit
def nats_of(model, piece):
    """Of one document, [1, t]: the sum over its tokens but the first."""
    logits = model(piece[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, piece[:, 1:]).sum()


def test_rows_are_scored_as_their_documents_alone(key):
    model = tiny(key)
    vocab = model.config.vocab
    random = np.random.default_rng(0)
    documents = [random.integers(0, vocab, size) for size in (5, 2, 9, 1, 7, 4)]
    batch = jax.tree.map(jnp.asarray, PackedBatches(documents, 2, 11)(0))
    found, metrics = loss_of(model, batch)
    nats, count = 0.0, 0
    for row, segments in zip(np.asarray(batch.tokens), np.asarray(batch.segments), strict=True):
        for segment in np.unique(segments):
            piece = jnp.asarray(row[segments == segment])[None]
            if piece.shape[1] > 1:
                nats, count = nats + float(nats_of(model, piece)), count + piece.size - 1
    assert 0 < count < batch.tokens[:, 1:].size  # borders are not predicted
    np.testing.assert_allclose(found, nats / count, rtol=1e-5)
    np.testing.assert_allclose(metrics["bits"], found / np.log(2), rtol=1e-6)


def test_a_row_of_lone_tokens_costs_nothing(key):
    batch = PackedBatches([np.array([i]) for i in range(6)], 1, 3)(0)
    loss, _ = loss_of(tiny(key), jax.tree.map(jnp.asarray, batch))
    assert float(loss) == 0


def test_packed_rows_train(key):
    rule = backprop(packed_next_token, optax.adam(1e-2))
    batches = PackedBatches([np.arange(8), np.arange(8, 0, -1)], 1, 10)
    state, losses = rule.init(tiny(key), key), []
    for position in range(12):
        state, metrics = rule.step(state, jax.tree.map(jnp.asarray, batches(position % 1)))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
