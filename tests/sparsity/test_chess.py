"""CHESS and CATS on models: the authors' figures, the card's points, composition, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, sparsity, tree, weights
from ffnlab.data import TextBatches, held_out_windows, stdlib_text
from ffnlab.errors import ConfigError, NumericalError, SelectionError
from ffnlab.formats.embedded import embedded
from ffnlab.layers import GatedFFN, SparseGatedFFN
from ffnlab.models.calibration import Given
from ffnlab.pruning import finercut
from ffnlab.quantization import nearest
from ffnlab.sparsity.sites import activations
from ffnlab.testing import batches, tiny, tiny_encoder
from ffnlab.text import evaluate
from ffnlab.transform import apply, calibrate
from ffnlab.weights import Dense, Int4, SparseInput, Transposed

logits = jax.jit(lambda model, tokens: model(tokens))
extend = jax.jit(lambda model, tokens, cache: model.extend(tokens, cache))
# Float32 on both sides, sums of up to 40 products in another order.
PARITY = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def oracle(fixtures):
    """(model, recorded arrays of the authors' two versions)."""
    folder = fixtures / "chess"
    with np.load(folder / "expected.npz", allow_pickle=False) as arrays:
        return models.load(folder / "tiny_llama"), dict(arrays)


def of_layers(stats, place):
    return np.stack([np.asarray(stats.thresholds[f"layers[{i}].{place}"]) for i in range(2)])


def documents(arrays):
    return [arrays[f"document{i}"][None] for i in range(4)]


@pytest.mark.slow
def test_absolute_version_equals_the_authors_code(oracle):
    model, arrays = oracle
    np.testing.assert_allclose(logits(model, arrays["prompt"]), arrays["logits"], atol=1e-4)
    new, stats = apply(
        sparsity.chess(importance="abs", attention=True), model, documents(arrays), progress=False
    )
    np.testing.assert_allclose(of_layers(stats, "ffn"), arrays["2025_chess"], **PARITY)
    for site, name in (("attn.q", "inputs"), ("attn.o", "outputs")):
        ours = of_layers(stats, site)[:, None]
        np.testing.assert_allclose(ours, arrays[f"2025_attention_{name}"], **PARITY)
    np.testing.assert_allclose(
        logits(new, arrays["prompt"]), arrays["2025_logits_CHESS+"], atol=1e-4
    )
    dense_attention = {path: t for path, t in stats.thresholds.items() if path.endswith("ffn")}
    new = sparsity.sparsified(model, dense_attention, strict=False)
    np.testing.assert_allclose(
        logits(new, arrays["prompt"]), arrays["2025_logits_CHESS"], atol=1e-4
    )


def test_cats_equals_the_authors_code(oracle):
    model, arrays = oracle
    new, stats = apply(sparsity.cats(), model, documents(arrays), progress=False)
    assert int(stats.passes) == 1
    np.testing.assert_allclose(of_layers(stats, "ffn")[:, :1], arrays["2025_cats"], **PARITY)
    np.testing.assert_allclose(logits(new, arrays["prompt"]), arrays["2025_logits_CATS"], atol=1e-4)
    stats = calibrate(sparsity.cats(), model, list(arrays["windows"]), progress=False)
    np.testing.assert_allclose(of_layers(stats, "ffn")[:, :1], arrays["2024_cats"], **PARITY)


def test_square_version_equals_the_authors_code(oracle):
    model, arrays = oracle
    new, stats = apply(
        sparsity.chess(attention=True), model, list(arrays["windows"]), progress=False
    )
    np.testing.assert_allclose(of_layers(stats, "ffn"), arrays["2024_chess"], **PARITY)
    for site, name in (("attn.q", "inputs"), ("attn.o", "outputs")):
        ours = of_layers(stats, site)[:, None]
        np.testing.assert_allclose(ours, arrays[f"2024_attention_{name}"], **PARITY)
    np.testing.assert_allclose(logits(new, arrays["prompt"]), arrays["2024_logits"], atol=1e-4)


RULES = {
    "cats": lambda k: sparsity.cats(sparsity=k, attention=True),
    "abs": lambda k: sparsity.chess(sparsity=k, importance="abs", attention=True),
    "sq": lambda k: sparsity.chess(sparsity=k, attention=True, pooling="all"),
}


def drawn(seed):
    """Sixteen texts of 64 tokens."""
    return jax.random.randint(jax.random.key(seed), (16, 64), 0, 64)


@pytest.mark.parametrize("rule", RULES)
def test_thresholds_are_quantiles_of_what_was_seen(rule):
    """On the very batch of the calibration nothing moves but the rounding of a threshold."""
    tokens = drawn(1)
    gates, inputs = jax.jit(lambda model: activations(model, Given((tokens,), {}), True))(tiny())
    seen = {path: gate for path, (gate, _) in gates.items()} | inputs
    previous = None
    for k in (0.3, 0.5, 0.7):
        t = calibrate(RULES[rule](k), tiny(), [tokens], progress=False).thresholds
        assert set(t) == set(seen)
        for path, x in seen.items():
            # The first layer sees 64 different tokens, ties of 0.1 %; a bin of a histogram is
            # 1 / 256 wide and holds up to 0.2 % of these numbers.
            assert abs(np.mean(np.abs(x) <= t[path]) - k) <= 5e-3, path
            # Card, point 5: thresholds do not fall as k grows.
            assert previous is None or np.all(np.asarray(t[path]) >= previous[path]), path
        previous = t


@pytest.mark.parametrize("rule", RULES)
def test_realised_sparsity_on_held_out_tokens(rule):
    """Card, point 1: k +- 0.02 in every FFN.

    The inputs of the output projection move more, and no bound is set for them: all places of a
    text see nearly the same mean of values, so that a text counts as one draw and not as 64 (0.03
    with 32 texts, 0.016 with 128), and sparsified layers below shift them (0.03 at k = 0.7).
    """
    for k in (0.3, 0.5, 0.7):
        new, stats = apply(RULES[rule](k), tiny(), [drawn(i) for i in range(8)], progress=False)
        report = sparsity.realised_sparsity(new, [drawn(8), drawn(9)])
        assert set(report.zeros) == set(stats.thresholds) and "ffn" in str(report)
        for path, zeros in report.zeros.items():
            assert abs(zeros - k) <= (0.08 if path.endswith("attn.o") else 0.02), path
        assert abs(report.ffn - k) <= 0.02


@pytest.mark.parametrize("make", [sparsity.chess, sparsity.cats])
def test_sparsity_zero_is_the_dense_model_bit_for_bit(make):
    model = tiny()
    new, _ = apply(make(sparsity=0.0, attention=True), model, progress=False)
    tokens = batches()[0]
    np.testing.assert_array_equal(logits(new, tokens), logits(model, tokens))
    assert new is not model


def test_thresholds_that_keep_everything_change_only_rounding():
    model = tiny()
    keep = {f"layers[{i}].ffn": np.full(32, -1, np.float32) for i in range(3)}
    new, tokens = sparsity.sparsified(model, keep, strict=True), batches()[0]
    np.testing.assert_allclose(logits(new, tokens), logits(model, tokens), atol=1e-5)


def test_kept_set_does_not_depend_on_the_scale_of_up():
    """Card, point 5; a power of two, so that nothing is rounded."""
    model = tiny()
    scaled = tree.map_at(
        model,
        tree.at("layers[*].ffn.up"),
        lambda linear: linear.replace(Dense(linear.weight.dense() * 4)),
    )
    scaled = tree.map_at(  # undone after the product: later layers see the same activations
        scaled,
        tree.at("layers[*].ffn.down"),
        lambda linear: linear.replace(Dense(linear.weight.dense() / 4)),
    )
    for kind in ("sq", "abs"):
        t = sparsity.chess(importance=kind)
        a = calibrate(t, model, batches(), progress=False).thresholds
        b = calibrate(t, scaled, batches(), progress=False).thresholds
        for path in a:
            np.testing.assert_array_equal(a[path], b[path])


STRICT = {
    "sq": (sparsity.chess(attention=True), True),
    "abs": (sparsity.chess(importance="abs", attention=True), False),
    "cats": (sparsity.cats(attention=True), False),
}


@pytest.mark.parametrize("rule", STRICT)
def test_what_equals_its_threshold_is_dropped_by_the_square_version_alone(rule):
    (transform, strict), batch = STRICT[rule], batches()[0]
    new, stats = apply(transform, tiny(), [batch], progress=False)
    ffn, x = new.layers[0].ffn, jax.random.normal(jax.random.key(0), (1, 16))
    a = jnp.abs(ffn.activate(x))[0]
    there = {"layers[0].ffn": jnp.where(a == 0, jnp.inf, a)}
    ffn = sparsity.sparsified(new, there, strict=ffn.strict).layers[0].ffn
    np.testing.assert_array_equal(jnp.abs(ffn.activate(x))[0], jnp.zeros(32) if strict else a)
    # A projection keeps what is above its threshold; where `>=` is meant that is the float below.
    inputs = jax.jit(lambda model: activations(model, Given((batch,), {}), True)[1])(tiny())
    seen = np.sort(np.abs(inputs["layers[0].attn.q"]), axis=None)
    below = np.nextafter(seen[seen.size // 2 - 1], np.float32(0))
    assert stats.thresholds["layers[0].attn.q"] == (seen[seen.size // 2 - 1] if strict else below)


def test_dead_channel_is_dropped_without_nan():
    """Card, point 6: E up^2 = 0."""
    model = tree.map_at(
        tiny(),
        tree.at("layers[1].ffn.up"),
        lambda linear: linear.replace(Dense(linear.weight.dense().at[:, 5].set(0))),
    )
    new, stats = apply(sparsity.chess(), model, batches(), progress=False)
    assert np.isinf(stats.thresholds["layers[1].ffn"][5])
    assert np.isfinite(np.delete(stats.thresholds["layers[1].ffn"], 5)).all()
    assert np.isfinite(logits(new, batches()[0])).all()


def test_only_query_and_output_projections_are_cut():
    new, _ = apply(sparsity.chess(attention=True), tiny(), batches(), progress=False)
    for block in new.layers:
        kinds = {p: type(getattr(block.attn, p).weight) for p in "qkvo"}
        assert kinds == {"q": SparseInput, "k": Dense, "v": Dense, "o": SparseInput}
        assert isinstance(block.ffn, SparseGatedFFN) and isinstance(block.ffn.up.weight, Transposed)


def test_decoding_token_by_token_equals_one_forward_pass():
    """One token runs the row-skipping products, many the masked ones."""
    new, _ = apply(sparsity.chess(attention=True), tiny(), batches(), progress=False)
    tokens = batches()[0][:1]
    cache, steps = new.init_cache(1, 12), []
    for i in range(12):
        y, cache = extend(new, tokens[:, i : i + 1], cache)
        steps.append(y)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), logits(new, tokens), atol=1e-4)


def quantized_layer(act):
    """A sparse FFN whose up and down projections are Int4, large enough for the loop."""
    width, hidden, (gate, codes, scales) = 1056, 1024, jax.random.split(jax.random.key(0), 3)
    ffn = GatedFFN(width, hidden, key=gate)

    def int4(linear):
        q = jax.random.randint(codes, linear.weight.shape, -8, 8, jnp.int8)
        s = jax.random.uniform(scales, (q.shape[0] // 32, q.shape[1]), minval=0.004, maxval=0.008)
        return linear.replace(Int4.from_codes(q, s, group=32, divisor=2.0, act=act))

    return SparseGatedFFN(
        ffn.gate, int4(ffn.up), int4(ffn.down), jnp.full(hidden, 0.7), activation="silu"
    )


# Sums in another order; with e4m3 they may also end on the other side of a rounding.
@pytest.mark.parametrize("act, tolerance", [(None, 1e-5), ("e4m3", 1e-2)])
def test_a_quantized_layer_skips_rows_once_prepared(act, tolerance):
    """FireQ after CHESS: the layout of the loop comes from `prepare`."""
    layer = quantized_layer(act)
    ready = weights.prepare(layer, "cpu")
    assert isinstance(ready.up.weight, Transposed) and isinstance(layer.up.weight, Int4)
    assert isinstance(weights.prepare(layer, "cuda").up.weight, Int4)
    x = jax.random.normal(jax.random.key(1), (1, 2, 1056))
    assert 0.7 < float(jnp.mean(layer.activate(x) == 0)) < 0.9
    call = jax.jit(lambda layer, x: layer(x))
    one = x[:, :1]
    # Only the loop over active rows sorts; a product with Int4 may loop over its groups.
    assert "stablehlo.sort" in call.lower(ready, one).as_text()
    assert "stablehlo.sort" not in call.lower(layer, one).as_text()
    expected = call(layer, x)
    bound = tolerance * float(jnp.abs(expected).max())
    np.testing.assert_allclose(call(ready, x), expected, atol=bound)
    np.testing.assert_allclose(call(ready, one), expected[:, :1], atol=bound)


def test_a_model_quantized_after_it_decodes_as_it_scores():
    """Stacked, prepared and token by token, against one pass of the model as it is stored."""
    new, _ = apply(sparsity.chess(attention=True), tiny(), batches(), progress=False)
    new, _ = apply(nearest(format="int4", group=8), new)
    kinds = {type(block.ffn.up.weight) for block in weights.prepare(new, "cpu").layers}
    assert isinstance(new.layers[0].ffn.up.weight, Int4) and kinds == {Transposed}
    ready, tokens = weights.prepare(models.stack(new), "cpu"), batches()[0][:1]
    cache, steps = ready.init_cache(1, 12), []
    for i in range(12):
        y, cache = extend(ready, tokens[:, i : i + 1], cache)
        steps.append(y)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), logits(new, tokens), atol=1e-4)


def test_quantized_and_pruned_models_are_taken():
    quantized, _ = apply(nearest(format="int4", group=8), tiny())
    new, _ = apply(sparsity.chess(attention=True), quantized, batches(), progress=False)
    ffn, attn = new.layers[0].ffn, new.layers[0].attn
    assert isinstance(ffn.up.weight, Int4) and isinstance(attn.q.weight.w, Int4)
    assert abs(sparsity.realised_sparsity(new, batches()).ffn - 0.5) < 0.05
    pruned, _ = apply(finercut(remove=2, units="ffn"), tiny(), batches(), progress=False)
    new, stats = apply(sparsity.chess(), pruned, batches(), progress=False)
    assert len(stats.thresholds) == 1
    assert np.isfinite(logits(new, batches()[0])).all()


def test_a_sparse_model_gets_new_thresholds():
    once, _ = apply(sparsity.chess(attention=True), tiny(), batches(), progress=False)
    twice, stats = apply(
        sparsity.chess(sparsity=0.8, attention=True), once, batches(), progress=False
    )
    assert isinstance(twice.layers[0].attn.q.weight.w, Dense)
    assert jax.tree.structure(once) == jax.tree.structure(twice)
    report = sparsity.realised_sparsity(twice, batches())
    assert all(abs(zeros - 0.8) < 0.08 for zeros in report.zeros.values())


def observed(transform, model, batch):
    return transform.observe(transform.init(model), model, batch)


def without_ffns():
    return models.remove(tiny(), [1, 3, 5])


def with_nan():
    return tree.map_at(
        tiny(),
        tree.at("layers[0].ffn.gate"),
        lambda linear: linear.replace(Dense(linear.weight.dense().at[0].set(jnp.nan))),
    )


def unchecked(function):
    """A function without the type checks of the test run, as users call it."""
    return getattr(function, "__wrapped__", function)


def rewritten_elsewhere():
    t = sparsity.chess()
    t.rewrite(without_ffns(), calibrate(t, tiny(), batches(), progress=False))


BAD = {
    "sparsity 1": (lambda: sparsity.chess(sparsity=1.0), ConfigError, r"outside \[0, 1\)"),
    "sparsity nan": (lambda: sparsity.cats(sparsity=float("nan")), ConfigError, "outside"),
    "importance": (lambda: unchecked(sparsity.chess)(importance="max"), ConfigError, "'sq', 'abs'"),
    "too few": (
        lambda: observed(sparsity.cats(sparsity=0.01), tiny(), batches()[0][:1, :2]),
        ConfigError,
        "at least 100 are needed",
    ),
    "nothing gated": (lambda: sparsity.chess().init(without_ffns()), SelectionError, "GatedFFN"),
    "not calibrated": (
        lambda: sparsity.chess().rewrite(tiny(), sparsity.chess().init(tiny())),
        ConfigError,
        "0 of 2 passes",
    ),
    "other model": (rewritten_elsewhere, ConfigError, "does not have"),
    "nan": (lambda: apply(sparsity.chess(), with_nan(), batches()), NumericalError, "not finite"),
    "dense model": (
        lambda: sparsity.realised_sparsity(tiny(), batches()),
        SelectionError,
        "matches nothing",
    ),
    "no tokens": (
        lambda: sparsity.realised_sparsity(
            apply(sparsity.chess(), tiny(), batches(), progress=False)[0], []
        ),
        ConfigError,
        "batches is empty",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.fixture(scope="module")
def added():
    """Nats per token of every held-out window that a transform adds to the embedded model."""
    text, model = stdlib_text(), models.stack(embedded()[0])
    source = TextBatches(text.train, batch=8, length=512)
    seen = [source(i)[:, :-1] for i in range(8)]
    held = held_out_windows(text.held_out, 256, 256).tokens
    parts = np.split(held[: len(held) // 16 * 16], len(held) // 16)

    def nats(transform):
        new, _ = apply(transform, model, seen, progress=False)
        return np.concatenate([np.mean(evaluate.nats_of(new, part), axis=1) for part in parts])

    @functools.cache
    def of(make, **options):
        return nats(make(**options)) - nats(sparsity.chess(sparsity=0.0))

    return of


@pytest.mark.slow
@pytest.mark.parametrize("k", [0.5, 0.7])
def test_chess_loses_less_than_cats_on_the_embedded_model(added, k):
    """FFNs only; two standard errors of the difference, paired over windows."""
    less = added(sparsity.chess, sparsity=k) - added(sparsity.cats, sparsity=k)
    assert less.mean() < -2 * less.std() / np.sqrt(len(less))


MISSED = "the embedded model does not meet the card: "


@pytest.mark.slow
@pytest.mark.parametrize(
    "k", [pytest.param(0.5, marks=pytest.mark.xfail(reason=MISSED + "0.93 of CATS")), 0.7]
)
def test_chess_adds_at_most_nine_tenths_of_cats(added, k):
    """Card, point 3."""
    assert added(sparsity.chess, sparsity=k).mean() <= 0.9 * added(sparsity.cats, sparsity=k).mean()


@pytest.mark.slow
@pytest.mark.xfail(reason=MISSED + "4.8 times")
def test_attention_sites_add_at_most_three_times_as_much_as_ffns(added):
    """Card, point 3."""
    both = added(sparsity.chess, sparsity=0.5, attention=True)
    assert both.mean() <= 3 * added(sparsity.chess, sparsity=0.5).mean()


def test_models_without_gates_are_refused_by_name():
    for make in (sparsity.chess, sparsity.cats):
        with pytest.raises(SelectionError, match=r"layers\[0\].ffn is an FFN without a gate"):
            make().init(tiny_encoder())


def test_an_encoder_with_gates_is_sparsified_and_padding_refused():
    model = tiny_encoder(gated=True)
    tokens = np.asarray(batches()[0])
    new, _ = apply(sparsity.chess(sparsity=0.5), model, [{"tokens": tokens}])
    assert sparsity.realised_sparsity(new, [tokens]).ffn == pytest.approx(0.5, abs=0.02)
    valid = np.ones(tokens.shape, bool)
    valid[0, 0] = False
    with pytest.raises(ConfigError, match="padding"):
        apply(sparsity.chess(), model, [{"tokens": tokens, "valid": valid}])
