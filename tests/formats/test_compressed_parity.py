"""Live comparison with the compressed-tensors package, which runs in a process of its own
(`peer_scripts`)."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ffnlab.formats import load, save
from ffnlab.models import Decoder, DecoderConfig, remove
from peer_scripts import read, runner
from quantized_models import float8, int4, int8, matrices, quantized

pytestmark = pytest.mark.parity
CONFIG = DecoderConfig(vocab=32, width=64, hidden=96, layers=2, heads=4, kv_heads=2, head_dim=16)
# Both sides compute in float32; an input rounded to e4m3 may fall to the neighbouring code.
TOLERANCES = {False: 1e-4, True: 0.05}


@pytest.fixture(scope="module")
def package(fixtures):
    """Runs one of the scripts beside the fixtures with the package."""
    return runner(fixtures / "compressed_tensors", "compressed_tensors")


def cases():
    """Models by name, and whether inputs are rounded."""
    model = Decoder(CONFIG, key=jax.random.key(0))
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    phi = Decoder(dataclasses.replace(CONFIG, family="phi3", eps=1e-5), key=jax.random.key(1))
    mixed = quantized(model, lambda w: int4(w, act="e4m3"), "layers[*].attn.*")
    mixed = quantized(mixed, lambda w: float8(w, "e4m3"), "layers[*].ffn.*")
    return {
        "w4a16": (quantized(model, int4), False),
        "w4a16_odd_divisor": (quantized(model, lambda w: int4(w, divisor=1.7)), False),
        "w4a16_short_group": (quantized(model, lambda w: int4(w, group=64)), False),
        "w4a16_columns": (quantized(model, lambda w: int4(w, group=w.shape[0])), False),
        "w4a16_wide_scales": (quantized(narrow, lambda w: int4(w, dtype=np.float32)), False),
        "w4a16_bf16": (quantized(narrow, lambda w: int4(w, dtype=ml_dtypes.bfloat16)), False),
        "w4afp8": (quantized(model, lambda w: int4(w, act="e4m3")), True),
        "w8a16": (quantized(model, lambda w: int8(w, 32)), False),
        "fp8": (quantized(model, lambda w: float8(w, "e4m3")), True),
        "fp8_weights": (quantized(model, float8), False),
        "fused": (quantized(phi, int4), False),
        "mixed": (mixed, True),
        "removed": (remove(quantized(model, int4), [2]), False),
    }


def test_the_package_reads_what_we_write(tmp_path, package):
    models = cases()
    for name, (model, _) in models.items():
        save(model, tmp_path / name, format="compressed-tensors")
    package("check.py", *(tmp_path / name for name in models))
    for name, (_, rounds) in models.items():
        theirs = read(tmp_path / name / "theirs.npz")
        tokens, logits = theirs.pop("tokens"), theirs.pop("logits")
        plain = load(tmp_path / name, extras=False)
        ours = matrices(plain)
        assert theirs and set(theirs) <= set(ours), name
        narrow = ml_dtypes.bfloat16 if name == "w4a16_bf16" else np.float32
        for module, weight in theirs.items():
            # Theirs are rounded to the dtype of the scales.
            assert np.array_equal(weight, ours[module].astype(narrow).astype(np.float32)), module
        found = np.asarray(plain(jnp.asarray(tokens, jnp.int32)))
        if name not in ("w4a16_bf16", "w4a16_wide_scales"):  # ours keep the scales' precision
            assert np.abs(found - logits).max() < TOLERANCES[rounds], name


def test_we_read_what_the_package_writes(tmp_path, package):
    package("make.py", "--out", tmp_path, "--seed", 1000)
    files = sorted(tmp_path.glob("*/expected.npz"))
    assert len(files) == 9
    for file in files:
        want, loaded = read(file), load(file.parent)
        tokens, logits = want.pop("tokens"), want.pop("logits")
        ours, dtype = matrices(loaded), np.asarray(loaded.embed.weight.w).dtype
        for module, weight in want.items():
            assert np.array_equal(ours[module].astype(dtype), weight.astype(dtype)), module
        found = np.asarray(loaded(jnp.asarray(tokens, jnp.int32)))
        rounds = file.parent.name in ("w4afp8", "w4afp8_inferred", "fp8", "mixed")
        assert np.abs(found - logits).max() < TOLERANCES[rounds], file.parent.name
