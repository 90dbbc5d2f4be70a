"""Structured FFNs: sizes, starts, guides and their schedule, and where such models go further."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import models, transform, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import GroupedLinear, Guided, Linear
from ffnlab.learning import backprop
from ffnlab.losses import Moment, next_token
from ffnlab.models import ViT, ViTConfig, account
from ffnlab.pruning import finercut
from ffnlab.quantization import nearest
from ffnlab.routing import upcycle
from ffnlab.structure import (
    guided,
    paper_options,
    premerged,
    self_guided,
    share_of_guide,
    structured,
    unguided,
)
from ffnlab.structure.structured_ffn import CROSSOVER, FORMS, check_options, guides_of
from ffnlab.testing import batches, equal, tiny, tiny_encoder
from ffnlab.weights import BlockDense, BlockShuffle, Dense, Int8, LowRank, Merged
from tests.fixtures.structured_ffn import record

TEXT = batches()[0]
FORM_OPTIONS = {
    "low_rank": {"rank": 4},
    "block_dense": {"rank": 8, "blocks": 4},
    "block_shuffle": {"blocks": 4},
}
run = jax.jit(lambda model, x: model(x))


@functools.cache
def vit():
    config = ViTConfig((4, 4), 2, 8, 32, 2, 2, channels=1, classes=3, pool="mean")
    return ViT(config, key=jax.random.key(0))


IMAGES = jax.random.uniform(jax.random.key(1), (3, 4, 4, 1))
MODELS = {
    "decoder": (tiny, TEXT),
    "encoder": (tiny_encoder, TEXT),
    "vit": (vit, IMAGES),
}


def thin(model=None, **options):
    """A model with structured FFNs beyond the first layer."""
    made = structured(**options or {"rank": 4})
    return transform.apply(made, tiny() if model is None else model)[0]


def whole(**options):
    """The same of the tiny decoder, with guides."""
    return transform.apply(guided(), thin(**options))[0]


OFTEN = tuple(zip(MODELS, FORMS, strict=True))  # each kind and each form once; all pairs are slow
PAIRS = [
    pytest.param(kind, form, marks=[] if (kind, form) in OFTEN else pytest.mark.slow)
    for kind in MODELS
    for form in FORMS
]


@pytest.mark.parametrize(("kind", "form"), PAIRS)
def test_factorized_models_are_saved_stacked_quantized_and_cut(kind, form, tmp_path):
    make, x = MODELS[kind]
    options = {"form": form, "first": True, **FORM_OPTIONS[form]}
    for dtype in ("bfloat16", "float32"):
        start = jax.tree.map(lambda leaf, d=dtype: leaf.astype(d), make())
        model = thin(start, **options)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(model))
        models.save(model, tmp_path / dtype, format="ffnlab")
        assert equal(models.load(tmp_path / dtype), model)
        assert equal(models.unstack(models.stack(model)), model)
    np.testing.assert_allclose(run(models.stack(model), x), run(model, x), atol=1e-5)
    small, _ = transform.apply(nearest(format="int8", group=None), model)
    up = small.layers[1].ffn.up.weight
    assert isinstance(up, Int8)
    near = np.abs(up.dense() - model.layers[1].ffn.up.weight.dense()).max()
    assert near <= 0.51 / 127 * np.abs(up.dense()).max()
    cut, _ = transform.apply(finercut(remove=1), model, [x])
    assert sum(part is None for b in cut.layers for part in (b.attn, b.ffn)) == 1
    models.save(cut, tmp_path / "cut", format="ffnlab")
    assert equal(models.load(tmp_path / "cut"), cut)


def test_guided_and_merged_models_are_saved_stacked_and_quantized(tmp_path):
    both = transform.apply(premerged(rows=64), thin(form="block_dense", rank=8))[0]
    for name, model in (("guided", whole()), ("merged", both)):
        models.save(model, tmp_path / name, format="ffnlab")
        back = models.load(tmp_path / name)
        assert equal(back, model)
        assert equal(models.unstack(models.stack(back)), model)
        small, _ = transform.apply(nearest(format="int8", group=None), model)
        assert np.isfinite(run(small, TEXT)).all()
    learning = jax.tree_util.tree_leaves_with_path(tree.trained(both)[0])
    assert not any("layers[1].ffn." in jax.tree_util.keystr(path) for path, _ in learning)


def test_the_first_layer_stays_and_the_nearest_matrices_stand_in_the_others():
    model, found = tiny(), thin(rank=4)
    assert equal(found.layers[0], model.layers[0]) and equal(
        found.layers[1].attn, model.layers[1].attn
    )
    for name in ("gate", "up", "down"):
        new, old = (getattr(m.layers[2].ffn, name).weight for m in (found, model))
        assert equal(new, LowRank.truncate(old.w, 4))
    every = thin(form="block_shuffle", first=True)
    assert equal(
        every.layers[0].ffn.up.weight, BlockShuffle.project(model.layers[0].ffn.up.weight.w, 2)
    )
    half = thin(form="block_dense").layers[1].ffn.down.weight
    assert equal(half, BlockDense.project(model.layers[1].ffn.down.weight.w, 8, 2))


def test_biases_stay_and_experts_are_factorized_each_for_itself():
    shaken = jax.tree.map(lambda leaf: leaf + 0.1, tiny_encoder())
    found = thin(shaken)
    assert equal(found.layers[1].ffn.up.b, shaken.layers[1].ffn.up.b)
    mixture, _ = transform.apply(upcycle(experts=3), tiny())
    found = thin(mixture)
    old, new = (tree.select(m.layers[1], tree.of_type(GroupedLinear)) for m in (mixture, found))
    assert old.keys() == new.keys() and len(new) == 3
    for path, layer in new.items():
        w = old[path].weight.w
        each = [LowRank.truncate(w[i], 4).dense() for i in range(3)]
        np.testing.assert_allclose(layer.weight.dense(), jnp.stack(each), atol=1e-5)
    routers = [n for p, n in tree.walk(found) if p.endswith(".router")]
    assert routers and all(type(router.weight) is Dense for router in routers)
    assert np.isfinite(run(found, TEXT)).all()


def orthonormal(w):
    """Whether the shorter side of matrices is orthonormal."""
    small = w @ w.swapaxes(-1, -2) if w.shape[-2] <= w.shape[-1] else w.swapaxes(-1, -2) @ w
    return np.allclose(small, np.eye(small.shape[-1]), atol=1e-5)


def test_spectral_starts_are_orthonormal_blocks_or_balanced_factors():
    for form in ("block_dense", "block_shuffle"):
        w = thin(form=form, start="spectral", **FORM_OPTIONS[form]).layers[1].ffn.up.weight
        assert all(orthonormal(np.float64(leaf)) for leaf in jax.tree.leaves(w))
    w = thin(rank=4, start="spectral").layers[1].ffn.up.weight
    values = np.linalg.svd(np.float64(w.dense()), compute_uv=False)[:4]
    for factor in (w.a.T @ w.a, w.b @ w.b.T):
        np.testing.assert_allclose(factor, np.diag(values), atol=1e-6)
    assert 0.05 < values[0] < 0.25  # of a Gaussian matrix 16 x 32 of deviation .02: about .19
    assert thin(start="gaussian").layers[1].ffn.up.weight.a.shape == (16, 8), "half of the side"
    drawn = thin(rank=8, start="gaussian").layers[1].ffn
    entries = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(drawn)])
    assert entries.std() == pytest.approx(0.02, rel=0.15)
    assert equal(thin(rank=4, start="spectral", seed=1), thin(rank=4, start="spectral", seed=1))
    assert not equal(thin(rank=4, start="spectral", seed=1), thin(rank=4, start="spectral"))


def formula(form, n, m, rank, blocks):
    """Parameters of a matrix, as the card counts them."""
    if form == "block_shuffle":
        return min(n, m) * (n + m) // blocks
    return rank * (m + n // blocks)


@pytest.mark.parametrize(("percent", "shares"), [(63, (0.625, 0.625, 0.625)), (32, (0.3125,) * 3)])
def test_sizes_of_the_paper(percent, shares):
    """Of a stream of 768: 62.5 % and 31.25 % of the parameters, whatever the form."""
    for form, share in zip(FORMS, shares, strict=True):
        options = paper_options(form, 768, percent)
        kept = sum(
            formula(form, *shape, options.get("rank", 0), options.get("blocks", 1))
            for shape in ((768, 3072), (3072, 768))
        )
        assert kept / (2 * 768 * 3072) == share
    assert paper_options("block_dense", 768, 32) == {
        "form": "block_dense",
        "rank": 256,
        "blocks": 2,
    }


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_share_is_that_of_the_official_code(fixtures, schedule):
    steps, asked = record.STEPS
    with np.load(fixtures / "structured_ffn" / "expected.npz") as file:
        want = file[schedule]
    found = [float(share_of_guide(t, steps=steps, schedule=schedule)) for t in asked]
    np.testing.assert_allclose(found, want, atol=1e-6)
    assert found[0] == 1 and found[asked.index(steps)] == 0 == found[-1]


def test_guides_change_nothing_at_first_and_nothing_when_their_share_is_0():
    model = thin(form="block_shuffle")
    beside = transform.apply(guided(), model)[0]
    assert len(guides_of(beside)) == 6
    for path, layer in guides_of(beside).items():
        structured_map = tree.select(model, tree.at(path))[path]
        np.testing.assert_array_equal(layer.guide.weight.w, structured_map.weight.dense())
    np.testing.assert_allclose(run(beside, TEXT), run(model, TEXT), atol=1e-5)
    zero = tree.map_at(beside, tree.of_type(Guided), lambda layer: layer.told(jnp.float32(0), None))
    bare = transform.apply(unguided(), zero)[0]
    assert equal(bare, model)
    np.testing.assert_array_equal(run(bare, TEXT), run(zero, TEXT))


@pytest.mark.parametrize("stacked", [False, True])
def test_a_guided_run_ends_without_guides_and_learns(stacked):
    model = models.stack(whole(first=True, rank=4)) if stacked else whole()
    rule = backprop(self_guided(steps=3), optax.adam(1e-2), informed=True)
    state, nats, shares = rule.init(model, jax.random.key(0)), [], []
    for _ in range(5):
        state, metrics = rule.step(state, TEXT)
        nats.append(float(metrics["loss"]))
        shares.append((round(float(metrics["alpha"]), 3), float(metrics["guides"])))
    assert [share for share, _ in shares] == [1.0, 0.75, 0.25, 0.0, 0.0]
    assert shares[0][1] == 1 and shares[3][1] == shares[4][1] == 0
    assert nats[-1] < nats[0]
    alphas = [node.alpha[...] for node in guides_of(state.model).values()]
    assert all(not np.any(alpha) for alpha in alphas)
    assert all(node.running is None for node in guides_of(state.model).values())
    transform.apply(unguided(), state.model)


def test_half_of_the_guides_run_and_the_first_loss_is_that_of_the_map():
    model, loss = whole(), self_guided(steps=200)
    told = lambda step: loss(model, TEXT[:1, :2], Moment(step, jax.random.key(step)))  # noqa: E731
    rates = jax.jit(lambda steps: jax.lax.map(lambda t: told(t)[1]["guides"], steps))(
        jnp.arange(200)
    )
    assert abs(float(rates.mean()) - 0.5) < 0.05 and float(rates[:5].mean()) > 0.95
    assert len(np.unique(np.asarray(rates))) > 3, "every map draws for itself"
    every = self_guided(steps=200, reduce=False)
    moment = Moment(jnp.int32(100), jax.random.key(0))
    assert float(every(model, TEXT, moment)[1]["guides"]) == 1
    first = loss(model, TEXT, Moment(jnp.int32(0), jax.random.key(0)))
    np.testing.assert_allclose(first[0], next_token(thin(), TEXT)[0], atol=1e-5)
    later = loss(model, TEXT, moment._replace(step=jnp.int32(199)))[2]
    assert len(later) == 6 and all(float(share) == 0 for share in later.values())


def test_statistics_of_the_loss_inside_are_kept():
    seen = lambda model, batch: (jnp.float32(0), {}, {"mine": jnp.ones(())})  # noqa: E731
    mean, metrics, later = self_guided(seen, steps=2)(
        whole(), TEXT, Moment(jnp.int32(0), jax.random.key(0))
    )
    assert float(later["mine"]) == 1 and len(later) == 7 and set(metrics) == {"alpha", "guides"}
    assert float(mean) == 0


def test_products_are_kept_beside_factors_for_few_rows():
    model = thin(form="block_shuffle", first=True)
    both, _ = transform.apply(premerged(rows=20), model)
    up = both.layers[0].ffn.up.weight
    assert isinstance(up, Merged) and equal(up.factors, model.layers[0].ffn.up.weight)
    np.testing.assert_array_equal(run(both, TEXT), run(model, TEXT))  # 24 rows
    np.testing.assert_allclose(run(both, TEXT[:1]), run(model, TEXT[:1]), atol=1e-5)
    assert account.parameters(both) == account.parameters(model)
    usual, _ = transform.apply(premerged(), model)
    assert usual.layers[0].ffn.up.weight.rows == CROSSOVER[BlockShuffle]


def test_a_structured_model_counts_its_own_products():
    model, found = tiny(), thin(rank=4)
    saved = 2 * 3 * (16 * 32 - 4 * (16 + 32))
    assert account.parameters(model) - account.parameters(found) == saved
    assert account.flops_per_token(model, 4) - account.flops_per_token(found, 4) == 2 * saved
    x = jnp.ones((5, 16))
    wide = thin(form="block_shuffle", blocks=4).layers[1].ffn
    counted = account.compiled_cost(lambda ffn, x: ffn(x), wide, x).multiply_adds
    assert counted == 5 * 3 * 16 * 48 // 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"form": "block_dense", "blocks": 0}, "blocks=0 must be at least 1"),
        ({"form": "block_shuffle", "rank": 4}, "rank=4: a block_shuffle has none"),
        ({"blocks": 2}, "blocks=2: a low_rank matrix has none"),
        ({"rank": 17}, r"layers\[1\].ffn.gate: rank=17 is outside 1..16 of a \(16, 32\) matrix"),
        (
            {"form": "block_shuffle", "blocks": 3},
            r"blocks=3 does not divide rows=16; one of \[1, 2",
        ),
        ({"form": "block_dense", "rank": 6, "blocks": 4}, "blocks=4 does not divide rank=6"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        transform.apply(structured(**options), tiny())


def test_bad_schedules_and_models_are_refused():
    for steps in (0, -3):
        with pytest.raises(ConfigError, match=f"steps={steps} must be at least 1"):
            self_guided(steps=steps)
    with pytest.raises(ConfigError, match="schedule='step' is not one of"):
        share_of_guide(0, steps=2, schedule="step")
    with pytest.raises(ConfigError, match=r"form='monarch' is not one of \['low_rank', 'block_d"):
        check_options("monarch", "weights", None, None)
    with pytest.raises(ConfigError, match=r"start='zero' is not one of \['weights', 'spectral'"):
        check_options("low_rank", "zero", None, None)
    with pytest.raises(ConfigError, match="rows=-1 must be at least 0"):
        premerged(rows=-1)
    with pytest.raises(ConfigError, match="percent=50"):
        paper_options("low_rank", 64, 50)
    moment = Moment(jnp.int32(0), jax.random.key(0))
    with pytest.raises(ConfigError, match="the model has no guides; structure.guided makes them"):
        self_guided(steps=2)(tiny(), TEXT, moment)
    shallow = dataclasses.replace(tiny().config, layers=1)
    for made, model, said in (
        (structured(), models.Decoder(shallow, key=jax.random.key(0)), "beyond the first layer"),
        (structured(rank=2), thin(), r"layers\[1\].ffn.gate: its weight is a LowRank; factorize"),
        (guided(), tiny(), "has no structured map; structured makes them"),
        (guided(), whole(), "has guides already"),
        (premerged(), tiny(), "has no structured map"),
        (unguided(), tiny(), "has no guides"),
        (unguided(), whole(), r"layers\[1\].ffn.down: its guide has a share"),
    ):
        with pytest.raises(ConfigError, match=said):
            transform.apply(made, model)
    assert isinstance(transform.apply(unguided(force=True), whole())[0].layers[1].ffn.up, Linear)
