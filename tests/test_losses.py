"""Losses against sums written out; packed rows against their documents alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax, softmax

from ffnlab import models
from ffnlab.data import PackedBatches
from ffnlab.errors import ConfigError
from ffnlab.layers import MoESpec, balance
from ffnlab.learning import backprop
from ffnlab.losses import (
    Taught,
    distillation,
    distilled,
    labelled,
    masked,
    next_token,
    packed_next_token,
    routed,
    span,
)
from ffnlab.parallel import make_step, parse_mesh, place_batch, shard
from ffnlab.testing import batches, tiny

# Sums of a few float32 terms in another order.
CLOSE = {"rtol": 2e-6, "atol": 1e-7}


def drawn(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


# Compiled: op by op, the pieces of each length take some hundred programs.
loss_of = jax.jit(packed_next_token)


@jax.jit
def nats_of(model, piece):
    """Of one document, [1, t]: the sum over its tokens but the first."""
    logits = model(piece[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, piece[:, 1:]).sum()


def test_next_token_is_the_cross_entropy():
    table = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1 / 3, 1 / 3, 1 / 3]]))
    nats, metrics = next_token(lambda tokens: table[tokens], jnp.array([[0, 1, 1], [0, 0, 2]]))
    expected = -np.log([0.25, 0.8, 0.5, 0.25]).mean()
    np.testing.assert_allclose(nats, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["bits"], expected / np.log(2), rtol=1e-6)


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


def test_labelled_is_the_cross_entropy_of_any_inputs():
    logits, classes = drawn(3, 4), np.array([2, 0, 3])
    inputs = {"ids": jnp.arange(3), "scale": jnp.ones((3, 1, 2))}
    found, metrics = labelled(
        lambda x: jnp.asarray(logits) * x["scale"][:, :, 0], (inputs, classes)
    )
    rows = log_softmax(logits, -1)[range(3), classes]
    np.testing.assert_allclose(found, -rows.mean(), **CLOSE)
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(-1) == classes).mean())


def test_shares_of_classes_are_targets_too():
    logits = jax.random.normal(jax.random.key(0), (5, 3))
    classes = jnp.array([0, 2, 1, 1, 0])
    hard, metrics = labelled(lambda x: x, (logits, classes))
    hot, same = labelled(lambda x: x, (logits, jax.nn.one_hot(classes, 3)))
    np.testing.assert_allclose(hot, hard, rtol=1e-6)
    assert same["accuracy"] == metrics["accuracy"]
    shares = jnp.array([[0.7, 0.3, 0.0]] * 5)
    soft, told = labelled(lambda x: x, (logits, shares))
    wanted = -(0.7 * jax.nn.log_softmax(logits)[:, 0] + 0.3 * jax.nn.log_softmax(logits)[:, 1])
    np.testing.assert_allclose(soft, wanted.mean(), rtol=1e-6)
    assert told["accuracy"] == jnp.mean(logits.argmax(-1) == 0)


def test_a_span_costs_half_of_both_ends_and_rows_without_one_nothing():
    logits, ends = drawn(4, 5, 2), np.array([[0, 4], [2, 2], [-1, 3], [1, 3]])
    logits[1, 2] += 9  # exact; of the last row the start alone is
    logits[3, 1, 0] += 9
    found, metrics = span(lambda x: x, (jnp.asarray(logits), ends))
    each = [
        -(log_softmax(row[:, 0])[a] + log_softmax(row[:, 1])[b]) / 2
        for row, (a, b) in zip(logits, ends, strict=True)
        if a >= 0
    ]
    assert logits[0, :, 0].argmax() != 0
    np.testing.assert_allclose(found, np.mean(each), **CLOSE)
    np.testing.assert_allclose(metrics["exact"], 1 / 3, rtol=1e-6)
    assert metrics["count"] == 3
    nothing, metrics = span(lambda x: x, (jnp.asarray(logits), np.full((4, 2), -1)))
    assert nothing == 0 and metrics["count"] == 0
    with pytest.raises(ValueError, match=r"logits \(4, 5, 3\); a span needs \[b, t, 2\]"):
        span(lambda x: jnp.zeros((4, 5, 3)), (jnp.asarray(logits), ends))


def test_masked_tokens_alone_are_counted():
    logits, targets = drawn(2, 4, 3), np.array([[-100, 2, -1, 0], [1, -100, -100, -1]])
    found, metrics = masked(lambda x: x, (jnp.asarray(logits), targets))
    places = [(i, j) for i in range(2) for j in range(4) if targets[i, j] >= 0]
    nats = np.mean([-log_softmax(logits[at])[targets[at]] for at in places])
    right = np.mean([logits[at].argmax() == targets[at] for at in places])
    np.testing.assert_allclose(found, nats, **CLOSE)
    np.testing.assert_allclose(metrics["bits"], nats / np.log(2), **CLOSE)
    np.testing.assert_allclose(metrics["accuracy"], right, **CLOSE)
    assert metrics["count"] == 3
    assert masked(lambda x: x, (jnp.asarray(logits), np.full((2, 4), -1)))[0] == 0


@pytest.mark.parametrize("loss", [span, masked])
def test_parts_weighed_by_their_counts_are_the_batch(loss):
    logits = drawn(4, 5, 2)
    targets = np.array([[0, 1, -1, -1, -1], [1, 1, 1, 1, 0], [-1] * 5, [0, 0, 1, 1, 1]])
    targets = targets if loss is masked else targets[:, :2]
    whole, metrics = loss(lambda x: x, (jnp.asarray(logits), targets))
    parts = [loss(lambda x: x, (jnp.asarray(logits[i::2]), targets[i::2])) for i in range(2)]
    counts = np.array([float(figures["count"]) for _, figures in parts])
    assert counts[0] != counts[1] and counts.sum() == metrics["count"]
    np.testing.assert_allclose(whole, counts @ [mean for mean, _ in parts] / counts.sum(), **CLOSE)


@pytest.mark.parametrize(("reduction", "parts"), [("batchmean", 3), ("mean", 3 * 4)])
def test_distillation_is_the_divergence_from_the_teacher(reduction, parts):
    student, teacher = drawn(2, 3, 4)
    options = {"temperature": 4.0, "reduction": reduction}
    q, p = softmax(teacher / 4, -1), log_softmax(student / 4, -1)
    wanted = 16 * (q * (np.log(q) - p)).sum() / parts
    far = lambda s, t: distillation(s, t, **options)  # noqa: E731
    found, (of_student, of_teacher) = jax.value_and_grad(far, (0, 1))(
        jnp.asarray(student), jnp.asarray(teacher)
    )
    np.testing.assert_allclose(found, wanted, **CLOSE)
    # d/dz of T^2 sum q (log q - log p) is T (p - q).
    np.testing.assert_allclose(of_student, 4 * (np.exp(p) - q) / parts, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(of_teacher, np.zeros_like(teacher))


def test_a_teacher_may_exclude_classes():
    teacher = jnp.array([[0.0, -jnp.inf, 0.0]])
    found, gradient = jax.value_and_grad(lambda s: distillation(s, teacher))(jnp.zeros((1, 3)))
    np.testing.assert_allclose(found, np.log(3 / 2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[1 / 3 - 1 / 2, 1 / 3, 1 / 3 - 1 / 2]], rtol=1e-6)


def test_distilled_weighs_classes_and_teacher():
    student, teacher = drawn(2, 3, 4)
    batch = Taught(jnp.asarray(student), np.array([1, 0, 3]), teacher)
    loss = distilled(temperature=4.0, weight=0.9)
    found, metrics = loss(lambda x: x, batch)
    nats, figures = labelled(lambda x: x, batch[:2])
    far = distillation(jnp.asarray(student), teacher, temperature=4.0)
    np.testing.assert_allclose(found, 0.1 * nats + 0.9 * far, **CLOSE)
    assert (metrics["labels"], metrics["teacher"]) == (nats, far)
    assert metrics["accuracy"] == figures["accuracy"]
    through = jax.grad(lambda t: loss(lambda x: x, batch._replace(logits=t))[0])
    np.testing.assert_array_equal(through(jnp.asarray(teacher)), np.zeros_like(teacher))


def test_distillation_refuses():
    student = jnp.zeros((2, 3))
    for other in (jnp.zeros((2, 4)), jnp.zeros((1, 3))):
        with pytest.raises(ValueError, match=r"student has logits \(2, 3\) and teacher"):
            distillation(student, other)
    for options, message in (
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"temperature": float("nan")}, "temperature=nan must be positive"),
        ({"temperature": float("inf")}, "temperature=inf must be positive and finite"),
        ({"reduction": "sum"}, "reduction='sum' is not one of"),
        ({"weight": 1.5}, "weight=1.5 must lie in"),
    ):
        with pytest.raises(ConfigError, match=message):
            distilled(**options)


def test_a_scheduled_temperature_is_one_program():
    far = jax.jit(lambda t: distillation(jnp.eye(3), 2 * jnp.eye(3), temperature=t))
    for t in (1.0, 2.0):
        wanted = distillation(jnp.eye(3), 2 * jnp.eye(3), temperature=t)
        np.testing.assert_allclose(far(t), wanted, rtol=1e-6)


EXPERTS = MoESpec(experts=4, k=2, hidden=8)


def mixture():
    """Two layers of four experts each."""
    config = dataclasses.replace(tiny().config, layers=2, mixture=EXPERTS)
    return models.Decoder(config, key=jax.random.key(1))


def test_a_routed_loss_adds_balance_and_z():
    model, batch = mixture(), batches()[0]

    @jax.jit
    def both(model, batch):
        nats, _ = next_token(model, batch)
        found = model.run(batch[:, :-1])[1].reports["ffn"]
        parts = nats, balance.load_balance(found), balance.z_loss(found)
        return parts, routed(balance=0.3, z=0.2)(model, batch)

    (nats, uneven, large), (loss, metrics) = both(model, batch)
    np.testing.assert_allclose(loss, nats + 0.3 * uneven + 0.2 * large, rtol=1e-5)
    np.testing.assert_allclose([metrics["balance"], metrics["z"]], [uneven, large], rtol=1e-5)
    assert metrics["unrouted"] == 0 and "bits" in metrics
    with pytest.raises(ConfigError, match="model reports no routing"):
        jax.eval_shape(routed(), tiny(), batch)
    with pytest.raises(ConfigError, match="balance=-1.0"):
        routed(balance=-1.0)


@pytest.mark.slow
def test_a_mixture_learns_on_a_mesh_as_on_one_device():
    batch = np.asarray(jnp.concatenate(batches()))
    found = []
    for text in ("dp=1", "dp=2,ep=2"):
        mesh = parse_mesh(text)
        rule = backprop(routed(), optax.sgd(0.1))
        step, state = make_step(rule, mesh), shard(rule.init(mixture(), jax.random.key(0)), mesh)
        state, metrics = step(state, place_batch(batch, mesh))
        found.append((jax.device_get(jax.tree.leaves(rule.model(state))), metrics["loss"]))
    for one, other in zip(*(leaves for leaves, _ in found), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5)  # float32 sums in another order
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-5)
    devices = [metrics[f"load.device_{i}"] for i in range(2)]
    assert sum(devices) == pytest.approx(1) and "load.device_2" not in metrics
    assert devices[0] == pytest.approx(sum(metrics[f"load.expert_{i}"] for i in range(2)))
