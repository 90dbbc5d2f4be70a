"""Live comparison of encoders of sound with `transformers`, in a process of its own."""

import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.data import fsdd, log_mel, resampled
from ffnlab.formats import load, save
from ffnlab.models import remove
from peer_scripts import read, runner
from tests.formats.test_audio_encoders import TOLERANCE, VARIANTS

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def transformers(fixtures):
    """Runs one of the scripts beside the fixtures with transformers."""
    return runner(fixtures / "audio_encoders", "torch")


def difference(model, folder, frames):
    found = np.asarray(model(jnp.asarray(frames)))
    return np.abs(found - read(folder / "theirs.npz")["states"]).max()


def test_other_random_encoders_and_what_we_save_of_them(tmp_path, transformers):
    transformers("make.py", "--out", tmp_path, "--seed", 1000)
    cases = {}
    for name in VARIANTS:
        want, model = read(tmp_path / name / "expected.npz"), load(tmp_path / name)
        assert (
            np.abs(np.asarray(model(jnp.asarray(want["frames"]))) - want["states"]).max()
            < TOLERANCE
        )
        for form, changed in (("whole", model), ("cut", remove(model, [1]))):
            cases[tmp_path / f"{form}-{name}"] = changed
            save(changed, tmp_path / f"{form}-{name}", max_shard_bytes=5_000)
    transformers("outputs.py", tmp_path / "encoder" / "expected.npz", *cases)
    frames = read(tmp_path / "encoder" / "expected.npz")["frames"]
    for folder, model in cases.items():
        assert difference(model, folder, frames) < TOLERANCE, folder


def test_whisper_tiny(tmp_path, data, transformers):
    """A spoken digit in 30 s of silence, as the model takes it; states of order 10, float32."""
    folder = data / "whisper_tiny_en_encoder"
    if not folder.is_dir():
        pytest.skip(f"no Whisper encoder at {folder}")
    digits = fsdd(data / "fsdd" / "fsdd_george_jackson_lucas_theo_idx0-29.tar.gz")
    frames = log_mel(resampled(digits.waves[0], digits.rate, 16_000))[None]
    np.savez(tmp_path / "frames.npz", frames=frames)
    model = load(folder, dtype=jnp.float32)
    save(model, tmp_path / "ours")
    transformers("outputs.py", tmp_path / "frames.npz", tmp_path / "ours")
    assert difference(model, tmp_path / "ours", frames) < 1e-3
