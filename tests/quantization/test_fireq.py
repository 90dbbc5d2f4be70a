"""FireQ as a transform: what leaves the function alone, what each switch does, and bad input."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, transform, tree
from ffnlab.errors import ConfigError, NumericalError, SelectionError
from ffnlab.layers import GatedFFN, Linear, SparseGatedFFN
from ffnlab.layers.attention.rope import Rope, tables
from ffnlab.quantization import fireq_core as core
from ffnlab.quantization.fireq import fireq, keys
from ffnlab.testing import counted
from ffnlab.weights import Dense, Float8, Int4, Masked, SparseInput, Transposed

# float32 rounding through three blocks; the card asks for 1e-5.
EXACT = 1e-5
NO_ROUNDING = {"weights": False, "activations": None, "kv": None, "query": None}

FAMILIES = {
    "llama": {},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "gemma": {
        "norm_offset": 1.0,
        "sandwich_norms": True,
        "qk_norm": True,
        "attn_softcap": 20.0,
        "windows": (8, None),
        "activation": "gelu_tanh",
        "embed_scale": 4.0,
    },
    "qk-norm": {"qk_norm": True, "kv_heads": 4},
    "partial-rope": {"rope": Rope(fraction=0.5)},
    "yarn": {"rope": Rope(scaling="yarn", factor=4.0, original=16)},
}


def decoder(key, dtype=jnp.float32, **changes):
    sizes = {"vocab": 64, "width": 32, "hidden": 48, "layers": 2, "heads": 4, "kv_heads": 2}
    config = models.DecoderConfig(**({**sizes, "head_dim": 16} | changes))
    model = models.Decoder(config, key=key, dtype=dtype)
    # Norms and biases of a fresh model are all alike; trained ones are not.
    noisy = tree.at("**.scale") | tree.at("**.b")
    keys_ = iter(jax.random.split(key, 200))

    def shake(param):
        value = param.get_value()
        noise = 0.2 * jax.random.normal(next(keys_), value.shape)
        return type(param)(value + noise.astype(value.dtype), axes=param.axes)

    is_param = tree.where(lambda path, node: hasattr(node, "get_value"))
    return tree.map_at(model, noisy & is_param, shake)


@pytest.fixture(scope="module")
def batches():
    return list(jax.random.randint(jax.random.key(3), (2, 2, 24), 0, 64))


@pytest.fixture(scope="module")
def model():
    return decoder(jax.random.key(0))


def quantized(model, batches, **options):
    return transform.apply(fireq(**({"top_k": 4} | options)), model, batches)[0]


logits = jax.jit(lambda model, tokens: model(tokens))


def relative(model, reference, tokens):
    """Largest difference of the logits, relative to the largest logit."""
    a, b = logits(model, tokens), logits(reference, tokens)
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_all_scalings_together_leave_the_logits_unchanged(family, batches, key):
    model = decoder(key, **FAMILIES[family])
    scaled = quantized(model, batches, **NO_ROUNDING)
    assert scaled.layers[0].attn.post_scale is not None
    assert relative(scaled, model, batches[0]) < EXACT


@pytest.mark.parametrize("only", ["channel", "pre_rope", "post_rope"])
def test_each_scaling_alone_leaves_the_logits_unchanged(only, batches, model):
    parts = dict.fromkeys(("channel", "pre_rope", "post_rope"), False) | {only: True}
    scaled = quantized(model, batches, **NO_ROUNDING, **parts)
    assert relative(scaled, model, batches[0]) < EXACT
    a, b = model.layers[1], scaled.layers[1]
    changed = {
        "channel": not np.array_equal(a.ffn.down.weight.w, b.ffn.down.weight.w),
        "pre_rope": not np.array_equal(a.attn.q.weight.w, b.attn.q.weight.w),
        "post_rope": b.attn.post_scale is not None,
    }
    assert changed == parts


def test_channel_scaling_makes_rows_alike(batches, model):
    scaled = quantized(model, batches, **NO_ROUNDING, c_up=0.01, c_down=0.02, v_scale=0.5)
    for old, new in zip(model.layers, scaled.layers, strict=True):
        both = jnp.concatenate([new.ffn.up.weight.w, new.ffn.gate.weight.w], axis=1)
        down = jnp.abs(new.ffn.down.weight.w).mean(axis=1)
        np.testing.assert_allclose(down, 0.02, rtol=1e-5)
        assert not np.allclose(jnp.abs(both).mean(axis=1), 0.01)  # up carries 1 / lam of down
        np.testing.assert_allclose(new.attn.v.weight.w, 0.5 * old.attn.v.weight.w, rtol=1e-6)
        np.testing.assert_allclose(new.attn.o.weight.w, 2 * old.attn.o.weight.w, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qk-norm", "gemma", "partial-rope", "biases"])
def test_pre_scaled_keys_stay_within_alpha_at_every_position(family, batches, key):
    alpha, model = 3.0, decoder(key, **FAMILIES[family])
    scaled = quantized(model, batches, **NO_ROUNDING, alpha=alpha, post_rope=False)
    _, seen = tree.capture(scaled, tree.at("layers[*].attn"), batches[0])
    for path, record in seen.items():
        attention = tree.select(scaled, tree.at(path))[path]
        x, context = record.input[:2]
        spec = attention.spec
        largest = 0.0
        for start in (0, 1, 777, 100_000):
            positions = start + jnp.arange(x.shape[1])[None]
            angles = {spec.rope: tables(spec.rope, spec.head_dim, positions)}
            _, after = keys(attention, x, context._replace(angles=angles))
            largest = max(largest, float(jnp.abs(after).max()))
        assert largest <= alpha * 1.00001


def test_post_scaled_channels_are_left_alone_before_rope(batches, model):
    stats = transform.calibrate(fireq(top_k=2), model, batches)
    scaled = fireq(top_k=2, **NO_ROUNDING, channel=False).rewrite(model, stats)
    for path, absmax in stats.absmax.items():
        old, new = (tree.select(m, tree.at(path))[path] for m in (model, scaled))
        chosen = np.asarray(core.largest_pairs(absmax, 2)).reshape(-1)
        ratio = np.asarray(new.k.weight.w / old.k.weight.w)
        np.testing.assert_allclose(ratio[:, chosen], 1, rtol=1e-6)
        assert (np.abs(ratio[:, ~chosen] - 1) > 1e-3).all()
        np.testing.assert_array_equal(new.v.weight.w, old.v.weight.w)  # without `channel`
        post = np.asarray(new.post_scale.get_value()).reshape(-1)
        assert (post[~chosen] == 1).all() and (post[chosen] != 1).all()


def test_statistics_are_the_maxima_over_all_batches(batches, model):
    whole = transform.calibrate(fireq(), model, [jnp.concatenate(batches)])
    parts = transform.calibrate(fireq(), model, batches)
    assert parts.tokens == whole.tokens == 96
    for a, b in zip(jax.tree.leaves(parts[:2]), jax.tree.leaves(whole[:2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    _, seen = tree.capture(model, tree.at("layers[1].attn.k"), batches[1])
    pre = seen["layers[1].attn.k"].output.reshape(-1, 2, 16)
    assert (parts.norms["layers[1].attn"] >= core.pair_norms(pre) * 0.99999).all()
    turned = tree.map_at(
        model, tree.at("layers[0].attn.k"), lambda k: k.replace(Dense(-k.weight.w))
    )
    other = transform.calibrate(fireq(top_k=0), turned, batches)  # none is a number of channels too
    np.testing.assert_array_equal(other.absmax["layers[0].attn"], parts.absmax["layers[0].attn"])


def test_default_sizes_are_the_authors():
    rope, channels = {"alpha": 8, "beta": 8, "top_k": 8}, {"c_up": 0.0096, "c_down": 0.015}
    defaults = {fireq: rope | channels | {"v_scale": 0.9, "channel_kind": "absmean", "group": 128}}
    defaults[core.post_rope_scale] = {"beta": 8, "top_k": 8}
    defaults[core.pre_rope_scale] = {"alpha": 8}
    for function, wanted in defaults.items():
        parameters = inspect.signature(function).parameters
        assert {name: parameters[name].default for name in wanted} == wanted


def test_default_formats(batches, model):
    result = quantized(model, batches)
    for block in result.layers:
        assert (block.attn.spec.kv_format, block.attn.spec.query_format) == ("int4", "e4m3")
        for linear in (block.attn.q, block.attn.o, block.ffn.gate, block.ffn.down):
            assert isinstance(linear.weight, Int4) and linear.weight.act == "e4m3"
            assert linear.weight.scales.dtype == core.E4M3
    assert isinstance(result.embed.weight, Dense) and result.embed.weight.act is None
    assert result.head is None
    assert tree.nbytes(result) < tree.nbytes(model) / 3
    assert 0 < relative(result, model, batches[0]) < 1


def test_weights_are_the_core_quantizer_of_the_scaled_weights(batches, model):
    scaled = quantized(model, batches, **NO_ROUNDING)
    result = quantized(model, batches, group=16)
    w, weight = scaled.layers[1].ffn.down.weight.w, result.layers[1].ffn.down.weight
    expected = core.quantize(w, group=16, tensor_scale=True)
    np.testing.assert_array_equal(weight.q(), expected.codes)
    np.testing.assert_array_equal(weight.divisor, expected.divisor)
    np.testing.assert_array_equal(weight.dense(), core.dequantize(expected, group=16))


@pytest.mark.parametrize(
    ("options", "check"),
    [
        ({"weights": False}, lambda a: isinstance(a.q.weight, Dense) and a.q.weight.act == "e4m3"),
        ({"activations": None}, lambda a: a.q.weight.act is None),
        ({"kv": None}, lambda a: a.spec.kv_format is None and a.spec.query_format == "e4m3"),
        ({"kv": "float8"}, lambda a: a.spec.kv_format == "float8"),
        ({"query": None}, lambda a: a.spec.query_format is None),
        ({"scales": "bfloat16"}, lambda a: a.q.weight.scales.dtype == jnp.bfloat16),
        ({"scales": "float32"}, lambda a: a.q.weight.scales.dtype == jnp.float32),
        ({"group": 16}, lambda a: a.q.weight.group == 16),
        ({"group": None}, lambda a: a.q.weight.group == 32),
        ({"group": 128}, lambda a: a.q.weight.group == 32 and a.o.weight.group == 64),
        ({"tensor_scale": False}, lambda a: a.q.weight.divisor == 1),
        ({"tensor_scale": True}, lambda a: a.q.weight.divisor >= 1),
        ({"post_rope": False}, lambda a: a.post_scale is None),
    ],
)
def test_switches(options, check, batches, key):
    result = quantized(decoder(key, layers=1), batches, **options)
    assert check(result.layers[0].attn)
    assert jnp.isfinite(logits(result, batches[0])).all()


def test_odd_row_counts_are_padded(batches, key):
    model = decoder(key, hidden=50)
    result = quantized(model, batches, group=16)
    assert result.layers[0].ffn.down.weight.shape == (50, 32)
    assert result.layers[0].ffn.down.weight.codes.shape == (32, 32)
    assert jnp.isfinite(logits(result, batches[0])).all()


def test_the_argument_stays_and_a_second_model_compiles_nothing(batches, key):
    model, method = decoder(key), fireq(top_k=4)
    before = jax.tree.map(np.array, model)
    result, stats = transform.apply(method, model, batches)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, model))
    other = decoder(jax.random.key(9))
    with counted() as count:
        transform.apply(method, other, batches)
    assert count.programs == 0
    again = method.rewrite(model, stats)
    jax.tree.map(np.testing.assert_array_equal, result, again)


def test_stacked_models_stay_stacked_and_agree(batches, model):
    stacked = models.stack(model)
    result = quantized(stacked, batches)
    assert isinstance(result.layers, models.Stacked)
    expected = quantized(model, batches)
    jax.tree.map(np.testing.assert_array_equal, models.unstack(result), expected)
    assert relative(result, expected, batches[0]) < 1e-4  # scanned: sums in another order


def test_works_abstractly(batches, model):
    method = fireq(top_k=4)
    stats = jax.eval_shape(method.observe, method.init(model), model, batches[0])
    shapes = jax.eval_shape(method.rewrite, model, stats)
    concrete = quantized(model, batches)
    assert jax.tree.structure(shapes) == jax.tree.structure(concrete)
    for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(concrete), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_bfloat16_models_stay_bfloat16(batches, key):
    model = decoder(key, dtype=jnp.bfloat16)
    scaled = quantized(model, batches, **NO_ROUNDING)
    assert scaled.layers[0].ffn.up.weight.dtype == jnp.bfloat16
    assert scaled.layers[0].ffn_norm.scale.get_value().dtype == jnp.bfloat16
    # One rounding to 8 bits per matrix and norm.
    assert relative(scaled, model, batches[0]) < 0.1
    assert jnp.isfinite(logits(quantized(model, batches), batches[0])).all()


def test_cached_and_uncached_passes_agree(batches, model):
    result, tokens = quantized(model, batches), batches[0]
    extend = jax.jit(lambda m, x, cache: m.extend(x, cache))
    cache, parts = result.init_cache(2, 24), []
    for part in (tokens[:, :12], tokens[:, 12:]):
        y, cache = extend(result, part, cache)
        parts.append(y)
    # Both round the same values; a sum in another order can still turn a rounding.
    joined = jnp.concatenate(parts, axis=1)
    np.testing.assert_allclose(joined, logits(result, tokens), rtol=1e-3, atol=1e-3)


def test_removed_sublayers_and_other_weights_are_taken_as_they_are(batches, model):
    trimmed = models.remove(model, [0])
    layer = trimmed.layers[1].ffn
    weight = layer.up.weight.w
    masked = layer.up.replace(Masked(Dense(weight), weight > 0))
    trimmed = tree.replace(
        trimmed,
        {
            "layers[1].ffn.up": masked,
            "layers[1].ffn.gate": layer.gate.replace(Float8.quantize(layer.gate.weight.w)),
        },
    )
    scaled = quantized(trimmed, batches, **NO_ROUNDING)
    assert relative(scaled, trimmed, batches[0]) < EXACT
    result = quantized(trimmed, batches)
    assert result.layers[0].attn is None and result.layers[0].ffn is not None
    dropped = np.asarray(weight) <= 0
    assert not np.asarray(result.layers[1].ffn.up.weight.q())[dropped].any()


def without_attention(model):
    return models.remove(model, [0, 2])


def test_a_model_without_attention_needs_no_keys(batches, model):
    result = quantized(without_attention(model), batches)
    assert isinstance(result.layers[0].ffn.up.weight, Int4)


@pytest.mark.parametrize("site", ["ffn", "o", "down"])
def test_thresholds_keep_their_meaning(site, batches, model):
    """Models that CHESS made sparse: the cut channels are the same after all scalings."""
    block = model.layers[1]
    ffn, o, down = block.ffn, block.attn.o, block.ffn.down
    up = ffn.up.replace(Transposed(Dense(ffn.up.weight.w.T)))
    sparse = {
        "ffn": {
            "layers[1].ffn": SparseGatedFFN(
                ffn.gate, up, down, jnp.full((48,), 0.3), activation="silu"
            )
        },
        "o": {"layers[1].attn.o": o.replace(SparseInput(o.weight, jnp.float32(0.3)))},
        "down": {"layers[1].ffn.down": down.replace(SparseInput(down.weight, jnp.float32(0.2)))},
    }[site]
    model = tree.replace(model, sparse)
    scaled = quantized(model, batches, **NO_ROUNDING)
    assert relative(scaled, model, batches[0]) < EXACT
    result = quantized(model, batches)
    weight = tree.select(result, tree.at("layers[1].attn.o"))["layers[1].attn.o"].weight
    assert isinstance(weight, SparseInput if site == "o" else Int4)
    assert jnp.isfinite(logits(result, batches[0])).all()


def test_only_what_is_selected_changes(batches, model):
    select = tree.at("layers[1].ffn.*") | tree.at("layers[1].attn.v")
    result = quantized(model, batches, select=select)
    kinds = tree.select(result, tree.of_type(Linear))
    chosen = {path for path, linear in kinds.items() if isinstance(linear.weight, Int4)}
    assert chosen == {f"layers[1].ffn.{n}" for n in ("gate", "up", "down")} | {"layers[1].attn.v"}
    assert isinstance(result.layers[1].ffn, GatedFFN)
    assert result.layers[1].attn.spec == model.layers[1].attn.spec  # needs k and v
    assert result.layers[0].attn.post_scale is None
    np.testing.assert_array_equal(
        result.layers[0].ffn_norm.scale.get_value(), model.layers[0].ffn_norm.scale.get_value()
    )


def test_the_head_can_be_selected(batches, key):
    model = decoder(key, tie_embeddings=False)
    result = quantized(model, batches, select=tree.of_type(Linear))
    assert isinstance(result.head.weight, Int4)
    assert isinstance(quantized(model, batches).head.weight, Dense)


def test_quantizing_twice_calibrates_on_keys_without_the_first_scale(batches, model):
    once = quantized(model, batches, **NO_ROUNDING)
    twice = quantized(once, batches, **NO_ROUNDING)
    assert relative(twice, model, batches[0]) < EXACT
    chained, _ = transform.apply(
        transform.chain(fireq(top_k=4, **NO_ROUNDING), fireq(top_k=4)), model, batches
    )
    jax.tree.map(np.testing.assert_array_equal, chained, quantized(once, batches))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 3}, "group=3"),
        ({"group": 0}, "group=0"),
        ({"c_up": 0.0}, "c_up=0.0"),
        ({"c_down": -1.0}, "c_down=-1.0"),
        ({"v_scale": float("inf")}, "v_scale=inf"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"beta": 0.0}, "beta=0.0"),
        ({"top_k": -1}, "top_k=-1"),
    ],
)
def test_options_out_of_range_name_themselves(options, message):
    with pytest.raises(ConfigError, match=message):
        fireq(**options)


def test_bad_models_name_what_is_wrong(batches, model):
    with pytest.raises(ConfigError, match=r"top_k=9 .* head_dim=16 of layers\[0\].attn"):
        fireq(top_k=9).init(model)
    with pytest.raises(SelectionError, match="nothing"):
        fireq(select=tree.at("layers[*].mlp.*")).init(model)
    method = fireq(top_k=4)
    with pytest.raises(ConfigError, match="no batch was observed"):
        method.rewrite(model, method.init(model))
    linear = model.layers[1].ffn.up
    broken = linear.replace(Dense(linear.weight.w.at[3, 4].set(jnp.nan)))
    spoiled = tree.replace(model, {"layers[1].ffn.up": broken})
    with pytest.raises(NumericalError, match=r"1 of 14 selected layers: layers\[1\].ffn.up"):
        quantized(spoiled, batches, pre_rope=False, post_rope=False)
    stats = transform.calibrate(method, model, batches)
    norms = stats.norms | {"layers[1].attn": stats.norms["layers[1].attn"].at[0, 0].set(jnp.inf)}
    with pytest.raises(NumericalError, match=r"layers\[1\].attn"):
        method.rewrite(model, stats._replace(norms=norms))
