"""Macaron: the official layers, what each start keeps, orders of splittings, bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab import models, transform, tree
from ffnlab.cli.train import run as train_run
from ffnlab.cli.training import TrainConfig, fresh
from ffnlab.errors import ConfigError
from ffnlab.formats import load
from ffnlab.layers import (
    FFN,
    Attention,
    AttentionSpec,
    Block,
    Context,
    GatedFFN,
    Join,
    LayerNorm,
    Linear,
    Memory,
)
from ffnlab.learning import backprop, labelled
from ffnlab.models import Decoder, DecoderConfig, Encoder, EncoderConfig, ViT, ViTConfig
from ffnlab.models.account import flops_per_token, parameters
from ffnlab.parallel import from_table
from ffnlab.pruning import finercut
from ffnlab.quantization import fireq, nearest
from ffnlab.sparsity import chess
from ffnlab.structure import macaron, pflayer, share
from ffnlab.structure.macaron import euler, exact, lie, slope, strang, with_two_ffns
from ffnlab.testing import equal, tiny
from ffnlab.weights import Dense
from tests import hashed
from tests.fixtures.macaron import record

TOLERANCE = 1e-5  # float32, outputs of about one
NOTHING = Context({}, {})
run = jax.jit(lambda model, x: model(x))

SIZES = {"width": 8, "hidden": 12, "layers": 2, "heads": 2}
CONFIGS = {
    "decoder": DecoderConfig(vocab=20, kv_heads=1, head_dim=4, **SIZES),
    "plain decoder": DecoderConfig(
        vocab=20, kv_heads=2, head_dim=4, ffns=("plain",) * 2, mlp_bias=True, **SIZES
    ),
    "encoder": EncoderConfig(vocab=20, head_dim=4, max_positions=8, head="masked", **SIZES),
    "pre-norm encoder": EncoderConfig(
        vocab=20, head_dim=4, max_positions=8, head="masked", norm="before", **SIZES
    ),
    "vit": ViTConfig((4, 4), 2, channels=1, classes=3, **SIZES),
}
TOKENS = jax.random.randint(jax.random.key(1), (3, 6), 0, 20)
IMAGES = jax.random.uniform(jax.random.key(1), (3, 4, 4, 1))
CLASSES = {DecoderConfig: Decoder, EncoderConfig: Encoder, ViTConfig: ViT}


@functools.cache
def model_of(kind):
    """A model whose norms and biases are no longer those of a fresh one."""
    config = CONFIGS[kind]
    model = CLASSES[type(config)](config, key=jax.random.key(0))
    draw = np.random.default_rng(0)

    def moved(leaf):
        if leaf.ndim != 1:
            return leaf
        return leaf + jnp.asarray(draw.uniform(-0.3, 0.3, leaf.shape), leaf.dtype)

    return jax.tree.map(moved, model)


def inputs_of(kind):
    return IMAGES if kind == "vit" else TOKENS


def made(kind, **options):
    return transform.apply(macaron(**options), model_of(kind))[0]


def linear(prefix, d_in, d_out, axes):
    drawn = hashed.parameter(f"{prefix}.weight", (d_out, d_in)).T
    return Linear.of(
        Dense(jnp.asarray(drawn)),
        jnp.asarray(hashed.parameter(f"{prefix}.bias", (d_out,))),
        axes=axes,
    )


def official_norm(name):
    new = LayerNorm(record.WIDTH, eps=1e-5)
    for part, key in (("scale", "weight"), ("bias", "bias")):
        value = jnp.asarray(hashed.parameter(f"{name}.{key}", (record.WIDTH,)))
        setattr(new, part, getattr(new, part).replace(value))
    return new


def official_attention(name, **spec):
    d, heads = record.WIDTH, record.HEADS
    spec = AttentionSpec(heads, heads, d // heads, rope=None, **spec)
    new = Attention(spec, d, key=jax.random.key(0), qkv_bias=True, o_bias=True)
    w = hashed.parameter(f"{name}.in_proj_weight", (3 * d, d))
    b = hashed.parameter(f"{name}.in_proj_bias", (3 * d,))
    for i, part in enumerate("qkv"):
        rows = slice(i * d, (i + 1) * d)
        map_ = getattr(new, part).replace(Dense(jnp.asarray(w[rows].T)), jnp.asarray(b[rows]))
        setattr(new, part, map_)
    new.o = linear(f"{name}.out_proj", d, d, ("heads", "embed"))
    return new


def official_ffn(first, second):
    d, h = record.WIDTH, record.HIDDEN
    new = FFN(d, h, key=jax.random.key(0), activation="relu")
    new.up = linear(first, d, h, ("embed", "mlp"))
    new.down = linear(second, h, d, ("mlp", "embed"))
    return new


def official(side, place):
    """A Macaron of our own making, with the parameters of an official layer."""
    is_decoder = side == "decoder"
    norms = dict(zip(("ffn_in", "attn", "ffn"), ("2", "0", "1"), strict=True))
    names = {slot: f"layer_norms.{number}" for slot, number in norms.items()}
    if is_decoder:
        norms = ("macaron_layer_norm", "self_attn_layer_norm", "final_layer_norm")
        names = dict(zip(names, norms, strict=True))
    join = Join(norm=place)
    block = Block(
        official_norm(names["attn"]),
        official_attention("self_attn", causal=is_decoder),
        official_norm(names["ffn"]),
        FFN(record.WIDTH, 2 * record.HIDDEN, key=jax.random.key(0), activation="relu"),
        joins=(join, join),
    )
    if is_decoder:
        cross = official_attention("encoder_attn", causal=False, memory=True)
        norm = official_norm("encoder_attn_layer_norm")
        block = block.with_slot("attn_memory", cross, after="attn", norm=norm, join=join)
    block = with_two_ffns(block, key=jax.random.key(0))
    assert block.ffn.up.weight.shape == (record.WIDTH, record.HIDDEN)
    block.ffn_in, block.ffn = (
        nnx.data(official_ffn(*names)) for names in (("macaron_fc1", "macaron_fc2"), ("fc1", "fc2"))
    )
    block.ffn_in_norm = nnx.data(official_norm(names["ffn_in"]))
    return block


@pytest.mark.parametrize("place", record.SIDES)
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_the_official_layers_give_the_same(fixtures, side, place):
    block, valid = official(side, place), jnp.asarray(record.VALID)
    with np.load(fixtures / "macaron" / "expected.npz") as file:
        want = file[f"{side} {place}"]
    if side == "encoder":
        assert block.slots == ("ffn_in", "attn", "ffn")
        seen = jnp.broadcast_to(valid[:, None, None], (3, 1, 5, 5))
        y = block(jnp.asarray(record.X), Context({}, {None: seen}))[0]
        np.testing.assert_allclose(y, want, atol=TOLERANCE)
        return
    assert block.slots == ("ffn_in", "attn", "attn_memory", "ffn")
    memory = Memory(jnp.asarray(record.X), valid[:, None, None])
    y = block(jnp.asarray(record.Y), Context({}, {None: None}, memory=memory))[0]
    np.testing.assert_allclose(y, want, atol=TOLERANCE)


def test_a_row_of_padding_alone_is_finite():
    block = official("decoder", "before")
    memory = Memory(jnp.asarray(record.X), jnp.zeros((3, 1, 1, 5), bool))
    y = block(jnp.asarray(record.Y), Context({}, {None: None}, memory=memory))[0]
    assert np.isfinite(y).all()
    model = made("encoder")
    assert np.isfinite(model(TOKENS, valid=jnp.zeros(TOKENS.shape, bool))).all()


def test_padding_is_not_seen_through_three_sublayers():
    model, valid = made("encoder"), jnp.arange(6) < jnp.array([[6], [3], [4]])
    other = jnp.where(valid, TOKENS, (TOKENS + 1) % 20)
    one, two = (model(tokens, valid=valid) for tokens in (TOKENS, other))
    np.testing.assert_array_equal(one[valid], two[valid])
    assert np.abs(one - two).max() > 0.01


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("start", ["drawn", "split"])
def test_parameters_stay_but_for_a_norm_and_a_bias(kind, start):
    """Exactly 3 d for each layer with layer norms and biases, d with RMS norms and no biases."""
    d, layers = SIZES["width"], SIZES["layers"]
    more = {"decoder": 1, "plain decoder": 2}.get(kind, 3)
    new, old = made(kind, start=start), model_of(kind)
    assert parameters(new) - parameters(old) == layers * more * d
    products = [sum(leaf.size for leaf in jax.tree.leaves(m) if leaf.ndim == 2) for m in (new, old)]
    assert products[0] == products[1]
    for block in new.blocks():
        assert block.slots == ("ffn_in", "attn", "ffn")
        assert [join.scale for join in block.joins] == [0.5, 1.0, 0.5]
        assert len({join.norm for join in block.joins}) == 1


@pytest.mark.parametrize(
    ("kind", "scale"),
    [("decoder", 0.5), ("plain decoder", 0.3), ("pre-norm encoder", 2.0), ("vit", 0.5)],
)
def test_kept_is_the_function_that_was(kind, scale):
    x = inputs_of(kind)
    want, got = model_of(kind)(x), made(kind, start="kept", scale=scale)(x)
    np.testing.assert_allclose(got, want, atol=1e-6 * float(jnp.abs(want).max()) + 1e-6)


@pytest.mark.parametrize("kind", ["decoder", "vit"])
def test_an_ffn_in_both_slots_is_another_function(kind):
    """Twice half the FFN is not once the FFN, nor is the FFN in the first slot alone."""
    x, model = inputs_of(kind), model_of(kind)
    want, twice = model(x), made(kind, start="twice")
    assert np.abs(twice(x) - want).max() > 1e-3
    kept = made(kind, start="kept")
    swapped = tree.copy(kept)
    for block in swapped.layers:
        block.ffn_in, block.ffn = block.ffn, block.ffn_in
    np.testing.assert_allclose(kept(x), want, atol=2e-6)
    assert np.abs(swapped(x) - want).max() > 1e-3
    # Without attention nothing stands between them, and two halves are still no whole.
    alone = [b.without("attn") for b in twice.layers]
    one = [b.without("attn") for b in model.layers]
    h = jax.random.normal(jax.random.key(2), (1, 3, 8))
    assert np.abs(alone[0](h, NOTHING)[0] - one[0](h, NOTHING)[0]).max() > 1e-3


@settings(max_examples=15, deadline=None)
@given(
    half=st.integers(1, 6), gated=st.booleans(), scale=st.floats(0.05, 4), seed=st.integers(0, 99)
)
def test_split_ffns_of_one_input_add_up_to_the_ffn(half, gated, scale, seed):
    key = jax.random.key(seed)
    ffn = (GatedFFN if gated else FFN)(3, 2 * half, key=key, bias=True)
    ffn = jax.tree.map(lambda leaf: leaf + 0.1 if leaf.ndim == 1 else leaf, ffn)
    block = with_two_ffns(Block(None, None, None, ffn), start="split", scale=scale)
    x = jax.random.normal(key, (4, 3))
    parts = [scale * part(x) for part in (block.ffn_in, block.ffn)]
    np.testing.assert_allclose(sum(parts), ffn(x), atol=2e-5)
    np.testing.assert_array_equal(block.ffn_in.up.weight.w, ffn.up.weight.w[:, :half])
    assert block.ffn.down.weight.shape == (half, 3) and block.joins[-1].scale == scale


def test_what_is_drawn_depends_on_seed_and_place_and_keeps_its_spread():
    one, same, other = (made("vit", seed=seed) for seed in (1, 1, 2))
    assert equal(one, same) and not equal(one, other)
    drawn = [b.ffn.up.weight.w for b in one.layers] + [b.ffn_in.up.weight.w for b in one.layers]
    assert len({float(w[0, 0]) for w in drawn}) == 4
    config = dataclasses.replace(CONFIGS["vit"], width=64, hidden=256)
    wide, _ = transform.apply(macaron(), ViT(config, key=jax.random.key(0)))
    assert float(wide.layers[0].ffn.down.weight.w.std()) == pytest.approx(
        (2 * 2) ** -0.5 * 128**-0.5, rel=0.05
    )
    after = made("encoder").layers[0].ffn.down.weight.w
    assert float(after.std()) == pytest.approx(6**-0.5, rel=0.3)  # norms after sums: not scaled


def test_the_model_itself_stays_and_nothing_is_shared():
    model = model_of("vit")
    before = jax.tree.map(jnp.copy, model)
    rule = backprop(labelled, optax.sgd(0.1))
    for start in ("twice", "kept"):
        new = made("vit", start=start)
        assert equal(model, before)
        state, _ = rule.step(
            rule.init(jax.tree.map(jnp.copy, new), jax.random.key(0)),
            (IMAGES, jnp.array([0, 1, 2])),
        )
        block = rule.model(state).layers[0]
        assert np.abs(block.ffn_in.down.weight.w - new.layers[0].ffn_in.down.weight.w).max() > 0


KINDS = {
    "decoder": {"kv_heads": 1, "head_dim": 4, "vocab": 256},
    "encoder": {"head": "masked", "head_dim": 4, "vocab": 257, "max_positions": 8},
    "vit": {"image": [8, 8], "patch": 4, "channels": 1, "classes": 10},
}


@pytest.mark.parametrize(
    ("kind", "scan"),
    [
        ("decoder", True),
        pytest.param("decoder", False, marks=pytest.mark.slow),
        pytest.param("encoder", True, marks=pytest.mark.slow),
        pytest.param("vit", False, marks=pytest.mark.slow),
    ],
)
def test_every_kind_is_trained_from_a_configuration(kind, scan, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("def f(x):\n    return x\n" * 60)
    data = {"kind": "images", "batch": 4}
    if kind != "vit":
        data = {"text": [str(text)], "batch": 2, "length": 8, "stride": 8}
    table = {
        "model": {"kind": kind, **KINDS[kind], **SIZES},
        "transform": [{"name": "macaron", "start": "split"}],
        "data": data,
        "run": {"steps": 2, "log_every": 1, "dtype": "float32", "scan": scan},
        "optimizer": {"name": "sgd", "rate": 0.1, "warmup": 0},
    }
    config = from_table(table, TrainConfig)
    train_run(config, tmp_path / "run")
    found = load(tmp_path / "run" / "model")
    found = models.unstack(found) if scan else found
    assert [block.slots for block in found.blocks()] == [("ffn_in", "attn", "ffn")] * 2
    start = fresh(config, jax.random.key(0))
    start = models.unstack(start) if scan else start
    moved = np.abs(found.layers[0].ffn_in.up.weight.w - start.layers[0].ffn_in.up.weight.w)
    assert moved.max() > 0 and type(found) is CLASSES[type(config.model)]


@pytest.mark.parametrize("kind", ["decoder", "encoder", "vit"])
def test_saved_stacked_quantized_and_cut(tmp_path, kind):
    x, model = inputs_of(kind), made(kind, start="split")
    for dtype in ("bfloat16", "float32"):
        each = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), model)
        models.save(each, tmp_path / dtype, format="ffnlab")
        back = models.load(tmp_path / dtype)
        assert equal(back, each)
        stacked = models.stack(back)
        np.testing.assert_allclose(run(stacked, x), run(each, x), atol=TOLERANCE)
        assert equal(models.unstack(stacked), each)
    again, _ = transform.apply(macaron(start="split"), models.stack(model_of(kind)))
    assert equal(models.unstack(again), model)
    packed, _ = transform.apply(nearest(format="int8", group=None), model)
    assert packed.layers[0].ffn_in.up.weight.codes.dtype == jnp.int8
    models.save(packed, tmp_path / "packed", format="ffnlab")
    assert equal(models.load(tmp_path / "packed"), packed)
    want = run(model, x)
    assert 0 < float(jnp.abs(run(packed, x) - want).max()) < 0.1 * float(jnp.abs(want).max())
    cut, stats = transform.apply(finercut(remove=2, protect=None), model, [x])
    gone = [getattr(b, slot) is None for b in cut.layers for slot in b.slots]
    assert sum(gone) == 2 and stats.step.shape == (2, 3)


def test_a_decoder_generates_as_it_predicts():
    model = made("decoder", start="split")
    assert flops_per_token(model, 4) == flops_per_token(model_of("decoder"), 4)
    new = models.generate(model, [[1, 2, 3]], max_tokens=2).lists()[0]
    logits = run(model, jnp.array([[1, 2, 3, new[0]]]))
    assert new == logits[0, 2:].argmax(-1).tolist()


@pytest.mark.slow
def test_a_gated_macaron_goes_through_fireq_and_chess():
    model, batches = made("decoder", start="split"), [np.asarray(TOKENS)]
    tight, _ = transform.apply(fireq(group=2, top_k=1, kv=None, query=None), model, batches)
    assert tight.layers[1].ffn_in.up.weight.codes.dtype == jnp.uint8
    sparse, _ = transform.apply(chess(sparsity=0.3), model, batches)
    assert sparse.layers[0].ffn_in.threshold.shape == (6,)


class Pull(nnx.Module):
    """A linear attention: y = M x over all tokens at once."""

    mixes = True

    def __init__(self, matrix):
        self.matrix = nnx.Param(matrix, axes=("embed", "embed"))

    def __call__(self, x, context, cache=None):
        flat = x.reshape(len(x), -1) @ self.matrix.get_value().T
        return flat.reshape(x.shape), cache


def fields(seed, n=6):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(2, n, n)) / n**0.5, draw.normal(size=n)


def test_a_block_is_a_step_of_euler_inside_the_splitting():
    """Attention and FFN as linear fields: the block of two slots is Lie's, the Macaron Strang's."""
    draw = np.random.default_rng(0)
    a, f, x = draw.normal(size=(6, 6)), draw.normal(size=(3, 3)), draw.normal(size=(1, 2, 3))
    move = Linear.of(Dense(jnp.asarray(f.T, jnp.float32)), axes=("embed", "mlp"))
    block = Block(None, Pull(jnp.asarray(a, jnp.float32)), None, move)
    three = block.with_slot("ffn_in", move, after=None, join=Join(0.5))
    three.joins = (Join(0.5), Join(), Join(0.5))
    pull, push = euler(lambda x: a @ x), euler(lambda x: np.kron(np.eye(2), f) @ x)
    for form, step in ((block, lie(pull, push)), (three, strang(pull, push))):
        y = form(jnp.asarray(x, jnp.float32), NOTHING)[0]
        np.testing.assert_allclose(y.reshape(-1), step(x.reshape(-1), 1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_orders_of_the_splittings(seed):
    (a, f), x = fields(seed)
    sizes, truth = [2.0**-k for k in range(2, 8)], exact(a + f)
    flows, steps = (exact(a), exact(f)), (euler(lambda x: a @ x), euler(lambda x: f @ x))
    orders = {
        name: slope(split(*parts), truth, x, sizes)[0]
        for name, split, parts in (
            ("lie", lie, flows),
            ("strang", strang, flows),
            ("lie, Euler", lie, steps),
            ("strang, Euler", strang, steps),
        )
    }
    wanted = {"lie": 2, "strang": 3, "lie, Euler": 2, "strang, Euler": 2}
    assert orders == pytest.approx(wanted, abs=0.15)


def test_the_exact_flow_is_the_differential_equations():
    (a, _), x = fields(5)
    solved = scipy.integrate.solve_ivp(lambda _, x: a @ x, (0, 0.7), x, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(exact(a)(x, 0.7), solved.y[:, -1], rtol=1e-8)
    # Leading errors of one step: h^2/2 [F, A] x of Lie, nothing of second order of Strang.
    (a, f), x = fields(6)
    h, truth = 1e-4, exact(a + f)
    error = lie(exact(a), exact(f))(x, h) - truth(x, h)
    np.testing.assert_allclose(error / h**2, (f @ a - a @ f) @ x / 2, atol=1e-2)
    error = strang(exact(a), exact(f))(x, h) - truth(x, h)
    assert np.abs(error).max() < 1e-10
    # Of Euler's steps: second order in both, of Strang's splitting A A x / 2 and F F x / 4 stay.
    error = strang(euler(lambda x: a @ x), euler(lambda x: f @ x))(x, h) - truth(x, h)
    np.testing.assert_allclose(error / h**2, -(a @ a / 2 + f @ f / 4) @ x, atol=1e-2)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [((0.1,), "two or more"), ((0.1, 0.1), "two or more"), ((0.1, -0.2), "above 0")],
)
def test_slopes_need_sizes_and_errors(sizes, said):
    flow = exact(np.eye(2))
    with pytest.raises(ConfigError, match=said):
        slope(euler(lambda x: x), flow, np.ones(2), sizes)
    with pytest.raises(ConfigError, match="without error"):
        slope(flow, flow, np.ones(2), (0.1, 0.2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": "half"}, r"start='half' is not one of \('drawn', 'split', 'twice', 'kept'\)"),
        ({"scale": 0.0}, "scale=0.0 must be a positive number"),
        ({"scale": -0.5}, "scale=-0.5"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"scale": float("inf")}, "scale=inf"),
        ({"seed": -1}, "seed=-1 must lie in"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        macaron(**options)


def test_models_that_do_not_fit_are_refused():
    odd = ViT(dataclasses.replace(CONFIGS["vit"], hidden=13), key=jax.random.key(0))
    gemma = Decoder(
        dataclasses.replace(CONFIGS["decoder"], sandwich_norms=True), key=jax.random.key(0)
    )
    cases = (
        (
            odd,
            "drawn",
            r"layers\[0\] has an FFN of 13 channels, which start='drawn' halves; an even",
        ),
        (odd, "split", "an even number is accepted, or start='twice' or 'kept'"),
        (made("vit"), "drawn", r"layers\[1\] is a Macaron already"),
        (gemma, "twice", "joins otherwise than"),
        (model_of("encoder"), "kept", "one more changes the function"),
        (transform.apply(nearest(format="int8"), tiny())[0], "split", "of dense matrices"),
        (models.remove(tiny(), [1]), "twice", r"layers\[0\] has a NoneType as its FFN"),
    )
    for model, start, said in cases:
        with pytest.raises(ConfigError, match=said):
            transform.apply(macaron(start=start), model)
    for start in ("twice", "kept"):
        assert transform.apply(macaron(start=start), odd)[0].layers[0].ffn.up.weight.shape[1] == 13
    shared, _ = transform.apply(share(repeats=(2,)), model_of("vit"))
    with pytest.raises(ConfigError, match="share blocks"):
        transform.apply(macaron(), shared)
    with pytest.raises(ConfigError, match="start='drawn' needs a key"):
        with_two_ffns(model_of("vit").layers[0])
    with pytest.raises(ConfigError, match="the block has an FFN of 13 channels"):
        with_two_ffns(odd.layers[0], start="split")


def test_it_is_put_beside_other_mixing():
    """What mixes tokens may be anything: blocks of PfLayer become Macarons too."""
    mixed, _ = transform.apply(pflayer(every=1, first=0), model_of("vit"))
    new, _ = transform.apply(macaron(start="kept"), mixed)
    np.testing.assert_allclose(new(IMAGES), mixed(IMAGES), atol=1e-5)
