"""Files written before blocks had slots load unchanged.

The fixture is a decoder of two blocks (width 8, hidden 16, two heads, vocab 16, drawn by key 5),
quantized by FireQ (groups of 8, one post-RoPE channel), saved as a tree and as a model directory,
with its logits of tokens 0 .. 7.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, transform, tree
from ffnlab.formats import load
from ffnlab.layers import Attention, Block, Linear
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.quantization import fireq
from ffnlab.storage import structure, trees

CONFIG = DecoderConfig(vocab=16, width=8, hidden=16, layers=2, heads=2, kv_heads=1, head_dim=4)


@pytest.fixture(scope="module")
def older(fixtures):
    """The folder of the fixture, and tokens with their logits."""
    folder = fixtures / "checkpoints" / "decoder"
    with np.load(folder / "expected.npz") as arrays:
        return folder, jnp.asarray(arrays["tokens"]), arrays["logits"]


def test_a_tree_of_before_is_restored(older):
    folder, tokens, logits = older
    model = Decoder(CONFIG, key=jax.random.key(0))
    like, _ = transform.apply(fireq(group=8, top_k=1), model, [tokens], progress=False)
    restored = trees.restore(folder / "tree", like)
    # Other versions of XLA may add in another order.
    np.testing.assert_allclose(restored(tokens), logits, rtol=1e-5, atol=1e-5)


def test_a_model_directory_of_before_is_loaded(older):
    folder, tokens, logits = older
    np.testing.assert_allclose(load(folder / "saved")(tokens), logits, rtol=1e-5, atol=1e-5)


def test_what_is_new_is_told_only_where_it_is_not_the_default():
    model = Decoder(CONFIG, key=jax.random.key(0))
    (block, spec) = (
        next(node for _, node in tree.walk(model) if isinstance(node, kind))
        for kind in (Block, Attention)
    )
    told = structure.describe(block)["nodes"]
    text = str(told)
    assert "slots" not in text and "joins" not in text and "causal" not in text
    other = jax.tree.map(lambda leaf: leaf, block)
    other.slots = ("ffn", "attn")
    assert "slots" in str(structure.describe(other)["nodes"])
    assert isinstance(spec.q, Linear)
    with pytest.raises(ValueError, match="slots"):
        structure.check(structure.describe(other), structure.describe(block), "file")
    assert models.removed(model) == []
