"""The trunk: per-layer inputs and outputs are the same from a list and from a stack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ffnlab import models, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import Block, GatedFFN, LayerInputs, TokenFacts
from ffnlab.models import Decoder, DecoderConfig, trunk
from ffnlab.testing import batches, tiny

SMALL = {"vocab": 23, "width": 8, "hidden": 12, "heads": 2, "kv_heads": 1, "head_dim": 4}


class Chooser(nnx.Module):
    """An FFN whose tokens are scaled by their choice and by a draw of the layer's key."""

    informed = True

    def __init__(self, inner: nnx.Module):
        self.inner = inner

    def __call__(self, x, context, inputs):
        scale = 1.0 + inputs.choice[..., None] + jax.random.uniform(inputs.key)
        valid = context.tokens.valid
        report = {"sum": scale.sum(), "valid": jnp.zeros(x.shape[:2]) if valid is None else valid}
        return self.inner(x) * scale, report


@functools.cache
def choosing(windows=None) -> Decoder:
    """A decoder of four blocks, the FFNs of the odd ones choose."""
    config = DecoderConfig(layers=4, windows=windows, **SMALL)
    model = Decoder(config, key=jax.random.key(0))
    odd = tree.of_type(GatedFFN) & (tree.at("layers[1]**") | tree.at("layers[3]**"))
    return tree.map_at(model, odd, Chooser)


def given(n: int = 4) -> LayerInputs:
    """Inputs that differ from layer to layer."""
    keys = jax.random.split(jax.random.key(5), 3)
    return LayerInputs(
        gates=jax.random.uniform(keys[0], (n, 2)),
        choice=jax.random.randint(keys[1], (n, 2, 5), 0, 3),
        key=jax.random.split(keys[2], n),
    )


tokens = jax.random.randint(jax.random.key(3), (2, 5), 0, SMALL["vocab"])


@pytest.mark.parametrize("windows", [None, (2, None, 2, None)])
@pytest.mark.parametrize("remat", [None, "nothing"])
def test_list_and_stack_give_equal_outputs(windows, remat):
    model = models.remat(choosing(windows), remat)
    stacked = models.stack(model)
    assert stacked.layers.repeats == 2
    run = jax.jit(lambda m: m.run(tokens, inputs=given(), branches=True))
    (h, outputs), (h_stack, of_stack) = run(model), run(stacked)
    np.testing.assert_allclose(h, h_stack, rtol=1e-6, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), outputs, of_stack
    )
    assert outputs.reports["ffn"]["sum"].shape == (2,)  # of layers 1 and 3
    assert outputs.branches.shape == (4, 2, 2, 5, 8)
    total = model.embed_tokens(tokens) + outputs.branches.sum((0, 1))
    np.testing.assert_allclose(total, h, rtol=1e-5, atol=1e-5)


def test_each_layer_gets_its_own():
    model, inputs = choosing(), given()
    _, outputs = model.run(tokens, inputs=inputs)
    want = [(1.0 + inputs.choice[i] + jax.random.uniform(inputs.key[i])).sum() for i in (1, 3)]
    np.testing.assert_allclose(outputs.reports["ffn"]["sum"], jnp.stack(want), rtol=1e-6)


def test_padding_is_a_fact_of_a_token():
    segments = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    _, outputs = choosing().run(tokens, segments=segments, inputs=given())
    np.testing.assert_array_equal(outputs.reports["ffn"]["valid"][0], segments > 0)
    facts = TokenFacts(valid=jnp.ones((2, 5), bool))
    _, outputs = choosing().run(tokens, segments=segments, inputs=given(), facts=facts)
    assert outputs.reports["ffn"]["valid"].all()


def test_embeddings_stand_for_tokens():
    model = tiny()
    batch = batches()[0]
    rows = model.embed_tokens(batch)
    np.testing.assert_array_equal(model.hidden(embeddings=rows), model.hidden(batch))
    cache = model.init_cache(2, 14)
    valid = jnp.ones(batch.shape, bool).at[0, :3].set(False)
    want, by_tokens = model.extend(batch, cache, valid=valid)
    got, by_rows = model.extend(None, cache, embeddings=rows, valid=valid)
    np.testing.assert_array_equal(got, want)
    jax.tree.map(np.testing.assert_array_equal, by_rows, by_tokens)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, b: m.hidden(), "not neither"),
        (lambda m, b: m.hidden(b, embeddings=m.embed_tokens(b)), "not both"),
        (lambda m, b: m.hidden(embeddings=jnp.zeros((2, 3, 5))), r"\[b, t, 16\] is accepted"),
        (lambda m, b: m(b, inputs=LayerInputs(gates=jnp.ones((2, 2)))), "the model has 3 layers"),
        (lambda m, b: m(b, inputs=LayerInputs(gates=jnp.ones((3, 3)))), r"\[2\] sublayers each"),
        (lambda m, b: m(b, inputs=LayerInputs(choice=jnp.ones((4, 2, 12), int))), "has 3 layers"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make(tiny(), batches()[0])


def test_reports_of_different_shapes_are_not_stacked():
    class Saying(nnx.Module):
        informed = True

        def __init__(self, n):
            self.n = n

        def __call__(self, x, context, inputs):
            return x, jnp.zeros(self.n)

    layers = nnx.List([Block(None, None, None, Saying(n)) for n in (2, 3)])
    with pytest.raises(ConfigError, match="reports of 'ffn' differ in shape"):
        trunk.run(layers, jnp.zeros((1, 1, 4)), trunk.Context({}, {}))


def test_blocks_with_two_caches_are_refused():
    model = tiny()
    attn = model.layers[0].attn
    blocks = [
        Block(
            b.attn_norm,
            attn,
            b.ffn_norm,
            b.ffn,
            slots=("attn", "more", "ffn"),
            others={"more": (None, attn)},
        )
        for b in model.layers
    ]
    model.layers = nnx.List(blocks)
    with pytest.raises(ConfigError, match="2 attentions"):
        model.init_cache(1, 4)
