"""Models without some channels: equal to those in which these give nothing, in every form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab import models, tree, weights
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats import load_resnet
from ffnlab.formats.opening import format_of
from ffnlab.layers import MLP, BatchNorm, FixedAffine, Linear
from ffnlab.layers.residual import usual_sources
from ffnlab.models import (
    ConvNet,
    Decoder,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    ResNet,
    ResNetConfig,
    ViT,
    ViTConfig,
    groups,
    masked,
    narrow,
)
from ffnlab.models.cost import multiply_adds
from ffnlab.models.decoder import abstract
from ffnlab.testing import equal
from tests.fixtures.resnet_cifar10.record import FILES
from tests.models.narrowing import mask, switched_off

KEY = jax.random.key(0)
TOLERANCE = 1e-6  # of the length of the output: the same sums in another order, float32
TOKENS = jax.random.randint(jax.random.key(1), (2, 5), 0, 32)
IMAGES = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
ROWS = jax.random.normal(jax.random.key(1), (3, 4))
run = jax.jit(lambda forms, x: [model(x) for model in forms])
compared = jax.jit(lambda forms, masks, x: [m(x) for m in (*forms, masked(forms[0], masks))])

DECODER = DecoderConfig(
    vocab=32, width=12, hidden=10, layers=2, heads=6, kv_heads=3, head_dim=4, eps=1e-3
)
BIASED = dataclasses.replace(
    DECODER, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True, tie_embeddings=False
)
GEMMA = dataclasses.replace(
    DECODER, norm_offset=1.0, sandwich_norms=True, embed_scale=3.0, windows=(2, None)
)
BERT = EncoderConfig(32, 8, 10, 2, 2, 4, max_positions=8, head="masked")
ROTARY = EncoderConfig(32, 8, 10, 2, 2, 4, positions="rotary", norm="before", gated=True)
VIT = ViTConfig((8, 8), 4, 8, 10, 2, 2, classes=3)
STAGED = ViTConfig((8, 8), 2, 8, 6, 2, 2, classes=3, pool="mean", stages=(1, 1))
BASIC = ResNetConfig((2, 1, 1), (4, 6, 9), 3)


@functools.cache
def made(make, config, **options):
    """A model of which every array is drawn, biases, scales and statistics too."""
    rng = np.random.default_rng(5)

    def draw(path, x):
        if x.ndim > 1:
            return jnp.asarray(rng.normal(size=x.shape) * x.shape[-2] ** -0.5, x.dtype)
        low = -0.3 if "mean" in jax.tree_util.keystr(path) else 0.3
        return jnp.asarray(rng.uniform(low, low + 1, x.shape), x.dtype)

    shapes = jax.eval_shape(lambda key: make(config, key=key, **options), KEY)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def bottleneck(op):
    return made(
        ResNet,
        ResNetConfig((2, 1), (2, 3), 3, block="bottleneck", op=op, expansion=2, stem_width=3),
    )


def affine():
    """Norms that were settled have no parameters."""
    model = made(ResNet, BASIC)
    fixed = lambda n: FixedAffine(n.scale.get_value(), n.bias.get_value())  # noqa: E731
    return tree.map_at(model, tree.of_type(BatchNorm), fixed)


def flattened():
    """A network whose last grid has four pixels."""
    model = tree.copy(made(ConvNet, (3, 4, 5), classes=2))
    model.head = made(Linear, 4 * 5, d_out=2, axes=("embed", "mlp"))
    return model


FFNS = {"layers[0].ffn": [0, 3, 4, 7], "layers[1].ffn": [1, 2, 9]}
HEADS = {"layers[0].attn": [0, 2], "layers[1].attn": [1]}
STREAM = {"embed": [0, 2, 3, 4, 5, 8, 11]}
SUMS = {"stem": [0, 2, 3], "residuals[2].expand": [1, 2, 5], "residuals[3].expand": [0, 3, 6, 7]}
INSIDE = {
    f"residuals[{i}].spatial": kept for i, kept in enumerate(([2], [0, 1], [0, 3, 5], [8, 1]))
}
WIDE = {"stem": [0, 2], "residuals[0].expand": [1, 3], "residuals[2].expand": [0, 1, 4]}
REDUCED = {f"residuals[{i}].reduce": kept for i, kept in enumerate(([1], [0], [0, 2]))}
CASES = {
    "mlp": (lambda: made(MLP, (4, 5, 6, 2)), ROWS, {"maps[0]": [0, 3], "maps[1]": [5, 1, 2]}),
    "mlp whose nonlinearity is not 0 at 0": (
        lambda: made(MLP, (4, 5, 2), activation="sigmoid"),
        ROWS,
        {"maps[0]": [1, 2]},
    ),
    "mlp with a shared slope": (
        lambda: made(MLP, (4, 5, 2), activation="prelu"),
        ROWS,
        {"maps[0]": [1, 2, 4]},
    ),
    "convnet": (
        lambda: made(ConvNet, (3, 4, 5, 4), classes=2),
        IMAGES,
        {"convs[0]": [1, 2], "convs[1]": [0, 4], "convs[2]": [3, 1]},
    ),
    "flattened pixels": (flattened, IMAGES, {"convs[0]": [0, 3], "convs[1]": [4, 1]}),
    "resnet": (lambda: made(ResNet, BASIC), IMAGES, SUMS | INSIDE),
    "settled norms": (affine, IMAGES, SUMS),
    "bottleneck": (
        lambda: bottleneck("conv"),
        IMAGES,
        WIDE | REDUCED | {"residuals[2].spatial": [2]},
    ),
    "depthwise": (lambda: bottleneck("depthwise"), IMAGES, WIDE | REDUCED),
    "hybrid": (
        lambda: bottleneck("hybrid"),
        IMAGES,
        WIDE | REDUCED | {"residuals[2].spatial": [1, 2]},
    ),
    "decoder": (lambda: made(Decoder, DECODER), TOKENS, FFNS | HEADS | STREAM),
    "biases and norms of heads": (lambda: made(Decoder, BIASED), TOKENS, FFNS | HEADS | STREAM),
    "norms that add 1": (lambda: made(Decoder, GEMMA), TOKENS, STREAM),
    "bert": (lambda: made(Encoder, BERT), TOKENS, FFNS | {"layers[1].attn": [1]}),
    "gated encoder": (lambda: made(Encoder, ROTARY), TOKENS, FFNS | {"layers[1].attn": [1]}),
    "vit": (lambda: made(ViT, VIT), IMAGES, FFNS | {"layers[0].attn": [1]}),
    "vit in stages": (
        lambda: made(ViT, STAGED),
        IMAGES,
        {"layers[0].ffn": [0, 5], "layers[1].ffn": [2, 11], "layers[1].attn": [0, 3]},
    ),
}


def as_off(model, keep):
    return switched_off(model, {name: list(kept) for name, kept in keep.items()})


def of_groups(model, keep):
    """The masks of `masked`."""
    return {g.name: mask(g.size, keep[g.name]) for g in groups(model) if g.name in keep}


def close(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.linalg.norm(a - b) <= TOLERANCE * np.linalg.norm(b)


QUICK = {
    *("mlp whose nonlinearity is not 0 at 0", "mlp with a shared slope", "flattened pixels"),
    *("resnet", "decoder"),
}
SOME = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", SOME)
def test_it_is_the_model_in_which_the_others_give_nothing(name):
    make, x, keep = CASES[name]
    model = make()
    before = jax.tree.map(np.array, model)
    forms = (model, as_off(model, keep), narrow(model, keep))
    whole, want, small, multiplied = compared(forms, of_groups(model, keep), x)
    assert np.linalg.norm(whole - want) > 0.05 * np.linalg.norm(want)  # the masks do something
    close(small, want)
    close(multiplied, want)
    small = forms[2]
    assert {g.name: g.size for g in groups(small) if g.name in keep} == {
        name: len(kept) for name, kept in keep.items()
    }
    assert equal(before, model)


def test_narrowing_twice_is_narrowing_once():
    """Index maps are read from a network that has lost channels, too."""
    model = made(ResNet, BASIC)
    first = narrow(model, {"stem": [1, 2, 3], "residuals[2].expand": range(5)})
    assert first.residuals[2].sources == (-1, -1, 0, 1, 2)
    twice = narrow(first, {"stem": [0, 2], "residuals[2].expand": [0, 2, 4]})
    once = narrow(model, {"stem": [1, 3], "residuals[2].expand": [0, 2, 4]})
    assert equal(twice, once) and once.residuals[2].sources == (-1, 0, 1)
    back = narrow(model, {"residuals[2].expand": range(4), "stem": [0, 1, 2]})
    assert back.residuals[2].sources == (-1, 0, 1, 2)


@settings(max_examples=8)
@given(st.sets(st.integers(0, 3), min_size=1), st.sets(st.integers(0, 7), min_size=1))
def test_a_shortcut_is_the_matrix_of_the_kept_rows_and_columns(inside, outside):
    """Option A as a matrix of zeros and ones, [channels in, channels out]."""
    matrix = np.zeros((4, 8), int)
    matrix[np.arange(4), np.arange(4) + 2] = 1
    config = ResNetConfig((1, 1), (4, 8), 2)
    shapes = jax.eval_shape(lambda key: ResNet(config, key=key), KEY)
    keep = {"stem": sorted(inside), "residuals[1].expand": sorted(outside)}
    small = jax.eval_shape(lambda model: narrow(model, keep), shapes).residuals[1]
    sources = small.sources or usual_sources(len(inside), len(outside))
    found = np.zeros((len(inside), len(outside)), int)
    for place, source in enumerate(sources):
        if source >= 0:
            found[source, place] = 1
    np.testing.assert_array_equal(found, matrix[sorted(inside)][:, sorted(outside)])


def test_stacks_stay_where_layers_repeat_and_keep_their_model():
    model = made(Decoder, DECODER)
    even = {"layers[0].ffn": [1, 2], "layers[1].ffn": [0, 9], "embed": [0, 1, 4, 6]}
    even |= {"layers[0].attn": [0], "layers[1].attn": [2]}
    odd = even | {"layers[1].ffn": [3]}
    small, listed = narrow(models.stack(model), even), narrow(model, even)
    assert isinstance(small.layers, models.Stacked) and small.layers.repeats == 2
    assert equal(models.unstack(small), listed)
    assert equal(narrow(models.stack(model), odd), narrow(model, odd))
    assert small.config.kv_heads == 1


def test_a_decoder_of_unlike_layers_is_saved_natively_and_like_ones_as_their_family(tmp_path):
    model = made(Decoder, DECODER)
    unlike = narrow(model, {"layers[0].ffn": [1, 2, 3], "layers[1].attn": [0, 2]})
    assert (unlike.config.hidden, unlike.config.hiddens) == (10, (3, 10))
    assert format_of(unlike) == "ffnlab"
    with pytest.raises(ConfigError, match=r"cannot say .*hiddens=\(1, 10\)"):
        models.save(narrow(model, {"layers[0].ffn": [1]}), tmp_path / "a", format="dense")
    with pytest.raises(FormatError, match=r"layers\[1\].attn.k.w is \[12, 8\], and a llama direct"):
        models.save(narrow(model, {"layers[1].attn": [0, 2]}), tmp_path / "a", format="dense")
    models.save(unlike, tmp_path / "a", format="ffnlab")
    assert equal(models.load(tmp_path / "a"), unlike)
    keep = {"layers[0].ffn": [1, 2, 3], "layers[1].ffn": [4, 5, 9], **STREAM}
    like = narrow(model, keep | {"layers[0].attn": [0, 2], "layers[1].attn": [1, 2]})
    assert (like.config.hidden, like.config.hiddens, like.config.width) == (3, None, 7)
    assert (like.config.heads, like.config.kv_heads, format_of(like)) == (4, 2, "dense")
    assert like.config.eps == like.norm.eps == 1e-3 * (12 / 7)
    models.save(like, tmp_path / "b")
    back = models.load(tmp_path / "b")
    assert equal(back, like) and (tmp_path / "b" / "config.json").exists()


def test_a_directory_that_would_say_another_eps_is_refused(tmp_path):
    small = narrow(made(Decoder, BIASED), STREAM)
    assert small.layers[0].attn.q_norm.eps == 1e-3 and format_of(small) == "ffnlab"
    like = dataclasses.replace(DECODER, qk_norm=True, family="qwen3")
    with pytest.raises(FormatError, match=r"_norm has eps=0.001, and a qwen3 directory says"):
        models.save(narrow(made(Decoder, like), STREAM), tmp_path / "a", format="dense")


def test_other_models_come_back_from_files(tmp_path):
    vit = made(ViT, VIT)
    for name, keep, format in (
        ("a", {"layers[0].ffn": [0, 1], "layers[1].ffn": [3, 4]}, "dense"),
        ("b", {"layers[0].attn": [1]}, "ffnlab"),
    ):
        small = narrow(vit, keep)
        assert format_of(small) == format
        models.save(small, tmp_path / name, format=format)
        assert equal(models.load(tmp_path / name), small)
    bert = made(Encoder, BERT)
    keep = {f"layers[{i}].{slot}": [1] for i in (0, 1) for slot in ("attn", "ffn")}
    config = narrow(bert, keep).config
    assert (config.heads, config.hidden) == (1, 1)
    small = narrow(made(ResNet, BASIC), SUMS | INSIDE)
    models.save(small, tmp_path / "c", format="ffnlab")
    assert equal(models.load(tmp_path / "c"), small)
    file = tmp_path / "c" / "ffnlab_model.json"
    text = file.read_text().replace(" ", "").replace("\n", "")
    assert '"sources":[0,-1,-1]' in text
    file.write_text(text.replace('"sources":[0,-1,-1]', '"sources":[3,-1,-1]'))
    with pytest.raises(FormatError, match=r"sources=\(3, -1, -1\) must be 3 numbers from -1 to 2"):
        models.load(tmp_path / "c")


def test_configurations_of_unlike_layers_draw_them_and_are_checked():
    config = dataclasses.replace(DECODER, hiddens=(4, 10))
    model = jax.eval_shape(lambda key: Decoder(config, key=key), KEY)
    assert [block.ffn.up.weight.shape for block in model.layers] == [(12, 4), (12, 10)]
    assert jax.tree.structure(abstract(config)) == jax.tree.structure(model)
    assert [x.shape for x in jax.tree.leaves(abstract(config))] == [
        x.shape for x in jax.tree.leaves(model)
    ]
    assert dataclasses.replace(DECODER, hiddens=(10, 10)) == DECODER
    for sizes in ((10,), (0, 10), (4, 9), (4, 11)):
        with pytest.raises(ConfigError, match="for each of the layers=2, of which hidden=10"):
            dataclasses.replace(DECODER, hiddens=sizes)


@pytest.mark.slow
def test_a_cache_holds_the_heads_that_are_left():
    small = narrow(made(Decoder, DECODER), {"layers[1].attn": [2]})
    cache = small.init_cache(2, 5)
    assert [layer.k.shape[2] for layer in cache.layers] == [3, 1]
    logits, _ = jax.jit(lambda m, x, c: m.extend(x, c, last=True))(small, TOKENS, cache)
    want = jax.jit(lambda m, x: m(x))(small, TOKENS)[:, -1:]
    assert np.abs(np.asarray(logits - want)).max() < 1e-5  # other sums, float32


def test_packed_weights_go_by_groups_or_are_refused_by_name():
    model = made(MLP, (4, 12, 2))
    rows = model.maps[1].weight.dense()
    packed = weights.Int8.quantize(rows, group=4)
    model = tree.replace(model, {"maps[1]": model.maps[1].replace(packed)})
    keep = {"maps[0]": [0, 1, 2, 3, 8, 9, 10, 11]}
    small = narrow(model, keep)
    assert isinstance(small.maps[1].weight, weights.Int8)
    want, found = run((as_off(model, keep), small), ROWS)
    close(found, want)
    with pytest.raises(
        ConfigError, match=r"maps\[1\].w: 8 of 12 rows: Int8: a group of 4 rows goes"
    ):
        narrow(model, {"maps[0]": range(1, 9)})
    blocks = weights.BlockDiagonal.project(rows, 2)
    model = tree.replace(model, {"maps[1]": model.maps[1].replace(blocks)})
    with pytest.raises(ConfigError, match=r"maps\[1\].w: a BlockDiagonal has no rows and columns"):
        narrow(model, keep)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"maps[1]": [0]}, r"'maps\[1\]' is no group of this model; it has maps\[0\]"),
        ([("maps[0]", [0]), ("maps[0]", [1])], r"keep names 'maps\[0\]' twice"),
        ({"maps[0]": []}, r"=\[\]: at least one unit of 3 stays"),
        ({"maps[0]": [False] * 3}, "at least one unit of 3 stays"),
        ({"maps[0]": [True, False]}, r"is a mask of \(2,\); 3 booleans are accepted"),
        ({"maps[0]": [0, 3]}, r"=\[0, 3\]: numbers from 0 to 2 are accepted"),
        ({"maps[0]": [-1]}, "numbers from 0 to 2"),
        ({"maps[0]": [1, 1]}, "names a unit twice"),
    ],
)
def test_units_that_are_not_there_are_refused(keep, message):
    with pytest.raises(ConfigError, match=message):
        narrow(made(MLP, (4, 3, 2)), keep)


def test_all_units_in_any_order_are_the_model_itself():
    model = made(MLP, (4, 3, 2))
    assert equal(narrow(model, {"maps[0]": [2, 0, 1]}), model)
    small = narrow(model, {"maps[0]": [2, 1]})
    assert equal(small, narrow(model, {"maps[0]": np.array([False, True, True])}))
    rows = model.maps[1].weight.dense()[1:]  # in the order that they had
    np.testing.assert_array_equal(small.maps[1].weight.dense(), rows)


def macs(model, side=32):
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return multiply_adds(lambda model, x: model(x), model, x)


def test_multiplications_of_a_narrow_resnet_by_hand():
    config = ResNetConfig((1, 1), (8, 12), 10)
    model = jax.eval_shape(lambda key: ResNet(config, key=key), KEY)
    keep = {"stem": range(5), "residuals[0].spatial": range(2)}
    keep |= {"residuals[1].spatial": range(7), "residuals[1].expand": range(6)}
    small = jax.eval_shape(lambda model: narrow(model, keep), model)
    by_hand = 9 * 32 * 32 * (3 * 5 + 5 * 2 + 2 * 5) + 9 * 16 * 16 * (5 * 7 + 7 * 6) + 6 * 10
    assert macs(small) == by_hand < macs(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_trained_resnet(name, data, tmp_path):
    """Three quarters of the channels of every group."""
    file = data / "resnet_cifar10" / FILES[name]
    if not file.is_file():
        pytest.skip(f"no weights at {file}")
    model, rng = load_resnet(file), np.random.default_rng(0)
    keep = {g.name: np.sort(rng.permutation(g.size)[g.size // 4 :]).tolist() for g in groups(model)}
    small = narrow(model, keep)
    images = jax.random.uniform(jax.random.key(2), (2, 8, 8, 3))
    want, found = run((as_off(model, keep), small), images)
    close(found, want)
    models.save(small, tmp_path / "a", format="ffnlab")
    assert equal(models.load(tmp_path / "a"), small)
