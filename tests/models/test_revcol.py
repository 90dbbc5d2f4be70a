"""Reversible columns: the official network, memory, exactness, and what is refused."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab import models, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import Conv, Linear
from ffnlab.models import RevCol, RevColConfig, account, keep_invertible, revcol_of
from ffnlab.models.image_decoder import doubled, shuffled
from ffnlab.models.revcol_config import LEAST, rebuilt_columns, rounding
from ffnlab.structure.revcol import costs, gradient_error, saving, supervised, with_alphas
from ffnlab.weights import Dense
from tests.fixtures.revcol import record

TOLERANCE = 1e-4  # of scores and gradients of about one, float32 beside float64
OFFICIAL = RevColConfig(
    (32, 64), record.WIDTHS, record.BLOCKS, record.COLUMNS, record.CLASSES, supervision=True
)
SMALL = RevColConfig((8, 8), (4, 6), (1, 1), 4, 3, channels=1, patch=2)
NAMES = (
    (r"stem\.", "stem.0."),
    (r"stem_norm\.", "stem.1."),
    (r"first\.", "subnet0."),
    (r"layers\[(\d+)\]\.", lambda m: f"subnet{int(m[1]) + 1}."),
    (r"alphas\[(\d+)\]", r"alpha\1"),
    (r"levels\[(\d+)\]\.", r"level\1."),
    (r"down\.(?=[wb]$)(?<!ffn\.down\.)", "fusion.down.0."),
    (r"down_norm\.", "fusion.down.1."),
    (r"(?<!ffn\.)up\.(?=[wb]$)", "fusion.up.channel_reschedule.0."),
    (r"up_norm\.", "fusion.up.channel_reschedule.1."),
    (r"decoders\[(\d+)\]\.maps\[(\d+)\]\.", r"decoder_blocks.\1.proj_layers.\2.0."),
    (r"decoders\[(\d+)\]\.norms\[(\d+)\]\.", r"decoder_blocks.\1.proj_layers.\2.1."),
    (r"decoders\[(\d+)\]\.blocks\[(\d+)\]\.", r"decoder_blocks.\1.normal_layers.\2.0."),
    (r"decoders\[(\d+)\]\.out\.", r"decoder_blocks.\1.projback.0."),
    (r"^norms\[(\d+)\]\.", r"cls_blocks.\1.classifier.0."),
    (r"^heads\[(\d+)\]\.", r"cls_blocks.\1.classifier.1."),
    (r"blocks\[(\d+)\]\.", r"blocks.\1."),
    (r"conv\.(?=[wb]$)", "dwconv."),
    (r"ffn\.up\.", "pwconv1."),
    (r"ffn\.down\.", "pwconv2."),
    (r"\.(w|scale)$", ".weight"),
    (r"\.(b|bias)$", ".bias"),
)


def theirs(path):
    """The official name of a parameter."""
    for ours, name in NAMES:
        path = re.sub(ours, name, path)
    return path


def official_shape(model, path, value):
    """The shape that the official code has it in."""
    if "alphas" in path:
        return (1, *value.shape, 1, 1)
    if not path.endswith(".w"):
        return value.shape
    owner = tree.select(model, tree.at(path[:-2]))[path[:-2]]
    rows, out = value.shape
    if isinstance(owner, Conv):
        taps = owner.window.size
        return (out, rows // (taps[0] * taps[1]), *taps)
    is_pointwise = path.startswith("decoders") and ".ffn." not in path
    return (out, rows, 1, 1) if is_pointwise else (out, rows)


def as_ours(array, path, shape):
    """An official array in our shape."""
    if "alphas" in path or not path.endswith(".w"):
        return array.reshape(shape)
    moved = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return moved.reshape(shape)


def parameters_of(model):
    return {path: node for path, node in tree.walk(model) if isinstance(node, nnx.Param)}


@functools.cache
def official():
    """The network with the weights that the fixture was recorded with."""
    model = jax.eval_shape(lambda key: RevCol(OFFICIAL, key=key), jax.random.key(0))
    new = {}
    for path, param in parameters_of(model).items():
        value = param.get_value()
        drawn = record.parameter(theirs(path), official_shape(model, path, value))
        array = jnp.asarray(as_ours(drawn, path, value.shape))
        new[path] = param.replace(Dense(array) if isinstance(value, Dense) else array)
    return tree.replace(model, new)


@pytest.fixture(scope="module")
def expected(fixtures):
    with np.load(fixtures / "revcol" / "expected.npz", allow_pickle=False) as saved:
        return dict(saved)


@pytest.mark.slow
def test_the_official_network_gives_the_same_scores_images_loss_and_gradients(expected):
    """Gradients through rebuilt features on both sides."""
    model, batch = models.stack(official()), (jnp.asarray(record.X, jnp.float32), record.LABELS)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def both(model, batch):
        outputs = model.outputs(batch[0])
        return costs(outputs, batch, *record.COEFFICIENTS)[0], outputs

    (value, outputs), gradient = both(model, batch)
    for i, scores in enumerate(outputs.scores):
        np.testing.assert_allclose(scores, expected[f"scores/{i}"], atol=TOLERANCE)
    for i, found in enumerate(outputs.images):
        np.testing.assert_allclose(found[:, ::8], expected[f"images/{i}"], atol=TOLERANCE)
    assert float(value) == pytest.approx(float(expected["loss"]), abs=TOLERANCE)
    found = {theirs(path): (path, p) for path, p in parameters_of(models.unstack(gradient)).items()}
    for name in record.GRADIENTS:
        path, param = found[name]
        ours = np.asarray(jax.tree.leaves(param)[0])
        want = as_ours(expected[f"gradients/{name}"], path, ours.shape)
        np.testing.assert_allclose(ours, want, atol=TOLERANCE)


@pytest.mark.parametrize("size", record.SIZES)
def test_parameters_are_those_of_the_official_networks(size, expected):
    """But for the alphas of the first column, which there scale zeros."""
    alone, whole = (
        account.parameters(
            jax.eval_shape(
                lambda key, yes=yes: RevCol(revcol_of(size, supervision=yes), key=key),
                jax.random.key(0),
            )
        )
        for yes in (False, True)
    )
    missing = sum(revcol_of(size).widths)
    assert [alone + missing, whole + missing] == expected[f"counts/{size}"].tolist()
    assert revcol_of("tiny", classes=21_841).decoder == "flat"


def nats(model, x):
    logits = model(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(len(x)) % 3).mean()


@functools.cache
def temporary(columns, **options):
    """Bytes that the gradient's program keeps, of abstract columns; 0 for `every` is autodiff."""
    config = dataclasses.replace(SMALL, columns=columns, tolerance=1e9, image=(16, 16), **options)
    model = jax.eval_shape(lambda key: models.stack(RevCol(config, key=key)), jax.random.key(0))
    x = jax.ShapeDtypeStruct((8, 16, 16, 1), jnp.float32)
    compiled = jax.jit(jax.grad(nats)).lower(model, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_does_not_grow_with_columns():
    """The card's gate; plain autodiff keeps every column's activations."""
    few, many = (temporary(n, save_every=n) for n in (4, 32))
    assert many <= 1.1 * few
    assert temporary(32, save_every=0) > 5 * many
    assert many < temporary(32, save_every=1) < 3 * many, "one more set of features a column"


@pytest.mark.slow
def test_the_estimate_of_rounding_is_above_what_rounding_does():
    """And what it accepts is within the card's 1e-4; the rest is not far from it."""
    config = dataclasses.replace(SMALL, columns=17, save_every=0)
    drawn = models.stack(RevCol(config, key=jax.random.key(0)))
    x = jax.random.uniform(jax.random.key(1), (4, 8, 8, 1))
    found = {}
    for every in (4, 16):
        for alpha in (1.0, 0.5):
            model = saving(with_alphas(drawn, alpha), every)
            found[every, alpha] = gradient_error(model, (x, jnp.arange(4) % 3))
            assert found[every, alpha] < rounding(every, alpha)
    assert found[4, 0.5] < 1e-4 and found[16, 1.0] < 1e-4
    assert found[16, 0.5] > 1e-4, "what the constructor refuses"


def test_depths_that_rounding_spoils_are_refused():
    deep = dataclasses.replace(SMALL, columns=17, save_every=16)
    said = r"save_every=16 with alpha=0.5: 16 columns .* off by about 2e\+00 of their norm"
    with pytest.raises(ConfigError, match=said):
        jax.eval_shape(lambda key: RevCol(deep, key=key), jax.random.key(0))
    for told in (
        {"save_every": 4},
        {"save_every": 0},
        {"alpha": 1.0},
        {"alpha": -1.0},
        {"tolerance": 2.0},
        {"columns": 16, "supervision": True, "save_every": 4},
    ):
        config = dataclasses.replace(deep, **told)
        jax.eval_shape(lambda key, config=config: RevCol(config, key=key), jax.random.key(0))
    with jax.enable_x64(True):
        make = lambda key: RevCol(deep, key=key, dtype=jnp.float64)  # noqa: E731
        jax.eval_shape(make, jax.random.key(0))
    assert rebuilt_columns(deep) == 16 and rebuilt_columns(SMALL) == 1
    assert rebuilt_columns(dataclasses.replace(deep, columns=16, supervision=True)) == 4


@functools.cache
def small():
    return RevCol(SMALL, key=jax.random.key(0))


run = jax.jit(lambda model, x: model(x))
IMAGES = jax.random.uniform(jax.random.key(3), (2, 8, 8, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_stacked_and_quantized(tmp_path, dtype):
    from ffnlab import transform
    from ffnlab.quantization import nearest
    from ffnlab.testing import equal

    model = jax.tree.map(lambda leaf: leaf.astype(dtype), small())
    stacked = models.stack(model)
    linears, _ = transform.apply(
        nearest(format="int8", group=None, select=tree.of_type(Linear)), stacked
    )
    assert linears.layers.period[0].levels[0].blocks[0].ffn.up.weight.codes.dtype == jnp.int8
    assert isinstance(linears.stem.weight, Dense)
    for name, each in (("plain", model), ("stacked", stacked), ("int8", linears)):
        models.save(each, tmp_path / name, format="ffnlab")
        back = models.load(tmp_path / name)
        assert equal(back, each)
        difference = np.abs(np.asarray(run(back, IMAGES)) - np.asarray(run(model, IMAGES))).max()
        assert difference < (0.05 if name == "int8" else 1e-5)
    assert equal(models.unstack(stacked), model)
    one = tree.at("layers[1].levels[0].blocks[0].ffn.up")
    mixed, _ = transform.apply(nearest(format="int8", group=None, select=one), model)
    assert np.abs(run(mixed, IMAGES) - run(model, IMAGES)).max() < 0.05, "columns unlike each other"


alphas = st.floats(-2, 2, width=32, allow_subnormal=False)


@settings(max_examples=100, deadline=None)
@given(alphas, alphas, st.sampled_from([LEAST, 0.1]))
def test_no_step_leaves_an_alpha_too_small(alpha, change, least):
    params = {"alphas": jnp.float32(alpha), "gamma": jnp.float32(alpha)}
    optimizer = keep_invertible(least)
    updates = {name: jnp.float32(change) for name in params}
    updates, _ = optimizer.update(updates, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    free = np.float32(alpha) + np.float32(change)
    assert new["gamma"] == free
    found = float(new["alphas"])
    assert abs(found) >= np.float32(least)
    if abs(free) >= np.float32(least):
        assert found == free
    else:
        assert found == pytest.approx(np.copysign(least, free) if free else least, abs=1e-6)


@pytest.mark.slow
def test_an_optimizer_keeps_alphas_after_every_step():
    from ffnlab.learning import backprop

    model = with_alphas(models.stack(small()), 2e-3)
    optimizer = optax.chain(optax.sign_sgd(1.5e-3), keep_invertible())
    rule = backprop(supervised(), optimizer, informed=True)
    state, batch = rule.init(model, jax.random.key(0)), (IMAGES, jnp.array([0, 1]))
    for _ in range(3):
        state, metrics = rule.step(state, batch)
        found = np.concatenate(
            [np.abs(a[...]).ravel() for a in rule.model(state).layers.period[0].alphas]
        )
        assert found.min() >= np.float32(LEAST) and np.isfinite(float(metrics["loss"]))
    assert np.isclose(found, LEAST, atol=1e-7).any(), "some would have been smaller"
    with pytest.raises(ConfigError, match="least=0.0 must be positive"):
        keep_invertible(0.0)
    with pytest.raises(ValueError, match="params=None"):
        keep_invertible().update({}, optax.EmptyState())


def test_grids_are_doubled_from_corner_to_corner():
    """torch's bilinear upsampling with align_corners, and its pixel shuffle, by their formulas."""
    x = np.random.default_rng(0).normal(size=(1, 3, 1, 2)).astype(np.float32)
    found = np.asarray(doubled(jnp.asarray(x)))
    assert found.shape == (1, 6, 2, 2)
    np.testing.assert_allclose(
        found[0, :, 0, 0], np.interp(np.arange(6) * 0.4, range(3), x[0, :, 0, 0]), atol=1e-6
    )
    np.testing.assert_array_equal(found[:, :, 0], found[:, :, 1])
    parts = np.arange(2 * 3 * 8).reshape(1, 2, 3, 8)
    whole = np.asarray(shuffled(jnp.asarray(parts, jnp.float32), 2))
    for y, x, c in ((0, 0, 0), (3, 2, 1), (2, 5, 0)):
        assert whole[0, y, x, c] == parts[0, y // 2, x // 2, 4 * c + 2 * (y % 2) + x % 2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": (8, 10)}, r"image=\[8, 10\].* multiples of 4 are accepted"),
        ({"columns": 6, "supervision": True}, "columns=6: .* multiples of 4 are accepted"),
        ({"alpha": 0.0}, "alpha=0.0: rebuilding divides by it; at least 0.001"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha": float("inf")}, "alpha=inf"),
        ({"gamma": float("nan")}, "gamma=nan must be a finite number"),
        ({"widths": (4,)}, r"widths=\[4\], blocks=\[1, 1\]: one of each for every level"),
        ({"blocks": (1, 0)}, "blocks=0 must be at least 1"),
        ({"columns": 0}, "columns=0 must be at least 1"),
        ({"save_every": -1}, "save_every=-1 must be at least 0"),
        ({"size": 4}, "size=4 must be odd"),
        ({"drop": 1.0}, r"drop=1.0 must lie in \[0, 1\)"),
        ({"tolerance": 0.0}, "tolerance=0.0 above 0"),
        ({"decoder": "none"}, r"decoder='none' is not one of \('deep', 'flat'\)"),
    ],
)
def test_configurations_that_are_refused(change, said):
    config = dict(vars(SMALL)) | {"image": (8, 8)}
    with pytest.raises(ConfigError, match=said):
        RevColConfig(**(config | change))


def test_images_and_sizes_that_are_refused():
    for shape, said in (
        ((1, 8, 8, 3), r"images \(1, 8, 8, 3\); \[b, height, width, 1\]"),
        ((1, 8, 10, 1), r"image=\[8, 10\].* multiples of 4"),
    ):
        with pytest.raises(ConfigError, match=said):
            small()(jnp.zeros(shape))
    with pytest.raises(ConfigError, match="remat='nothing' and save_every=1 both say"):
        models.remat(small(), "nothing")(IMAGES)
    with pytest.raises(ConfigError, match="least=inf must be a positive number"):
        keep_invertible(float("inf"))
    with pytest.raises(ConfigError, match="size='huge' is not one of"):
        revcol_of("huge")


def test_one_column_and_images_of_other_sizes():
    config = dataclasses.replace(SMALL, columns=1)
    model = RevCol(config, key=jax.random.key(0))
    assert model(jnp.zeros((1, 8, 12, 1))).shape == (1, 3)
    assert model(np.zeros((1, 8, 8, 1), np.uint8)).shape == (1, 3)
