"""Live comparison of vision transformers with `transformers`, in a process of its own."""

import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.formats import load, save
from ffnlab.models import remove
from peer_scripts import read, runner
from tests.formats.test_vits import TOLERANCE, VARIANTS, difference, on_pixels

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def transformers(fixtures):
    """Runs one of the scripts beside the fixtures with transformers."""
    return runner(fixtures / "vits", "torch")


def test_other_random_models_and_what_we_save_of_them(tmp_path, transformers):
    transformers("make.py", "--out", tmp_path, "--seed", 1000)
    cases = {}
    for name in VARIANTS:
        want, model = read(tmp_path / name / "expected.npz"), load(tmp_path / name)
        found = on_pixels(model)(jnp.asarray(want["pixels"]))
        assert difference(found, want["out"]) < TOLERANCE, name
        for form, changed in (("whole", model), ("cut", remove(model, [1]))):
            cases[tmp_path / f"{form}-{name}"] = changed
            save(changed, tmp_path / f"{form}-{name}", max_shard_bytes=5_000)
    transformers("outputs.py", tmp_path / "vit" / "expected.npz", *cases)
    for folder, model in cases.items():
        theirs = read(folder / "theirs.npz")
        found = on_pixels(model)(jnp.asarray(theirs["pixels"]))
        assert difference(found, theirs["out"]) < TOLERANCE, folder
        # The processor that was written gives the pixels of the one that was read.
        original = read(folder.parent / folder.name.split("-")[1] / "expected.npz")["pixels"]
        assert np.abs(theirs["pixels"] - original).max() < 1e-5, folder
