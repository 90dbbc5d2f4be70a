"""Rows of features of sounds, from log-mel patches and from an encoder; questions in bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.data import FeatureCache, asked, log_mel, sound_rows
from ffnlab.errors import ConfigError
from ffnlab.models import AudioEncoder, AudioEncoderConfig

RATE = 16_000
WAVES = [
    np.random.default_rng(i).normal(size=n).astype(np.float32) * 0.1
    for i, n in enumerate((2_000, 16_000, 40))
]


def test_patches_are_frames_side_by_side():
    features, valid = sound_rows(WAVES, RATE, size=16)
    assert features.shape == (3, 6, 16 * 80)
    frames = np.stack([log_mel(wave, seconds=1) for wave in WAVES])
    for row in range(6):
        np.testing.assert_array_equal(
            features[:, row], frames[:, 16 * row : 16 * row + 16].reshape(3, -1)
        )
    # 2,000 samples are 12.5 frames, in the first row of 16; 40 are less than one.
    assert valid.sum(axis=1).tolist() == [1, 6, 1]
    assert sound_rows(WAVES, RATE, size=8)[1].sum(axis=1).tolist() == [2, 12, 1]


def test_other_rates_are_resampled():
    slow = [wave[::2] for wave in WAVES[:1]]
    features, valid = sound_rows(slow, RATE // 2, size=8)
    assert features.shape == (1, 12, 640) and valid.sum() == 2


def test_states_are_averaged_and_kept(tmp_path):
    config = AudioEncoderConfig(bands=80, width=8, hidden=8, layers=1, heads=2, max_positions=50)
    encoder = AudioEncoder(config, key=jax.random.key(0))
    features, valid = sound_rows(WAVES, RATE, encoder, size=8)
    assert features.shape == (3, 12, 8) and valid.sum(axis=1).tolist() == [2, 12, 1]
    frames = jnp.stack([jnp.asarray(log_mel(wave, seconds=1)) for wave in WAVES])
    states = np.asarray(encoder(frames))
    want = np.stack([states[:, 4 * r : 4 * r + 4].mean(axis=1) for r in range(12)], axis=1)
    np.testing.assert_allclose(features, want, atol=1e-5)  # states of order 1, float32
    cache = FeatureCache(tmp_path)
    for _ in range(2):
        np.testing.assert_allclose(
            sound_rows(WAVES, RATE, encoder, cache=cache)[0], want, atol=1e-5
        )
    sound_rows(WAVES, RATE, encoder, size=4, cache=cache)
    assert len(list(tmp_path.iterdir())) == 2, "one file for each size"


@pytest.mark.parametrize(
    ("waves", "options", "told"),
    [
        ([], {}, "0 sounds"),
        (WAVES, {"size": 101}, "size=101 of 100 frames"),
        (WAVES, {"size": 0}, "size=0"),
        (WAVES, {"seconds": 0}, "seconds=0"),
    ],
)
def test_what_is_refused(waves, options, told):
    with pytest.raises(ConfigError, match=told):
        sound_rows(waves, RATE, **options)


def test_questions():
    tokens, targets = asked("is ", ["0", "7"])
    assert tokens.tolist() == [[105, 115, 32]] * 2
    assert targets.tolist() == [[-1, -1, 48], [-1, -1, 55]]
    for question, answers in (("", ["1"]), ("n", ["10"]), ("n", [""])):
        with pytest.raises(ConfigError, match="answers of one byte"):
            asked(question, answers)
