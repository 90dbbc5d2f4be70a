"""RePaViT: idle channels against the official code, what a fold keeps, and what is refused."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab import losses, models, transform, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import BatchNorm, FoldedFFN, IdleFFN, Statistic
from ffnlab.learning import backprop
from ffnlab.models import ViT, ViTConfig, account
from ffnlab.pruning import finercut
from ffnlab.quantization import fireq, nearest
from ffnlab.structure import idle_ratios, repa, repa_fold
from ffnlab.structure.repavit import active_channels
from ffnlab.testing import tiny
from ffnlab.weights import Dense
from tests import hashed
from tests.fixtures.repavit import record

CONFIG = ViTConfig((4, 4), 2, 8, 32, 2, 2, channels=1, classes=3, pool="mean")
IMAGES = jax.random.uniform(jax.random.key(1), (3, 4, 4, 1))
TOLERANCE = 1e-5  # float32, outputs of about one
run = jax.jit(lambda model, x: model(x))


@functools.cache
def vit():
    return ViT(CONFIG, key=jax.random.key(0))


def shaken(model, seed=0):
    """The model with drawn batch norms: statistics, scales and biases."""
    draw = np.random.default_rng(seed)

    def changed(norm):
        d = norm.mean.shape
        new = norm.with_statistics(
            jnp.asarray(draw.normal(0, 0.5, d), jnp.float32),
            jnp.asarray(draw.uniform(0.5, 2, d), jnp.float32),
        )
        for name, low, high in (("scale", 0.5, 1.5), ("bias", -0.5, 0.5)):
            held = getattr(new, name)
            value = jnp.asarray(draw.uniform(low, high, d), held.get_value().dtype)
            setattr(new, name, held.replace(value))
        return new

    return tree.map_at(model, tree.of_type(BatchNorm), changed)


@functools.cache
def trained(idle=0.75, schedule="constant"):
    """A ViT with idle channels, whose norms are as if trained."""
    return shaken(transform.apply(repa(idle=idle, schedule=schedule), vit())[0])


def fold(model, **options):
    return transform.apply(repa_fold(**options), model)[0]


def official(idle):
    """A block of the official code's parameters, without attention."""
    width, hidden = record.WIDTH, record.HIDDEN
    config = dataclasses.replace(CONFIG, layers=1, width=width, hidden=hidden)
    model, _ = transform.apply(repa(idle=idle), ViT(config, key=jax.random.key(0)))
    block = model.layers[0].without("attn")
    shapes = {"fc1": (hidden, width), "fc2": (width, hidden)}
    drawn = lambda name, shape: jnp.asarray(hashed.parameter(name, shape))  # noqa: E731
    for name, fc in (("up", "fc1"), ("down", "fc2")):
        w = drawn(f"{fc}.weight", shapes[fc]).T
        linear = getattr(block.ffn, name).replace(Dense(w), drawn(f"{fc}.bias", w.shape[1:]))
        setattr(block.ffn, name, linear)
    for ours, theirs, d in ((block.ffn_norm, "norm1", width), (block.ffn.norm, "norm2", hidden)):
        ours.scale = ours.scale.replace(drawn(f"{theirs}.weight", (d,)))
        ours.bias = ours.bias.replace(drawn(f"{theirs}.bias", (d,)))
        for name, key in (("mean", "running_mean"), ("variance", "running_var")):
            value = drawn(f"{theirs}.{key}", (d,))
            setattr(ours, name, Statistic(value, axes=getattr(ours, name).axes))
    return tree.replace(model, {"layers[0]": block})


@pytest.mark.parametrize("idle", record.IDLE)
def test_the_official_code_gives_the_same_before_and_after_the_fold(fixtures, idle):
    with np.load(fixtures / "repavit" / "expected.npz") as file:
        want, want_folded, count = (file[f"{idle}{end}"] for end in ("", " folded", " counts"))
    model, x = official(idle), jnp.asarray(record.X, jnp.float32)
    small = fold(model)
    context = models.vit.Context({}, {})
    for found, wanted in ((model, want), (small, want_folded)):
        y = found.layers[0](x, context)[0]
        np.testing.assert_allclose(y, wanted, atol=TOLERANCE)
    ffn = small.layers[0].ffn
    assert sum(leaf.size for leaf in jax.tree.leaves(ffn)) == count.item()


