"""An encoder of sound: masks, lengths, forms, positions; `transformers` in `formats`."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, transform, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import LayerInputs
from ffnlab.models import AudioEncoder, AudioEncoderConfig
from ffnlab.models.audio_encoder import abstract, sinusoids
from ffnlab.pruning import finercut
from ffnlab.testing import equal

CONFIG = AudioEncoderConfig(bands=5, width=16, hidden=24, layers=2, heads=4, max_positions=6)
FRAMES = jax.random.normal(jax.random.key(1), (2, 9, 5))
TOLERANCE = 1e-5  # the same sums in another order, float32; states of order 1
run = jax.jit(lambda model, frames, **given: model(frames, **given))


@functools.cache
def made():
    return AudioEncoder(CONFIG, key=jax.random.key(0))


def difference(a, b):
    return float(jnp.abs(a - b).max())


def test_every_other_frame_has_a_state():
    assert run(made(), FRAMES).shape == (2, 5, 16)
    assert run(made(), FRAMES[:, :8]).shape == (2, 4, 16)
    assert run(made(), FRAMES[:, :1]).shape == (2, 1, 16)


def test_frames_behind_the_end_count_for_nothing():
    valid = jnp.arange(9) < jnp.array([9, 4])[:, None]
    out = run(made(), FRAMES, valid=valid)
    spoilt = jnp.where(valid[..., None], FRAMES, jnp.nan)
    assert difference(run(made(), spoilt, valid=valid)[0], out[0]) == 0
    assert difference(run(made(), spoilt, valid=valid)[1, :2], out[1, :2]) == 0
    alone = run(made(), FRAMES[1:, :4])
    assert difference(out[1, :2], alone[0]) < TOLERANCE
    assert difference(run(made(), FRAMES)[1, 0], out[1, 0]) > 1e-3, "all see all"


def test_positions_are_sinusoids():
    table = sinusoids(7, 6)
    for p in range(7):
        for i in range(3):
            angle = p / 10_000 ** (i / 2)
            assert table[p, i] == pytest.approx(math.sin(angle), abs=1e-12)
            assert table[p, 3 + i] == pytest.approx(math.cos(angle), abs=1e-12)
    trained, _ = tree.trained(made())
    assert jax.tree.leaves(trained.positions) == []
    assert difference(made().positions.get_value().dense(), sinusoids(6, 16)) < 1e-6
    turned = run(made(), FRAMES[:, ::-1])[:, ::-1]
    assert difference(turned, run(made(), FRAMES)) > 1e-2


def test_forms_gates_and_removed_sublayers():
    model = made()
    stacked = models.stack(model)
    assert equal(models.unstack(stacked), model)
    assert difference(run(stacked, FRAMES), run(model, FRAMES)) < TOLERANCE
    gates = jnp.ones((2, 2)).at[1, 0].set(0)
    gated = run(model, FRAMES, inputs=LayerInputs(gates=gates))
    assert difference(run(models.remove(model, [2]), FRAMES), gated) < TOLERANCE
    h, outputs = model.run(FRAMES, branches=True)
    assert outputs.branches.shape == (2, 2, 2, 5, 16)
    cut, _ = transform.apply(finercut(remove=1, distance="norm"), model, [np.asarray(FRAMES)])
    assert len(models.removed(cut)) == 1


def test_the_abstract_model_is_the_made_one():
    found = abstract(CONFIG)
    want = jax.eval_shape(lambda key: AudioEncoder(CONFIG, key=key), jax.random.key(0))
    assert jax.tree.structure(found) == jax.tree.structure(want)
    assert jax.tree.leaves(found) == jax.tree.leaves(want)


@pytest.mark.parametrize(
    ("frames", "valid", "told"),
    [
        (FRAMES[..., :4], None, r"frames \(2, 9, 4\); \[b, 1..12, 5\]"),
        (jnp.zeros((1, 13, 5)), None, r"\(1, 13, 5\)"),
        (jnp.zeros((1, 0, 5)), None, r"\(1, 0, 5\)"),
        (FRAMES, jnp.ones((2, 8), bool), r"valid \(2, 8\); \(2, 9\)"),
    ],
)
def test_sounds_that_are_refused(frames, valid, told):
    with pytest.raises(ConfigError, match=told):
        made()(frames, valid=valid)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bands": 0}, "bands=0"),
        ({"width": 6}, "width=6 must be even, at least 4, and a multiple of heads=4"),
        ({"activation": "swish"}, "activation='swish'"),
    ],
)
def test_configurations_that_are_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        dataclasses.replace(CONFIG, **change)
