"""Each family against logits that `transformers` gave the same weights (recorded fixtures)."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.formats.huggingface.load import load

VARIANTS = [
    "llama2",
    "llama3",
    "llama3_v4",
    "llama_linear",
    "llama_yarn",
    "mistral",
    "mistral_v4",
    "qwen2",
    "qwen2_v4",
    "qwen3",
    "qwen3_bias",
    "gemma2",
    "gemma3",
    "gemma3_wrapped",
    "phi3",
    "phi3_v4",
    "llama_head",
    "llama_partial",
    "llama_dynamic",
    "llama_original",
    "llama_longrope",
    "qwen3_untruncated",
    "phi3_longrope",
    "phi3_longrope_v4",
    "phi3_odd",
    "mixtral",
    "qwen3_moe",
    "qwen3_moe_step",
]
# Both sides compute in float32 on other kernels; logits are of order 10.
TOLERANCE = 1e-4


@pytest.fixture(params=VARIANTS)
def folder(request, fixtures):
    return fixtures / "models" / request.param


@functools.cache  # no test changes a model
def loaded(folder):
    return load(folder)


def expected(folder):
    with np.load(folder / "expected.npz", allow_pickle=False) as saved:
        return dict(saved)


def test_logits_with_left_padding(folder):
    want, model = expected(folder), loaded(folder)
    mask = jnp.asarray(want["mask"])
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    logits = model(
        jnp.asarray(want["tokens"]), positions=positions, segments=mask.astype(jnp.int32)
    )
    assert np.abs(np.asarray(logits) - want["full"])[want["mask"]].max() < TOLERANCE


def test_logits_without_padding(folder):
    want, model = expected(folder), loaded(folder)
    logits = model(jnp.asarray(want["tokens"][:1]))
    assert want["mask"][0].all()
    assert np.abs(np.asarray(logits)[0] - want["full"][0]).max() < TOLERANCE


def test_logits_with_the_cache(folder):
    want, model = expected(folder), loaded(folder)
    tokens, mask = jnp.asarray(want["tokens"]), jnp.asarray(want["mask"])
    cache, found = model.init_cache(*tokens.shape), []
    for start, stop in [(0, 7), *((i, i + 1) for i in range(7, 12))]:
        logits, cache = model.extend(tokens[:, start:stop], cache, valid=mask[:, start:stop])
        found.append(np.asarray(logits))
    difference = np.abs(np.concatenate(found, axis=1) - want["cached"])[want["mask"]]
    assert difference.max() < TOLERANCE