@pytest.mark.parametrize(("idle", "entries"), [(0.75, 3072), (0.5, 5120), (1.0, 1024), (0.9, 1856)])
def test_a_folded_ffn_has_as_many_entries_as_the_paper_says(idle, entries):
    config = dataclasses.replace(CONFIG, width=32, hidden=128, layers=1)
    model = jax.eval_shape(lambda: ViT(config, key=jax.random.key(0)))
    small = jax.eval_shape(lambda m: fold(transform.apply(repa(idle=idle), m)[0]), model)
    ffn = small.layers[0].ffn
    matrices = [m.weight for m in (ffn.up, ffn.down, ffn.straight) if m is not None]
    assert sum(math.prod(w.shape) for w in matrices) == entries


@pytest.mark.parametrize("idle", [0.0, 0.5, 0.75, 1.0])
def test_a_fold_keeps_the_whole_model(idle):
    model = trained(idle)
    small = fold(model)
    np.testing.assert_allclose(run(small, IMAGES), run(model, IMAGES), atol=TOLERANCE)
    for block in small.layers:
        assert isinstance(block.ffn, FoldedFFN) and block.ffn_norm is None
        assert not block.joins[1].residual and block.joins[0].residual
        assert (block.ffn.up is None) == (idle == 1.0)


@settings(max_examples=5, deadline=None)  # each compiles networks of its own
@given(st.integers(1, 6), st.integers(1, 12), st.floats(0, 1), st.integers(0, 99))
def test_any_ffn_folds_to_what_it_was(width, hidden, idle, seed):
    config = ViTConfig((2, 2), 2, width, hidden, 1, 1, channels=1, classes=2, pool="mean")
    model = ViT(config, key=jax.random.key(seed))
    model = shaken(transform.apply(repa(idle=idle), model)[0], seed)
    block, small = model.layers[0].without("attn"), fold(model).layers[0].without("attn")
    x = jax.random.normal(jax.random.key(seed), (1, 3, width))
    context = models.vit.Context({}, {})
    want, found = block(x, context)[0], small(x, context)[0]
    np.testing.assert_allclose(found, want, atol=5e-5, rtol=1e-5)  # scales of a few units


@settings(max_examples=50)
@given(st.integers(1, 4096), st.fractions(0, 1, max_denominator=100))
def test_active_channels_are_the_exact_ceiling(hidden, idle):
    assert active_channels(hidden, float(idle)) == math.ceil(hidden * (1 - idle))


def test_channels_are_active_at_the_front_and_normed_after_the_nonlinearity():
    model = trained(0.75)
    ffn = model.layers[0].ffn
    x = jax.random.normal(jax.random.key(3), (4, 8))
    h = np.array(ffn.up(x))
    assert ffn.active == 8
    h[:, :8] = np.asarray(jax.nn.gelu(h[:, :8], approximate=False))
    a, c = ffn.norm.affine()
    np.testing.assert_allclose(ffn(x), ffn.down(jnp.asarray(h) * a + c), atol=TOLERANCE)


def test_schedules():
    assert idle_ratios(3, 0.5) == (0.5, 0.5, 0.5)
    found = idle_ratios(5, 0.75, "linear")
    np.testing.assert_allclose(found, [0.625, 0.75, 0.875, 1.0, 0.0])
    assert np.mean(found) == pytest.approx(0.65) and idle_ratios(1, 0.3) == (0.3,)
    model, _ = transform.apply(repa(idle=0.75, schedule="linear"), vit())
    assert [block.ffn.active for block in model.layers] == [0, 32]


def test_it_learns_with_its_norms_and_then_folds():
    model, _ = transform.apply(repa(idle=0.5), vit())
    rule = backprop(losses.measuring(losses.labelled), optax.sgd(0.05))
    state, batch = rule.init(model, jax.random.key(0)), (IMAGES, jnp.array([0, 1, 2]))
    nats = []
    for _ in range(12):
        state, metrics = rule.step(state, batch)
        nats.append(float(metrics["loss"]))
    learned = rule.model(state)
    assert nats[-1] < 0.5 * nats[0]
    moved = tree.select(learned, tree.of_type(BatchNorm))
    assert len(moved) == 4 and all(norm.mean.get_value().any() for norm in moved.values())
    small = fold(learned)
    np.testing.assert_allclose(run(small, IMAGES), run(learned, IMAGES), atol=TOLERANCE)


