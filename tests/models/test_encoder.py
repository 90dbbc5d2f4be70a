"""Encoders: padding, positions, heads, forms, and what they cost; `transformers` in `formats`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ffnlab import models
from ffnlab.errors import ConfigError
from ffnlab.layers import LayerInputs
from ffnlab.models import Encoder, account, sentence_vectors
from ffnlab.models.cost import multiply_adds
from ffnlab.models.encoder import abstract
from ffnlab.parallel import parse_mesh, shard
from ffnlab.testing import equal, tiny_encoder

# The same sums in another order, float32; activations are of order 1.
TOLERANCE = 2e-5
FORMS = {
    "bert": {},
    "pre-norm, rotary, gated": {"norm": "before", "positions": "rotary", "gated": True},
    "no positions, no types, no biases": {
        "positions": None,
        "types": 0,
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
    },
}
tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 64)
valid = jnp.array([[False, False, True, True, True, True, True], [True] * 4 + [False] * 3])
run = jax.jit(lambda model, tokens, **given: model(tokens, **given))


@functools.cache
def made(form: str, **options) -> Encoder:
    return tiny_encoder(**(FORMS[form] | options))


def difference(a, b) -> float:
    return float(jnp.abs(a - b).max())


@pytest.mark.parametrize("form", FORMS)
def test_nothing_sees_padding_and_all_see_the_rest(form):
    model = made(form)
    out = run(model, tokens, valid=valid)
    assert out.shape == (2, 7, 64)
    assert out.dtype == jnp.float32
    other = run(model, jnp.where(valid, tokens, 63 - tokens), valid=valid)
    assert difference(out[valid], other[valid]) == 0.0
    last = run(model, tokens.at[0, -1].set((tokens[0, -1] + 1) % 64), valid=valid)
    assert (jnp.abs(last - out)[0, 2:].max(axis=-1) > 1e-3).all(), "the first sees the last"
    assert difference(last[1], out[1]) == 0.0, "rows are texts of their own"


@pytest.mark.parametrize("form", FORMS)
def test_a_padded_text_is_the_text_alone_where_positions_say_so(form):
    """Learned positions are those of the slots; rotations know distances only."""
    model = made(form)
    out = run(model, tokens, valid=valid)
    alone = run(model, tokens[1:, :4])
    assert difference(out[1, :4], alone[0]) < TOLERANCE
    left = run(model, tokens[:1, 2:])[0]
    if model.config.positions == "absolute":
        assert difference(out[0, 2:], left) > 1e-2
        left = run(model, tokens[:1, 2:], positions=jnp.arange(2, 7)[None])[0]
    assert difference(out[0, 2:], left) < TOLERANCE


def test_positions_and_types_matter_where_there_are_any():
    model = made("bert")
    out, types = run(model, tokens), jnp.zeros_like(tokens)
    assert difference(run(model, tokens, types=types), out) == 0.0
    assert difference(run(model, tokens, types=types.at[0, 0].set(1)), out) > 1e-2
    turned = run(model, tokens[:, ::-1])[:, ::-1]
    assert difference(turned, out) > 1e-2
    unordered = made("no positions, no types, no biases")
    turned = run(unordered, tokens[:, ::-1])[:, ::-1]
    assert difference(turned, run(unordered, tokens)) < TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_a_stack_gives_the_same(form):
    model = made(form)
    again = models.stack(model)
    assert difference(run(again, tokens, valid=valid), run(model, tokens, valid=valid)) < TOLERANCE
    assert equal(models.unstack(again), model)


def test_a_rematerialized_stack_has_the_same_gradients():
    model = made("bert")
    again = models.stack(model)
    loss = lambda m: jnp.sum(jnp.sin(m(tokens, valid=valid)))  # noqa: E731
    want, found = (jax.jit(jax.grad(loss))(m) for m in (model, models.remat(again, "nothing")))
    leaves = zip(*map(jax.tree.leaves, (models.unstack(found), want)), strict=True)
    assert max(difference(a, b) for a, b in leaves) < 1e-4  # sums of 900 terms of order 1


def test_the_parts_of_a_run():
    model = made("bert")
    h, outputs = model.run(tokens, valid=valid, branches=True)
    assert outputs.branches.shape == (3, 2, 2, 7, 16)
    assert difference(model.output(h), model(tokens, valid=valid)) == 0.0
    given = model(embeddings=model.embed(tokens), valid=valid)
    assert difference(given, model(tokens, valid=valid)) == 0.0
    gates = jnp.ones((3, 2)).at[1, 0].set(0.0).at[2, 1].set(0.0)
    gated = model(tokens, inputs=LayerInputs(gates=gates))
    removed = models.remove(model, [2, 5])
    assert models.removed(removed) == [2, 5]
    assert difference(removed(tokens), gated) < TOLERANCE


def test_each_head_reads_hidden_states_in_its_own_way():
    hidden = made("bert", head=None)(tokens)
    assert hidden.shape == (2, 7, 16)
    spans = made("bert", head="span")
    assert difference(spans(tokens), spans.head(spans.hidden(tokens))) == 0.0
    assert spans(tokens).shape == (2, 7, 2)
    assert made("bert", head="tokens", classes=5)(tokens).shape == (2, 7, 5)
    plain = made("bert", head="classes", classes=3)
    assert difference(plain(tokens), plain.head(plain.hidden(tokens)[:, 0])) == 0.0
    pooled = made("bert", head="classes", classes=3, pooler="tanh")
    want = pooled.head(jnp.tanh(pooled.pooler(pooled.hidden(tokens)[:, 0])))
    assert difference(pooled(tokens), want) == 0.0
    untied = made("bert", tie_embeddings=False)
    assert untied.head.weight.shape == (16, 64)
    assert untied(tokens).shape == (2, 7, 64)


def test_a_tied_head_learns_with_its_embedding_and_has_a_bias():
    model = made("bert")
    grads = jax.jit(jax.grad(lambda m: jnp.sum(m(tokens)[..., 3])))(model)
    assert float(grads.head_bias.get_value()[3]) == tokens.size
    assert difference(grads.embed.weight.w[3], 0.0) > 1e-3


def test_sentence_vectors_are_unit_means_of_what_is_valid():
    hidden = np.asarray(jax.random.normal(jax.random.key(2), (2, 7, 16)) * 3 + 1, np.float64)
    means = np.stack([hidden[i, np.asarray(valid[i])].mean(axis=0) for i in range(2)])
    want = means / np.linalg.norm(means, axis=1, keepdims=True)
    found = sentence_vectors(jnp.asarray(hidden, jnp.float32), valid)
    assert np.abs(np.asarray(found) - want).max() < 1e-6  # unit vectors, float32
    nothing = sentence_vectors(jnp.asarray(hidden, jnp.float32), jnp.zeros((2, 7), bool))
    assert difference(nothing, 0.0) == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_the_abstract_model_has_the_shapes_and_axes_of_a_made_one(form):
    config = made(form).config
    found = abstract(config)
    want = jax.eval_shape(lambda key: Encoder(config, key=key), jax.random.key(0))
    assert jax.tree.structure(found) == jax.tree.structure(want)
    assert jax.tree.leaves(found) == jax.tree.leaves(want)


def test_every_parameter_has_axes_and_a_mesh_gives_the_same():
    model = made("bert", head="classes", classes=3, pooler="tanh")
    is_param = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    params = [p for p in jax.tree.leaves(model, is_leaf=is_param) if is_param(p)]
    assert all(len(p.axes) == len(jax.tree.leaves(p)[0].shape) for p in params)
    placed = shard(models.stack(model), parse_mesh("fsdp=2,tp=4"))
    assert not placed.layers.period[0].ffn.up.w.get_value().w.is_fully_replicated
    assert difference(run(placed, tokens), run(model, tokens)) < TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_the_closed_form_of_the_cost_is_what_a_run_multiplies(form):
    model = made(form)
    counted = multiply_adds(lambda m, t: m(t), model, tokens[:1])
    assert 2 * counted == 7 * account.flops_per_token(model, 7)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: m(), "not neither"),
        (lambda m: m(tokens, embeddings=jnp.zeros((2, 7, 16))), "not both"),
        (lambda m: m(embeddings=jnp.zeros((2, 7, 8))), r"\(2, 7, 8\); \[b, t, 16\]"),
        (lambda m: m(jnp.zeros((1, 17), jnp.int32)), "17 tokens; .*max_positions=16"),
    ],
)
def test_calls_that_are_refused(call, told):
    with pytest.raises(ConfigError, match=told):
        call(made("bert"))


def test_types_of_a_model_without_are_refused():
    with pytest.raises(ConfigError, match="no token types"):
        made("no positions, no types, no biases")(tokens, types=tokens)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"width": 0}, "width=0"),
        ({"types": -1}, "types=-1"),
        ({"head": "next"}, "head='next' is not one of"),
        ({"norm": "both"}, "norm='both'"),
        ({"positions": "learned"}, "positions='learned'"),
        ({"head": "classes"}, "classes=None must be"),
        ({"classes": 3}, "head='masked' has no classes"),
        ({"head": "tokens", "classes": 2, "labels": ("a",)}, "labels has 1 names for classes=2"),
        ({"positions": "rotary", "head_dim": 3}, "head_dim=3 must be even"),
        ({"pooler": "mish"}, "'mish' is not one of"),
    ],
)
def test_configs_that_make_no_sense(change, told):
    with pytest.raises(ConfigError, match=told):
        dataclasses.replace(made("bert").config, **change)
