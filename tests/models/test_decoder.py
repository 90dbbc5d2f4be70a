"""The decoder: masks, caches, gates, stacks and removal agree with each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, transform
from ffnlab.errors import ConfigError
from ffnlab.layers import FFN, GatedFFN, LayerInputs, MoE, MoESpec, Rope, balance
from ffnlab.models import Decoder, DecoderConfig, account
from ffnlab.models.cost import multiply_adds
from ffnlab.models.decoder import abstract as decoder_abstract
from ffnlab.quantization import nearest
from ffnlab.storage import trees
from ffnlab.testing import batches, counted, tiny
from ffnlab.weights import Dense, Float8, Int4, Int8, map_weights

SMALL = {"vocab": 61, "width": 16, "hidden": 24, "heads": 4, "kv_heads": 2, "head_dim": 4}
KINDS = {
    "llama": {},
    "gemma2": {
        "windows": (3, None, 3, None),
        "attn_softcap": 5.0,
        "logit_softcap": 3.0,
        "sandwich_norms": True,
        "norm_offset": 1.0,
        "embed_scale": 4.0,
        "query_scale": 0.3,
        "activation": "gelu_tanh",
    },
    "gemma3": {"windows": (3, 3, 3, None), "local_rope": Rope(1e3), "qk_norm": True},
    "qwen": {"qkv_bias": True, "tie_embeddings": False},
    "phi": {"rope": Rope(fraction=0.5), "windows": (4, 4, 4, 4)},
    "biased": {"o_bias": True, "mlp_bias": True},
}
# Softmax and sums in another order.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
forward = jax.jit(lambda model, tokens, **kw: model(tokens, **kw))
extend = jax.jit(lambda model, tokens, cache, valid: model.extend(tokens, cache, valid=valid))


@functools.cache
def decoder(kind: str, layers: int = 4) -> Decoder:
    """A random decoder with the switches of a family."""
    config = DecoderConfig(layers=layers, **SMALL, **KINDS[kind])
    return Decoder(config, key=jax.random.key(1))


@functools.cache
def text(rows: int = 2, length: int = 9) -> jax.Array:
    """Random tokens."""
    return jax.random.randint(jax.random.key(2), (rows, length), 0, SMALL["vocab"])


kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_tokens_see_the_past_only_and_only_the_window(kind):
    model, tokens = decoder(kind), text()
    changed = tokens.at[:, 5].add(1)
    a, b = forward(model, tokens), forward(model, changed)
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert not np.allclose(a[:, 5:], b[:, 5:])
    assert a.dtype == jnp.float32 and a.shape == (2, 9, 61)


def test_a_window_hides_distant_tokens():
    config = DecoderConfig(layers=1, windows=(3,), **SMALL)
    model = Decoder(config, key=jax.random.key(1))
    tokens = text()
    a, b = forward(model, tokens), forward(model, tokens.at[:, 2].add(1))
    np.testing.assert_allclose(a[:, 5:], b[:, 5:], rtol=1e-6, atol=1e-6)
    assert not np.allclose(a[:, 4], b[:, 4])


@pytest.mark.parametrize(
    ("kind", "stacked"), [("llama", True), ("gemma2", False), ("gemma3", True), ("phi", False)]
)
def test_cached_logits_are_those_of_the_whole_text(kind, stacked):
    model, tokens = decoder(kind), text()
    whole = forward(model, tokens)
    model = models.stack(model) if stacked else model
    cache, parts, start = model.init_cache(2, 12), [], 0
    for length in (5, 1, 1, 2):
        piece = tokens[:, start : start + length]
        logits, cache = extend(model, piece, cache, jnp.ones(piece.shape, bool))
        parts.append(logits)
        start += length
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, **CLOSE)
    assert int(cache.index) == 9 and cache.positions.tolist() == [9, 9]


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_left_padding_changes_nothing_for_the_real_tokens(kind):
    model, tokens = decoder(kind), text()
    short = tokens[:1, 4:]
    padded = tokens.at[0, :4].set(0)
    valid = jnp.ones((2, 9), bool).at[0, :4].set(False)
    alone = forward(model, short)
    cache = model.init_cache(2, 11)
    logits, cache = extend(model, padded, cache, valid)
    np.testing.assert_allclose(logits[0, 4:], alone[0], **CLOSE)
    np.testing.assert_allclose(logits[1], forward(model, tokens)[1], **CLOSE)
    segments = valid.astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
    direct = forward(model, padded, segments=segments, positions=positions)
    np.testing.assert_allclose(direct[0, 4:], alone[0], **CLOSE)
    nxt, _ = extend(model, tokens[:, :1], cache, jnp.ones((2, 1), bool))
    longer = forward(model, jnp.concatenate([short, tokens[:1, :1]], 1))
    np.testing.assert_allclose(nxt[0, 0], longer[0, -1], **CLOSE)


def test_packed_texts_do_not_see_each_other():
    model, tokens = decoder("llama"), text(1, 9)
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]])
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 0, 0]])
    packed = forward(model, tokens, segments=segments, positions=positions)
    np.testing.assert_allclose(packed[:, :4], forward(model, tokens[:, :4]), **CLOSE)
    np.testing.assert_allclose(packed[:, 4:7], forward(model, tokens[:, 4:7]), **CLOSE)
    assert np.all(np.isfinite(packed))


@kinds
def test_stack_and_unstack_lose_nothing(kind):
    model, tokens = decoder(kind), text()
    stacked = models.stack(model)
    period = {"gemma2": 2, "gemma3": 4}.get(kind, 1)
    assert len(stacked.layers.period) == period and stacked.layers.repeats == 4 // period
    back = models.unstack(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(model)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, back, model)))
    np.testing.assert_allclose(forward(stacked, tokens), forward(model, tokens), **CLOSE)
    assert stacked.layers.period[0].ffn.up.w.axes == ("layers", "embed", "mlp")


def test_stacked_gradients_equal_unstacked_ones():
    model, tokens = decoder("qwen", layers=2), text()
    loss = lambda m: jnp.mean(m(tokens) ** 2)  # noqa: E731
    one = jax.jit(jax.grad(loss))(model)
    scanned = models.unstack(jax.jit(jax.grad(loss))(models.stack(model)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_stack_takes_quantized_layers_and_refuses_to_stack_twice():
    model = map_weights(lambda w: Float8.quantize(w.dense()), tiny())
    stacked = models.stack(model)
    np.testing.assert_allclose(
        forward(stacked, batches()[0]), forward(model, batches()[0]), **CLOSE
    )
    with pytest.raises(ValueError, match="stacked already"):
        models.stack(stacked)


def test_uneven_layers_make_a_period_of_their_own():
    model = models.remove(decoder("llama"), [1])
    stacked = models.stack(model)
    assert (len(stacked.layers.period), stacked.layers.repeats) == (4, 1)
    np.testing.assert_allclose(forward(stacked, text()), forward(model, text()), **CLOSE)


@pytest.mark.parametrize(
    ("kind", "units"),
    [("gemma2", {1, 4}), ("qwen", set(range(8))), ("biased", {0, 7}), ("llama", set())],
)
def test_removed_sublayers_equal_closed_gates(kind, units):
    model, tokens = decoder(kind), text()
    gates = jnp.ones(8).at[jnp.array(sorted(units), int)].set(0.0).reshape(4, 2)
    short = models.remove(model, units)
    assert models.removed(short) == sorted(units)
    without = forward(short, tokens)
    closed = forward(model, tokens, inputs=LayerInputs(gates=gates))
    # Two programs for one function: the last bits differ.
    np.testing.assert_allclose(without, closed, rtol=1e-5, atol=1e-6)
    if kind == "gemma2":
        stacked = forward(models.stack(model), tokens, inputs=LayerInputs(gates=gates))
        np.testing.assert_allclose(stacked, without, **CLOSE)


def test_removal_refuses_what_is_not_there():
    model = decoder("llama")
    with pytest.raises(ValueError, match=r"units holds 8, outside 0\.\.7"):
        models.remove(model, [8])
    with pytest.raises(ValueError, match="no such sublayer"):
        models.remove(model, [3, 3])
    with pytest.raises(ValueError, match="no such sublayer"):
        models.remove(models.remove(model, [3]), [3])


def test_removed_layers_have_no_cache():
    model = models.remove(decoder("llama"), [0, 1, 4])
    cache = model.init_cache(2, 12)
    assert [layer is None for layer in cache.layers] == [True, False, True, False]
    logits, _ = extend(model, text(), cache, jnp.ones((2, 9), bool))
    np.testing.assert_allclose(logits, forward(model, text()), **CLOSE)


def test_gates_are_traced_and_compile_once():
    model, tokens = tiny(), batches()[0]
    run = jax.jit(lambda m, t, g: m(t, inputs=LayerInputs(gates=g)))
    gates = [jnp.ones((3, 2)).at[i, j].set(0.0) for i in range(3) for j in range(2)]
    run(model, tokens, gates[0])
    with counted() as count:
        outs = [run(model, tokens, g) for g in gates]
    assert count.programs == 0
    assert len({np.asarray(o).tobytes() for o in outs}) == 6


@pytest.mark.parametrize("kv", ["float8", "int4"])
def test_rounded_keys_and_values_are_the_same_with_and_without_cache(kv):
    model = jax.tree.map(lambda leaf: leaf, decoder("llama"))
    for block in model.layers:
        block.attn.spec = dataclasses.replace(block.attn.spec, kv_format=kv, query_format="e4m3")
    logits, cache = extend(model, text(), model.init_cache(2, 12), jnp.ones((2, 9), bool))
    # Rounding amplifies the last bits of the two programs, so a few entries differ by a code.
    np.testing.assert_allclose(logits, forward(model, text()), rtol=0.05, atol=0.02)
    assert type(cache.layers[0]).__name__ == {"float8": "Float8KV", "int4": "Int4KV"}[kv]


def test_tied_embeddings_are_one_parameter():
    tied, untied = decoder("llama"), decoder("qwen")
    assert tied.head is None and untied.head.w.axes == ("embed", "vocab")
    grads = jax.jit(jax.grad(lambda m: m(text()).sum()))(tied)
    assert np.any(grads.embed.weight.dense() != 0)


def test_model_survives_a_checkpoint(tmp_path):
    model = decoder("gemma2")
    trees.save(tmp_path / "model", model)
    like = jax.eval_shape(lambda: decoder("gemma2"))
    back = trees.restore(tmp_path / "model", like)
    assert jax.tree.structure(back) == jax.tree.structure(model)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, back, model)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads=3 is not a multiple of kv_heads=2"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"layers": 0}, "layers=0 must be a positive integer"),
        ({"vocab": True}, "vocab=True must be a positive integer"),
        ({"activation": "relu6"}, "activation='relu6' is not one of"),
        ({"windows": (1,)}, "windows has 1 entries for layers=2"),
        ({"windows": (0, 1)}, "must hold None or positive"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        DecoderConfig(**({"layers": 2} | SMALL | change))


@pytest.mark.parametrize(
    "bad", [{"theta": 0.0}, {"scaling": "ntk"}, {"scaling": "yarn", "factor": 2.0}]
)
def test_bad_rope_is_refused(bad):
    with pytest.raises(ConfigError):
        Rope(**bad)


MIXED = DecoderConfig(layers=4, ffns=("gated", "plain", "gated", "plain"), mlp_bias=True, **SMALL)


def test_layers_have_the_kind_of_ffn_that_the_config_says(tmp_path):
    model = Decoder(MIXED, key=jax.random.key(1))
    kinds = [type(block.ffn) for block in model.layers]
    assert kinds == [GatedFFN, FFN, GatedFFN, FFN]
    assert jax.tree.structure(decoder_abstract(MIXED)) == jax.tree.structure(model)
    h = model.embed_tokens(text())
    block = model.layers[1]
    x = block.ffn_norm(h)
    inner = jax.nn.silu(block.ffn.up(x))
    np.testing.assert_allclose(block.ffn(x), block.ffn.down(inner), **CLOSE)
    stacked = models.stack(model)
    assert (len(stacked.layers.period), stacked.layers.repeats) == (2, 2)
    np.testing.assert_allclose(forward(stacked, text()), forward(model, text()), **CLOSE)
    # What no family of Hugging Face can say goes to the native format, and is generated from.
    with pytest.raises(ValueError, match=r'layers\[1\].ffn is a FFN.*format="ffnlab"'):
        models.save(model, tmp_path / "m")
    models.save(model, tmp_path / "m", format="ffnlab")
    again = models.load(tmp_path / "m")
    assert again.config == MIXED
    np.testing.assert_array_equal(forward(again, text()), forward(model, text()))
    assert models.generate(again, [[1, 2]], max_tokens=3).lengths.tolist() == [3]
    small, _ = transform.apply(nearest(format="int8", group=None), models.remove(model, [3]), [])
    assert isinstance(small.layers[3].ffn.up.weight, Int8)
    assert np.isfinite(forward(small, text())).all()


def test_kinds_of_ffn_are_checked_and_the_usual_one_is_not_said():
    assert DecoderConfig(layers=1, ffns=("gated",), **SMALL) == DecoderConfig(layers=1, **SMALL)
    for wrong in (("plain",), ("gated", "dense"), ()):
        with pytest.raises(
            ConfigError, match="an entry of .*'gated', 'plain', 'mixture'.* for each"
        ):
            DecoderConfig(layers=2, ffns=wrong, **SMALL)


EXPERTS = MoESpec(experts=4, k=2, hidden=6)
ROUTED = DecoderConfig(layers=4, ffns=("gated", "mixture") * 2, mixture=EXPERTS, **SMALL)


def test_mixtures_among_dense_layers_are_run_stacked_saved_quantized_and_generated_from(tmp_path):
    model = Decoder(ROUTED, key=jax.random.key(1))
    assert [type(block.ffn) for block in model.layers] == [GatedFFN, MoE] * 2
    assert jax.tree.structure(decoder_abstract(ROUTED)) == jax.tree.structure(model)
    stacked = models.stack(model)
    assert (len(stacked.layers.period), stacked.layers.repeats) == (2, 2)
    run = jax.jit(lambda m, t, s: m.run(t, segments=s))
    segments = jnp.ones_like(text()).at[1, 4:].set(0)
    (h, outputs), (g, same) = run(model, text(), segments), run(stacked, text(), segments)
    np.testing.assert_allclose(g, h, **CLOSE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), same, outputs)
    routing = outputs.reports["ffn"]  # of the two layers that route
    assert routing.chosen.shape == (2, *text().shape, 2)
    tokens = int((segments > 0).sum())
    np.testing.assert_array_equal(balance.counts(routing).sum(-1), [2 * tokens] * 2)
    models.save(model, tmp_path / "m", format="ffnlab")
    again = models.load(tmp_path / "m")
    assert again.config == ROUTED
    np.testing.assert_array_equal(forward(again, text()), forward(model, text()))
    small, _ = transform.apply(nearest(format="int4", group=None), stacked, [])
    ffn = models.unstack(small).layers[1].ffn
    assert isinstance(ffn.experts.up.weight, Int4) and isinstance(ffn.router.weight, Dense)
    assert np.isfinite(forward(small, text())).all()
    found = models.generate(small, [[1, 2], [3]], max_tokens=3)
    assert found.lengths.tolist() == [3, 3]
    assert 2 * multiply_adds(model, text()) == text().size * account.flops_per_token(
        model, text().shape[1]
    )


def test_where_there_is_a_mixture_all_layers_have_it_unless_told_else():
    whole = DecoderConfig(layers=2, mixture=EXPERTS, **SMALL)
    assert [whole.ffn(i) for i in range(2)] == ["mixture"] * 2
    assert dataclasses.replace(whole, ffns=("mixture",) * 2) == whole
    assert dataclasses.replace(whole, ffns=("gated",) * 2).ffn(0) == "gated"
    with pytest.raises(ConfigError, match="names mixtures, but mixture=None"):
        DecoderConfig(layers=1, ffns=("mixture",), **SMALL)
