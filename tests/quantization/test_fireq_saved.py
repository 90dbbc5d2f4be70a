"""FireQ models on disk: they come back bit for bit, and compute what they computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, transform, tree, weights
from ffnlab.layers import Linear
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.quantization import fireq
from quantized_models import same

CONFIG = DecoderConfig(vocab=64, width=32, hidden=48, layers=2, heads=4, kv_heads=2, head_dim=16)
TOKENS = jax.random.randint(jax.random.key(1), (2, 24), 0, 64)
# The kernel multiplies by the scale of a rounded input after the sum, a prepared weight before it:
# a few units in the last place of float32.
SUMMATION = 3e-6

logits = jax.jit(lambda model, tokens: model(tokens))


@pytest.fixture(scope="module")
def small():
    model = Decoder(CONFIG, key=jax.random.key(0))
    return transform.apply(fireq(group=16, top_k=4), model, [TOKENS], progress=False)[0]


def test_packed_everything_comes_back_bit_for_bit(tmp_path, small):
    models.save(small, tmp_path / "m", format="compressed-tensors")
    loaded = models.load(tmp_path / "m")
    assert same(small, loaded)
    assert np.array_equal(logits(small, TOKENS), logits(loaded, TOKENS))


def test_dense_the_values_and_the_prepared_model_come_back(tmp_path, small):
    models.save(small, tmp_path / "m")
    loaded = models.load(tmp_path / "m")
    for (path, ours), theirs in zip(linears(small).items(), linears(loaded).values(), strict=True):
        assert np.array_equal(ours.weight.dense(), theirs.weight.w), path
        assert ours.weight.act == theirs.weight.act == "e4m3"
    for ours, theirs in zip(small.layers, loaded.layers, strict=True):
        assert ours.attn.spec == theirs.attn.spec
        assert np.array_equal(ours.attn.post_scale.get_value(), theirs.attn.post_scale.get_value())
    ours, theirs = weights.prepare(small), weights.prepare(loaded)
    assert same(ours, theirs)
    assert np.array_equal(logits(ours, TOKENS), logits(theirs, TOKENS))


def test_only_the_order_of_sums_differs_between_kernel_and_prepared_weights(small):
    """Logits may differ by far more: by every e4m3 code that falls to the other side for it."""

    @jax.jit
    def products(model):
        _, seen = tree.capture(model, tree.of_type(Linear), TOKENS)
        pairs = {path: (seen[path].input[0], node.weight) for path, node in linears(model).items()}
        return {path: (w.matmul(x), w.prepare("cpu").matmul(x)) for path, (x, w) in pairs.items()}

    found = products(small)
    assert len(found) == 7 * CONFIG.layers
    for path, (packed, prepared) in found.items():
        assert jnp.abs(packed - prepared).max() <= SUMMATION * jnp.abs(packed).max(), path


def linears(model):
    return tree.select(model, tree.of_type(Linear))
