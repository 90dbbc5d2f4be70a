"""Parameter-free layers: the official outputs and counts, what the layer does and refuses."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs

import hashed
from ffnlab import models, quantization, transform, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import Attention, BatchNorm, Conv, EffLayer, LayerNorm, Linear, Residual
from ffnlab.models import ResNet, ResNetConfig, ViT, ViTConfig, account, resnet50
from ffnlab.models.vit import abstract
from ffnlab.structure import pflayer
from ffnlab.testing import tiny
from ffnlab.weights import Dense
from tests.fixtures.pflayer import record

TOLERANCE = 1e-4  # logits of order 4, float32 through 50 layers on other kernels
VIT_TI = ViTConfig((224, 224), 16, 192, 768, 12, 3, classes=1000, pool="mean")
PIT_TI = ViTConfig(
    (224, 224), 16, 64, 256, 12, 2, stride=8, classes=1000, pool="mean", stages=(2, 6, 4)
)
PARTS = {"reduce": "reduction_block", "expand": "expansion_block", "shortcut": "downsample"}
STATISTICS = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}


@pytest.fixture(scope="module")
def expected(fixtures):
    with np.load(fixtures / "pflayer" / "expected.npz", allow_pickle=False) as saved:
        return dict(saved)


def kernel(name, conv):
    """A convolution's hashed kernel [out, in, h, w] as [h * w * in, out]."""
    rows, out = conv.weight.shape
    taps = conv.window.size
    array = hashed.parameter(f"{name}.weight", (out, rows // (taps[0] * taps[1]), *taps))
    return array.transpose(2, 3, 1, 0).reshape(rows, out)


def matrix(name, linear, part=0, parts=1):
    """A hashed matrix [parts * out, in], or a part of it, as [in, out]."""
    rows, out = linear.weight.shape
    whole = hashed.parameter(f"{name}.weight", (parts * out, rows))
    return whole[part * out : (part + 1) * out].T


def filled(model, name_of):
    """A model with hashed parameters.

    Args:
      model: its arrays may be abstract.
      name_of: path of a layer -> its official name, or (name, part, parts) of a fused one.
    """
    new = {}

    def put(path, variable, array):
        value = jnp.asarray(np.ascontiguousarray(array))
        new[path] = variable.replace(Dense(value) if array.ndim == 2 else value)

    for path, node in tree.walk(model):
        if isinstance(node, Conv | Linear):
            found = name_of(path)
            name, part, parts = (found, 0, 1) if isinstance(found, str) else found
            is_conv, out = isinstance(node, Conv), node.weight.shape[1]
            put(
                f"{path}.w",
                node.w,
                kernel(name, node) if is_conv else matrix(name, node, part, parts),
            )
            if node.b is not None:
                whole = hashed.parameter(f"{name}.bias", (parts * out,))
                put(f"{path}.b", node.b, whole[part * out : (part + 1) * out])
        elif isinstance(node, BatchNorm | LayerNorm):
            for own, theirs in STATISTICS.items():
                if hasattr(node, own):
                    variable = getattr(node, own)
                    size = variable.get_value().shape
                    put(
                        f"{path}.{own}",
                        variable,
                        hashed.parameter(f"{name_of(path)}.{theirs}", size),
                    )
    return tree.replace(model, new)


def residual_name(path, stage="", is_hybrid_step=False):
    """What the official code calls a layer of a bottleneck."""
    part, _, rest = path.partition(".")
    number = int(rest.endswith("norm"))
    if part != "spatial":
        return f"{stage}{PARTS[part]}.{number}"
    return f"{stage}conv_block.{'1.' * is_hybrid_step}{number}"


def resnet_name(config, path):
    if path == "head":
        return "fc"
    if path.startswith("stem"):
        return f"conv1.{int(path.endswith('norm'))}"
    number, rest = re.fullmatch(r"residuals\[(\d+)\]\.(.*)", path).groups()
    number, stage = int(number), 0
    while number >= config.blocks[stage]:
        number, stage = number - config.blocks[stage], stage + 1
    return residual_name(rest, f"layer{stage + 1}.{number}.", config.op == "hybrid")


INNER = {"ffn.up": "mlp.fc1", "ffn.down": "mlp.fc2", "attn_norm": "norm1", "ffn_norm": "norm2"}
INNER |= {"attn.o": "attn.proj", "attn.down": "attn.proj", "attn.up": "attn.qkv"}
INNER |= {f"attn.{name}": ("attn.qkv", i, 3) for i, name in enumerate("qkv")}


def vit_name(config, path):
    if path in ("head", "norm"):
        return path
    if path == "patches":
        return "patch_embed.conv" if config.stages else "patch_embed.proj"
    if path.startswith("pools"):
        return f"pools.{path[6]}.conv"
    number, rest = re.fullmatch(r"layers\[(\d+)\]\.(.*)", path).groups()
    number, stage = int(number), 0
    while config.stages and number >= config.stages[stage]:
        number, stage = number - config.stages[stage], stage + 1
    head = f"transformers.{stage}.blocks.{number}." if config.stages else f"blocks.{number}."
    found = INNER[rest]
    return head + found if isinstance(found, str) else (head + found[0], *found[1:])


def official(config):
    """A vision transformer with parameter-free layers and hashed weights."""
    model = jax.eval_shape(lambda model: transform.apply(pflayer(), model)[0], abstract(config))
    model = filled(model, functools.partial(vit_name, config))
    rows, columns = config.grid
    if config.stages:
        table = hashed.parameter("pos_embed", (1, config.width, rows, columns))[0]
        table = table.reshape(config.width, -1).T
    else:
        table = hashed.parameter("pos_embed", (1, rows * columns, config.width))[0]
    model.positions = model.positions.replace(Dense(jnp.asarray(np.ascontiguousarray(table))))
    return model


def difference(a, b):
    return np.abs(np.asarray(a) - b).max()


@pytest.mark.parametrize("op", ["max", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_logits_of_the_official_resnet(op, expected):
    config = resnet50(op)
    made = jax.eval_shape(lambda key: ResNet(config, key=key), jax.random.key(0))
    model = filled(made, functools.partial(resnet_name, config))
    want = expected[f"resnet50_{op}"]
    assert difference(model(jnp.asarray(record.pixels(64))), want) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "config"),
    [("vit_ti_max", VIT_TI), pytest.param("pit_ti_max", PIT_TI, marks=pytest.mark.slow)],
)
def test_logits_of_the_official_transformers(name, config, expected):
    model = official(config)
    assert difference(model(jnp.asarray(record.pixels(224))), expected[name]) < TOLERANCE


@pytest.mark.parametrize("op", record.BLOCKS)
@pytest.mark.parametrize("stride", [1, 2])
def test_blocks_of_the_official_code(op, stride, expected):
    made = lambda key: Residual.bottleneck(8, 4, key=key, op=op, stride=stride)  # noqa: E731
    block = jax.eval_shape(made, jax.random.key(0))
    if block.shortcut is None:
        pytest.fail("the official block has a shortcut that learns")
    block = filled(block, lambda path: residual_name(path, is_hybrid_step=op == "hybrid"))
    found = block(jnp.asarray(record.stage_input(stride)))
    assert difference(found, expected[f"block/{op}{stride}"]) < 1e-5


@pytest.mark.parametrize("window", record.WINDOWS)
def test_the_layer_of_the_official_code(window, expected):
    layer = jax.eval_shape(lambda key: EffLayer(6, key=key, size=window), jax.random.key(0))
    layer = filled(layer, {"up": "qkv", "down": "proj"}.__getitem__)
    x = jnp.asarray(record.tokens())
    assert difference(layer(x), expected[f"layer/{window}"]) < 1e-5
    # A class token goes through both maps and meets no other.
    alone = jax.eval_shape(
        lambda key: EffLayer(6, key=key, size=window, leading=1), jax.random.key(0)
    )
    alone = filled(alone, {"up": "qkv", "down": "proj"}.__getitem__)
    first = jnp.full((2, 1, 6), 0.3)
    y = alone(jnp.concatenate([first, x], axis=1))
    assert difference(y[:, 1:], expected[f"layer/{window}"]) < 1e-5
    assert difference(y[:, :1], layer(first)) < 1e-6, "one token is a grid of one"


@pytest.mark.parametrize(
    ("config", "count"),
    [  # of the official code
        (VIT_TI, 6_159_400),
        (dataclasses.replace(VIT_TI, width=384, hidden=1536, heads=6), 23_819_368),
        (dataclasses.replace(VIT_TI, width=768, hidden=3072, heads=12), 93_644_008),
        (dataclasses.replace(PIT_TI, width=144, hidden=576, heads=3), 25_119_784),
    ],
)
def test_counts_of_the_official_transformers(config, count):
    model = jax.eval_shape(lambda model: transform.apply(pflayer(), model)[0], abstract(config))
    assert account.parameters(model) == count


SMALL = ViTConfig((16, 16), 4, 8, 16, 4, 2, channels=1, classes=3)


@functools.cache
def small(config=SMALL, **options):
    model = ViT(config, key=jax.random.key(0))
    return transform.apply(pflayer(**options), model)[0]


def kinds(model):
    return [type(block.attn).__name__ for block in models.unstack(model).layers]


def test_which_blocks_are_changed():
    assert kinds(small()) == ["Attention", "EffLayer"] * 2
    assert kinds(small(every=1, first=0)) == ["EffLayer"] * 4
    staged = dataclasses.replace(SMALL, pool="mean", layers=5, stages=(3, 2))
    assert kinds(small(staged)) == ["Attention", "EffLayer", "Attention", "Attention", "EffLayer"]
    cut = models.remove(ViT(SMALL, key=jax.random.key(0)), [2])
    changed, _ = transform.apply(pflayer(), cut)
    assert kinds(changed) == ["Attention", "NoneType", "Attention", "EffLayer"]
    before = ViT(SMALL, key=jax.random.key(0))
    for i in (0, 2):  # what is not replaced is what it was
        for a, b in zip(
            jax.tree.leaves(before.layers[i]), jax.tree.leaves(small().layers[i]), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_a_stacked_model_is_changed_and_keeps_its_dtype():
    model = ViT(dataclasses.replace(SMALL, layers=2), key=jax.random.key(0), dtype=jnp.bfloat16)
    changed, _ = transform.apply(pflayer(), models.stack(model))
    assert kinds(changed) == ["Attention", "EffLayer"]
    assert {leaf.dtype for leaf in jax.tree.leaves(changed)} == {jnp.dtype(jnp.bfloat16)}
    small, _ = transform.apply(quantization.nearest(format="int8", group=None), changed)
    assert type(models.unstack(small).layers[1].attn.up.weight).__name__ == "Int8"


def test_a_directory_of_hugging_face_cannot_say_it(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)no place for|has no place.*ffnlab"):
        models.save(small(), tmp_path)


def test_a_grid_that_is_no_square(tmp_path):
    wide = dataclasses.replace(SMALL, image=(16, 24))
    model = small(wide)
    assert model.layers[1].attn.grid == (4, 6)
    assert model(jnp.ones((1, 16, 24, 1))).shape == (1, 3)
    assert small().layers[1].attn.grid is None
    larger = models.resized(small(), (24, 24))
    assert larger(jnp.ones((1, 24, 24, 1))).shape == (1, 3)


run = jax.jit(lambda layer, x: layer(x))


@settings(max_examples=8, deadline=None)
@given(side=hs.integers(1, 6), size=hs.sampled_from([1, 3, 5, 9]), leading=hs.integers(0, 2))
def test_neighbours_alone_are_seen(side, size, leading):
    """A change of one token reaches its window and nothing else, on grids of any size."""
    layer = EffLayer(2, key=jax.random.key(0), size=size, leading=leading)
    n = leading + side * side
    x = jax.random.normal(jax.random.key(side), (1, n, 2))
    at = n - 1  # the last corner
    other = x.at[0, at].add(5.0)
    moved = np.abs(np.asarray(run(layer, other) - run(layer, x)))[0].max(-1) > 1e-6
    rows, columns = np.divmod(np.arange(side * side), side)
    near = (side - 1 - rows <= size // 2) & (side - 1 - columns <= size // 2)
    assert not moved[:leading].any() and not moved[leading:][~near].any()
    assert moved[at]


def test_shifted_by_one_pixel_it_gives_the_same_inside():
    layer = EffLayer(3, key=jax.random.key(0))
    grid = np.asarray(jax.random.normal(jax.random.key(1), (6, 6, 3)))
    run = lambda grid: np.asarray(layer(jnp.asarray(grid).reshape(1, 36, 3))).reshape(6, 6, 3)  # noqa: E731
    np.testing.assert_allclose(run(np.roll(grid, 1, 0))[2:5, 1:5], run(grid)[1:4, 1:5], atol=1e-6)
    flat = np.full((6, 6, 3), -0.4, np.float32)
    np.testing.assert_allclose(run(flat), run(flat)[:1, :1].repeat(6, 0).repeat(6, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"size": 2}, "size=2 must be odd"),
        ({"size": -1}, "size=-1 must be odd"),
        ({"ratio": 0}, "ratio=0 must be at least 1"),
        ({"every": 0}, "every=0"),
        ({"first": -1}, "first=-1"),
    ],
)
def test_options_that_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        pflayer(**options)


def test_models_and_tokens_that_are_refused():
    with pytest.raises(ConfigError, match="model is a Decoder; a ViT is accepted"):
        transform.apply(pflayer(), tiny())
    with pytest.raises(ConfigError, match=r"first=4, every=2: no such block has attention"):
        small(first=4)
    layer = EffLayer(2, key=jax.random.key(0))
    with pytest.raises(
        ConfigError, match="10 tokens after 0 leading ones are no square grid; 9 or"
    ):
        layer(jnp.zeros((1, 10, 2)))
    layer = EffLayer(2, key=jax.random.key(0), leading=1)
    with pytest.raises(ConfigError, match="0 tokens after 1 leading ones are no square"):
        layer(jnp.zeros((1, 1, 2)))
    layer = EffLayer(2, key=jax.random.key(0), grid=(2, 3))
    with pytest.raises(ConfigError, match="4 tokens after 0 leading ones; a grid of 2 x 3"):
        layer(jnp.zeros((1, 4, 2)))
    with pytest.raises(ConfigError, match="rows and columns, 1 or more, are accepted"):
        EffLayer(2, key=jax.random.key(0), grid=(0, 3))
    assert isinstance(ViT(SMALL, key=jax.random.key(0)).layers[1].attn, Attention)


def test_bottlenecks_count_what_the_paper_counts():
    """Products of ResNet-50 at 224 x 224: 4.1, 2.2 and 2.6 thousand million (its table)."""
    from ffnlab.models.cost import multiply_adds

    image, found = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32), {}
    for op in ("conv", "max", "hybrid"):
        make = functools.partial(ResNet, resnet50(op))
        model = jax.eval_shape(lambda key, make=make: make(key=key), jax.random.key(0))
        found[op] = multiply_adds(lambda model, x: model(x), model, image) / 1e9
    assert [round(found[op], 1) for op in ("conv", "max", "hybrid")] == [4.1, 2.2, 2.6]


def test_an_op_is_one_word_of_a_configuration(tmp_path):
    config = ResNetConfig((1,), (4,), 3, block="bottleneck", expansion=2, stem_width=8)
    counts = {
        op: account.parameters(
            jax.eval_shape(
                lambda key, op=op: ResNet(dataclasses.replace(config, op=op), key=key),
                jax.random.key(0),
            )
        )
        for op in ("conv", "depthwise", "max", "average", "identity")
    }
    assert counts["max"] == counts["average"] == counts["identity"]
    assert counts["conv"] - counts["max"] == 9 * 4 * 4 + 8
    assert counts["depthwise"] - counts["max"] == 9 * 4 + 8
