"""Live comparison of encoders with `transformers`, which runs in a process of its own."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.formats import Tokenizer, load, save
from ffnlab.models import remove, sentence_vectors
from peer_scripts import read, runner
from tests.formats.test_encoder_families import TOLERANCE, VARIANTS, difference, given

pytestmark = pytest.mark.parity
WHO = ("theirs", "ours")


@pytest.fixture(scope="module")
def transformers(fixtures):
    """Runs one of the scripts beside the fixtures with transformers."""
    return runner(fixtures / "encoders", "torch")


def test_what_we_save_has_the_recorded_outputs(tmp_path, fixtures, transformers):
    """Old checkpoints are left out: transformers tells what they hold in vain."""
    names = [name for name in VARIANTS if name != "bert_old"]
    for name in names:
        shutil.copytree(fixtures / "encoders" / name, tmp_path / "theirs" / name)
        save(load(fixtures / "encoders" / name), tmp_path / "ours" / name, max_shard_bytes=8_000)
    transformers("outputs.py", *(tmp_path / who / name for who in WHO for name in names))
    for name in names:
        recorded = read(fixtures / "encoders" / name / "expected.npz")
        want, found = (read(tmp_path / who / name / "theirs.npz") for who in WHO)
        for side in ("left", "right"):
            # Torch's kernels differ from one processor to another in the last bits.
            assert difference(want[side], recorded, side) < TOLERANCE, name
            # The same weights, bit for bit (test_encoder_names.py), elsewhere in memory: torch's
            # kernels round the last bit of outputs of order 4 by where a matrix begins.
            assert difference(found[side], want, side) < 1e-6, name


def test_other_random_encoders(tmp_path, transformers):
    transformers("make.py", "--out", tmp_path, "--seed", 1000)
    for name in VARIANTS:
        want, model = read(tmp_path / name / "expected.npz"), load(tmp_path / name)
        for side in ("left", "right"):
            tokens, options = given(model, want, side)
            assert difference(model(tokens, **options), want, side) < TOLERANCE, name


def test_encoders_with_removed_sublayers(tmp_path, fixtures, transformers):
    cases = {}
    for name in ("bert_masked", "distilbert_span"):
        for units in [(3,), (0, 1), (0, 2, 3)]:
            folder = tmp_path / f"{name}-{'-'.join(map(str, units))}"
            cases[folder] = remove(load(fixtures / "encoders" / name), units)
            save(cases[folder], folder)
    transformers("outputs.py", *cases)
    for folder, model in cases.items():
        want = read(folder / "theirs.npz")
        tokens, options = given(model, want, "left")
        assert difference(model(tokens, **options), want, "left") < TOLERANCE, folder


TEXTS = [
    "A man is playing the guitar.",
    "Someone plays an instrument, isn't it?",
    "Caf\u00e9 na\u00efve \u4e2d\u6587 \u20ac100 \U0001f389",
    "antidisestablishmentarianism " * 20,
    "",
]


def test_sentence_vectors_of_minilm(tmp_path, data, transformers):
    folder = data / "minilm"
    if not folder.is_dir():
        pytest.skip(f"no MiniLM at {folder}: `make minilm` puts it there")
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    transformers("sentences.py", folder, tmp_path / "texts.json", tmp_path / "theirs.npz")
    want, tokenizer, model = read(tmp_path / "theirs.npz"), Tokenizer.load(folder), load(folder)
    assert tokenizer.pad == model.config.pad
    ids = [tokenizer.encode(text, special=True) for text in TEXTS]
    valid = np.arange(max(map(len, ids))) < np.array([len(row) for row in ids])[:, None]
    tokens = np.full(valid.shape, tokenizer.pad, np.int32)
    tokens[valid] = np.concatenate(ids)
    assert np.array_equal(tokens, want["ids"])
    assert np.array_equal(valid, want["mask"])
    hidden = model.hidden(jnp.asarray(tokens), valid=jnp.asarray(valid))
    found = np.asarray(sentence_vectors(hidden, jnp.asarray(valid)))
    # Entries of unit vectors of 384 channels, float32 in both.
    assert np.abs(found - want["vectors"]).max() < 1e-5
