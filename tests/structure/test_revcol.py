"""The loss of reversible columns, and the error of their gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import models
from ffnlab.data import Labelled, as_images, digits
from ffnlab.errors import ConfigError
from ffnlab.learning import backprop
from ffnlab.losses import Moment, labelled
from ffnlab.models import ImageInput, RevCol, RevColConfig, keep_invertible
from ffnlab.structure import gradient_error, supervised
from ffnlab.structure.revcol import saving
from ffnlab.testing import tiny
from tests.models.test_revcol import SMALL

SUPERVISED = dataclasses.replace(SMALL, supervision=True, image=(4, 4), drop=0.5)
BATCH = (jax.random.uniform(jax.random.key(0), (3, 4, 4, 1)), jnp.array([0, 1, 2]))
MOMENT = Moment(jnp.int32(0), jax.random.key(1))


@functools.cache
def model():
    return models.stack(RevCol(SUPERVISED, key=jax.random.key(0)))


@pytest.mark.slow
def test_the_loss_is_the_sum_that_its_formula_says():
    outputs = jax.jit(lambda m, x, key: m.outputs(x, key=key))(model(), BATCH[0], MOMENT.key)
    pixels = np.clip(np.asarray(BATCH[0], float), 0.01, 0.99)

    def bce(logits):
        p = 1 / (1 + np.exp(-np.asarray(logits, float)))
        return -(pixels * np.log(p) + (1 - pixels) * np.log(1 - p)).mean()

    def ce(scores):
        return -jax.nn.log_softmax(scores)[jnp.arange(3), BATCH[1]].mean()

    nats, images = [float(ce(s)) for s in outputs.scores], [bce(i) for i in outputs.images]
    assert len(nats) == 4 and len(images) == 3
    for f, c in ((3.0, 0.7), (0.5, 0.0)):
        want = nats[3] + f * (images[0] + 2 / 3 * images[1] + 1 / 3 * images[2])
        want += c * (nats[0] / 4 + nats[1] / 2 + 3 / 4 * nats[2])
        found, metrics = jax.jit(supervised(image=f, classes=c))(model(), BATCH, MOMENT)
        assert float(found) == pytest.approx(want, abs=1e-5)
        assert float(metrics["image"]) == pytest.approx(np.mean(images), abs=1e-5)
        assert float(metrics["classes"]) == pytest.approx(nats[3], abs=1e-5)
    other = Moment(MOMENT.step, jax.random.key(2))
    assert jax.jit(supervised())(model(), BATCH, other)[0] != found, "examples skip blocks"


def test_without_supervision_it_is_the_cross_entropy():
    alone = RevCol(dataclasses.replace(SMALL, image=(4, 4)), key=jax.random.key(0))
    found, metrics = jax.jit(supervised())(alone, BATCH, MOMENT)
    assert float(found) == pytest.approx(float(jax.jit(labelled)(alone, BATCH)[0]), abs=1e-6)
    assert set(metrics) == {"accuracy", "classes"}


@pytest.mark.slow
def test_the_error_of_gradients_is_that_of_rebuilding():
    config = dataclasses.replace(SMALL, image=(4, 4), columns=5, save_every=4, tolerance=1.0)
    deep = models.stack(RevCol(config, key=jax.random.key(0)))
    found = gradient_error(deep, BATCH)
    assert 0 < found < 1e-4
    assert gradient_error(saving(deep, 0), BATCH) == 0
    assert saving(deep, 0, remat="nothing").remat == "nothing" and deep.config.save_every == 4


@pytest.mark.slow
def test_norms_of_zeros_make_features_of_rounding():
    """Black backgrounds are rebuilt where a mean is taken off them, and only there."""
    images = jnp.where(jnp.arange(8)[None, :, None, None] < 4, 0.0, 1.0) * jax.random.uniform(
        jax.random.key(0), (3, 8, 8, 1)
    )
    config = dataclasses.replace(SMALL, columns=5, save_every=4, patch=1)
    found = {}
    for mean in ((), (0.3,)):
        how = ImageInput(mean, (0.35,) * len(mean))
        made = RevCol(dataclasses.replace(config, preprocess=how), key=jax.random.key(0))
        found[mean] = gradient_error(models.stack(made), (images, BATCH[1]))
    assert found[()] > 1e-3 and found[0.3,] < 1e-4


def test_what_is_refused():
    with pytest.raises(ConfigError, match="image=-1.0 must be 0 or more"):
        supervised(image=-1.0)
    with pytest.raises(ConfigError, match="classes=nan must be 0 or more"):
        supervised(classes=float("nan"))
    with pytest.raises(ConfigError, match="model is a Decoder; a RevCol is accepted"):
        supervised()(tiny(), BATCH, MOMENT)


@pytest.mark.slow
def test_rebuilt_and_plain_columns_learn_alike():
    """The card's: 4 columns, 100 steps, losses within 1e-3; every gradient finite."""
    train, _ = (as_images(part) for part in digits())
    config = RevColConfig(
        (8, 8), (8, 12, 16, 24), (1, 1, 1, 1), 4, 10, channels=1, patch=1, supervision=True
    )
    losses = {}
    for every in (0, 1):
        drawn = models.stack(RevCol(config, key=jax.random.key(0)))
        optimizer = optax.chain(optax.sgd(0.02), keep_invertible())
        rule = backprop(supervised(), optimizer, informed=True)
        state = rule.init(saving(drawn, every), jax.random.key(0))
        losses[every] = []
        for step in range(100):
            part = slice(8 * step, 8 * step + 8)
            state, metrics = rule.step(state, Labelled(train.x[part], train.y[part]))
            assert np.isfinite(float(metrics["gradient_norm"]))
            losses[every].append(float(metrics["loss"]))
    assert np.abs(np.subtract(losses[0], losses[1])).max() < 1e-3
    assert losses[1][-1] < losses[1][0]