def test_the_running_statistics_are_torchs_after_one_step():
    """mean <- .9 mean + .1 batch mean; the variance likewise, of sums divided by count - 1."""
    model, _ = transform.apply(repa(idle=0.5), vit())
    model.layers = type(model.layers)([block.without("attn") for block in model.layers])
    _, _, found = losses.measuring(losses.labelled)(model, (IMAGES, jnp.array([0, 1, 2])))
    h = np.asarray(model.embed_images(IMAGES)).reshape(-1, 8)
    mean, variance = found["layers[0].ffn_norm.mean"], found["layers[0].ffn_norm.variance"]
    np.testing.assert_allclose(mean, 0.1 * h.mean(0), atol=1e-6)
    settled = variance.settle(1)
    np.testing.assert_allclose(settled, 0.9 + 0.1 * h.var(0, ddof=1), rtol=1e-5)


def test_a_folded_model_is_packed_and_its_attention_alone_can_go():
    small = fold(trained())
    cut, _ = transform.apply(finercut(remove=1, protect=None), small, [IMAGES])
    gone = [(block.attn is None, block.ffn is None) for block in cut.layers]
    assert sorted(gone) == [(False, False), (True, False)]  # a folded slot holds the residual
    tight, _ = transform.apply(fireq(group=8, top_k=1, kv=None, query=None), small, [IMAGES])
    assert tight.layers[1].ffn.straight.weight.codes.dtype == jnp.uint8


def test_a_folded_model_costs_what_the_paper_says():
    config = dataclasses.replace(CONFIG, width=64, hidden=256, layers=1)
    model = shaken(transform.apply(repa(idle=0.75), ViT(config, key=jax.random.key(0)))[0])
    small = fold(model)
    x = jnp.ones((16, 64))

    def products(block):
        return account.compiled_cost(lambda ffn, x: ffn(x), block.ffn, x).multiply_adds

    before, after = products(model.layers[0]), products(small.layers[0])
    assert before == 2 * 16 * 64 * 256 and after == before * (1 - 0.75 + 1 / 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"idle": 1.5}, r"idle=1.5 must lie in \[0, 1\]"),
        ({"idle": -0.1, "schedule": "linear"}, r"idle=-0.1 must lie"),
        ({"idle": float("nan")}, "idle=nan"),
        ({"momentum": 2.0}, "momentum=2.0"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        repa(**options)
    with pytest.raises(ConfigError, match="schedule='cosine' is not one of"):
        idle_ratios(2, 0.5, "cosine")
    with pytest.raises(ConfigError, match="layers=1: at least 2 are needed"):
        idle_ratios(1, 0.5, "linear")


def test_models_that_do_not_fit_are_refused():
    gated = tiny()
    for model, said in (
        (gated, r"repa: layers\[0\].ffn is a GatedFFN; an ungated FFN is accepted"),
        (trained(), r"layers\[0\].ffn is a IdleFFN"),
        (transform.apply(nearest(format="int8"), vit())[0], "is an FFN that is not dense"),
    ):
        with pytest.raises(ConfigError, match=said):
            transform.apply(repa(), model)
    deep = ViT(dataclasses.replace(CONFIG, layers=4), key=jax.random.key(0))
    said = r"idle=0.2: the linear schedule of 4 layers begins at -0.067; ratios from 0.250"
    with pytest.raises(ConfigError, match=said):
        transform.apply(repa(idle=0.2, schedule="linear"), deep)
    assert min(idle_ratios(4, 0.25, "linear")) == 0


def test_what_cannot_be_folded_is_refused():
    fresh, _ = transform.apply(repa(), vit())
    with pytest.raises(ConfigError, match=r"layers\[0\]: its batch norms were never updated"):
        fold(fresh)
    np.testing.assert_allclose(
        run(fold(fresh, force=True), IMAGES), run(fresh, IMAGES), atol=TOLERANCE
    )
    with pytest.raises(ConfigError, match="the model has no IdleFFN"):
        fold(vit())
    packed, _ = transform.apply(nearest(format="int8", group=None), trained())
    with pytest.raises(ConfigError, match=r"ffn.up is a Int8; fold before changing the weights"):
        fold(packed)
    other = tree.copy(trained())
    other.layers[1].ffn_norm = vit().layers[1].ffn_norm
    with pytest.raises(ConfigError, match=r"layers\[1\]: no BatchNorm stands before the FFN"):
        fold(other)


def test_parts_that_do_not_fit_are_refused():
    ffn = trained().layers[0].ffn
    for active in (-1, 33):
        with pytest.raises(ConfigError, match=rf"active={active} must lie in 0..32"):
            IdleFFN(ffn.up, ffn.down, active=active, norm=ffn.norm)
    with pytest.raises(ConfigError, match="the norm has 8"):
        IdleFFN(ffn.up, ffn.down, active=1, norm=BatchNorm(8))
