"""Networks as graphs: every bit comes back, layouts are the card's, what has none is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab import models, transform, tree
from ffnlab.errors import ConfigError
from ffnlab.formats import load_resnet
from ffnlab.graph import edge_order
from ffnlab.layers import MLP, Conv, FixedAffine, Linear, Residual
from ffnlab.models import ConvNet, DecoderConfig, ResNet, ResNetConfig, ViT, ViTConfig, narrow
from ffnlab.pruning.meta import layout_of
from ffnlab.quantization import nearest
from ffnlab.routing import upcycle
from ffnlab.testing import equal, tiny
from ffnlab.weights import Dense
from tests.fixtures.meta_pruning import record_official as record
from tests.fixtures.resnet_cifar10.record import FILES
from tests.hashed import parameter

KEY = jax.random.key(0)


def abstract(make, *args, **options):
    return jax.eval_shape(lambda key: make(*args, key=key, **options), KEY)


def drawn(shapes, seed=0):
    """A model of abstract leaves with normal numbers, zeros of both signs among them."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        values = rng.normal(size=leaf.shape)
        values[rng.random(leaf.shape) < 0.1] = -0.0
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map(draw, shapes)


BIASED = DecoderConfig(16, 6, 5, 2, 2, 1, 4, mlp_bias=True)
VIT = ViTConfig((8, 8), 4, 8, 10, 2, 2, classes=3)
BASIC = ResNetConfig((2, 1, 1), (3, 4, 7), 3)
# name: (model, layout, nodes, edges)
CASES = {
    "mlp": (lambda: abstract(MLP, (4, 3, 5, 2)), "mlp", 14, 12 + 15 + 10),
    "mlp without biases": (lambda: abstract(MLP, (4, 3, 2), bias=False), "mlp", 9, 18),
    "convnet": (lambda: abstract(ConvNet, (2, 4, 3), 5), "convnet", 14, 8 + 12 + 15),
    "resnet": (
        lambda: abstract(ResNet, BASIC),
        "resnet",
        3 + 3 + 2 * 6 + 2 * 4 + 2 * 7 + 3,
        9 + 2 * 27 + (12 + 16 + 12) + (28 + 49 + 28) + 21,
    ),
    "bottlenecks": (
        lambda: abstract(ResNet, ResNetConfig((1, 1), (2, 3), 3, block="bottleneck", expansion=2)),
        "resnet",
        3 + 2 + (2 + 2 + 4) + (3 + 3 + 6) + 3,
        6 + (4 + 4 + 8 + 8) + (12 + 9 + 18 + 24) + 18,
    ),
    "pooled bottlenecks": (
        lambda: abstract(
            ResNet, ResNetConfig((1,), (2,), 3, block="bottleneck", op="max", expansion=2)
        ),
        "resnet",
        3 + 2 + 2 + 4 + 3,
        6 + 4 + (8 + 8) + 12,
    ),
    "decoder": (tiny, "gated", 3 * (16 + 32 + 16), 3 * 2 * 16 * 32),
    "decoder, stacked": (lambda: models.stack(tiny()), "gated", 192, 3072),
    "decoder, biased": (
        lambda: abstract(models.Decoder, BIASED),
        "gated",
        2 * (6 + 5 + 6),
        2 * 2 * 30,
    ),
    "decoder, bfloat16": (lambda: tiny(dtype=jnp.bfloat16), "gated", 192, 3072),
    "vit": (lambda: abstract(ViT, VIT), "ffn", 2 * (8 + 10 + 8), 2 * 2 * 80),
}


@functools.cache
def case(name):
    return drawn(CASES[name][0]())


@pytest.mark.parametrize("name", CASES)
def test_every_bit_comes_back(name):
    model = case(name)
    layout = layout_of(model)
    nodes, edges = layout.read(model)
    _, kind, n, e = CASES[name]
    assert (layout.name, layout.nodes, layout.edges) == (kind, n, e)
    assert (len(nodes), len(edges)) == (n, e) and nodes.dtype == edges.dtype == jnp.float32
    assert equal(layout.write(model, nodes, edges), model)
    graph = layout.graph()
    order = edge_order(np.asarray(graph.senders), np.asarray(graph.receivers))
    np.testing.assert_array_equal(order, np.arange(e))  # edges stand as the graph has them
    changed = layout.write(model, nodes + 1, edges + 1)
    again = layout.read(changed)
    written = np.zeros(nodes.shape, bool)
    for layer in layout.layers:
        for column in layer.columns:
            written[layer.first : layer.first + layer.count, column.slot] = column.is_written
    if model_dtype(model) == jnp.float32:
        np.testing.assert_array_equal(again[0], np.where(written, nodes + 1, nodes))


def model_dtype(model):
    return jax.tree.leaves(tree.trained(model)[0])[0].dtype


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.booleans(), st.integers(0, 99))
def test_every_bit_of_any_mlp(sizes, bias, seed):
    model = drawn(abstract(MLP, sizes, bias=bias), seed)
    layout = layout_of(model)
    assert equal(layout.write(model, *layout.read(model)), model)
    graph, (nodes, edges) = layout.graph(), layout.read(model)
    first = np.cumsum([0, *sizes])
    for k, linear in enumerate(model.maps):
        w = np.asarray(linear.weight.dense())
        for i, o in np.ndindex(*w.shape):
            found = (graph.senders == first[k] + i) & (graph.receivers == first[k + 1] + o)
            assert edges[np.asarray(found)].tolist() == [[w[i, o]]]
        if bias:
            own = nodes[first[k + 1] : first[k + 2], 0]
            np.testing.assert_array_equal(own, linear.b[...])


@pytest.mark.parametrize("name", FILES)
def test_every_bit_of_the_real_resnets(name, data):
    file = data / "resnet_cifar10" / FILES[name]
    if not file.is_file():
        pytest.skip(f"no weights at {file}")
    model = load_resnet(file)
    layout = layout_of(model)
    nodes, edges = jax.jit(layout.read)(model)
    blank = jax.tree.map(jnp.zeros_like, tree.trained(model)[0])
    empty = tree.combine(blank, tree.trained(model)[1])
    assert equal(jax.jit(layout.write)(empty, nodes, edges), model)


NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}


def projected():
    """The ResNet-56 of the fixture: shortcuts that learn where channels change."""
    width, blocks = record.WIDTHS[0], []
    for stage, d in enumerate(record.WIDTHS):
        for i in range(9):
            changes = {"stride": 2, "shortcut": "projected"} if stage and not i else {}
            more = {"stride": 1, "shortcut": "padded"} | changes
            blocks.append(abstract(Residual.of_sizes, (width, d, d), **more))
            width = d
    model = abstract(ResNet, ResNetConfig((9, 9, 9), record.WIDTHS, record.CLASSES))
    model.residuals = nnx.List(blocks)
    return model


def theirs(path):
    """What the authors call a variable."""
    place, _, name = path.rpartition(".")
    if place == "head":
        return f"fc.{ {'w': 'weight', 'b': 'bias'}[name] }"
    is_conv = place.endswith("conv")
    name = "weight" if is_conv else NORM[name]
    if place.startswith("stem"):
        return f"{'conv1' if is_conv else 'bn1'}.{name}"
    number, part = int(place.split("[")[1].split("]")[0]), place.split("].")[1].split(".")[0]
    where = f"layer{number // 9 + 1}.{number % 9}"
    if part == "shortcut":
        return f"{where}.downsample.{0 if is_conv else 1}.{name}"
    return f"{where}.{'conv' if is_conv else 'bn'}{ {'spatial': 1, 'expand': 2}[part] }.{name}"


def test_a_residual_network_is_laid_out_as_the_authors_do(fixtures):
    model, new = projected(), {}
    for path, node in tree.walk(model):
        if not isinstance(node, nnx.Variable):
            continue
        value = node.get_value()
        shape = tuple(value.shape)
        if path.endswith("conv.w"):
            size = 1 if "shortcut" in path else 3
            w = parameter(theirs(path), (shape[1], shape[0] // size**2, size, size))
            array = w.transpose(2, 3, 1, 0).reshape(shape)
        else:
            array = parameter(theirs(path), shape[::-1]).T
        array = jnp.asarray(array)
        new[path] = node.replace(Dense(array) if isinstance(value, Dense) else array)
    model = tree.replace(model, new)
    layout = layout_of(model)
    nodes, edges = layout.read(model)
    graph = layout.graph()
    below, above = np.asarray(graph.senders), np.asarray(graph.receivers)
    order = np.lexsort((below, above))
    with np.load(fixtures / "meta_pruning" / "official.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(nodes, file["graph_nodes"])
        np.testing.assert_array_equal(np.stack([below, above])[:, order], file["graph_ends"])
        found = np.asarray(edges) @ record.PROBE
        np.testing.assert_allclose(found[order], file["graph_edges"], atol=1e-5)
    assert equal(layout.write(model, nodes, edges), model)


def test_shortcuts_are_edges_where_they_put_channels():
    """From three channels to four: all in front, a zero behind; the way back does not read them."""
    model = case("resnet")
    layout = layout_of(model)
    layer = layout.layers[7]  # of the sum behind the third block
    assert [fan.fixed is not None for fan in layer.fans] == [True, False]
    np.testing.assert_array_equal(layer.fans[0].fixed, np.eye(4, 3))
    narrowed = narrow(model, {"stem": [0, 2]})
    fixed = layout_of(narrowed).layers[7].fans[0].fixed
    np.testing.assert_array_equal(fixed, [[1, 0], [0, 0], [0, 1], [0, 0]])


def test_numbers_of_another_layout_are_refused():
    layout = layout_of(case("mlp"))
    nodes, edges = layout.read(case("mlp"))
    with pytest.raises(ConfigError, match=r"nodes \[13, 1\]: this mlp has \[14, 1\]"):
        layout.write(case("mlp"), nodes[1:], edges)
    with pytest.raises(ConfigError, match=r"edges \[37, 2\]: this mlp has \[37, 1\]"):
        layout.write(case("mlp"), nodes, jnp.concatenate([edges, edges], axis=1))


def seven():
    """A stem of seven taps, as ImageNet's."""
    model = abstract(ResNet, BASIC)
    model.stem.conv = abstract(Conv, 3, 3, size=7)
    return model


def settled():
    """A norm that is an affine map."""
    model = drawn(abstract(ResNet, BASIC))
    norm = model.residuals[1].expand.norm
    model.residuals[1].expand.norm = FixedAffine(*norm.affine())
    return model


def flattened():
    """A classifier of four pixels."""
    model = abstract(ConvNet, (2, 3, 4), 5)
    model.head = abstract(Linear, 16, 5, axes=("embed", "mlp"))
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: abstract(Linear, 2, 3, axes=("a", "b")), "model is a Linear; an MLP, a ConvNet"),
        (lambda: abstract(MLP, (3, 4, 2), activation="prelu"), r"units\[0\] is a PReLU; an MLP"),
        (seven, "stem.conv has a kernel of 7 x 7; 3 x 3 and 1 x 1 are accepted"),
        (settled, r"residuals\[1\].expand: a FixedAffine; a ConvNorm with a BatchNorm"),
        (flattened, "head reads 4 channels with 16 rows in 1 groups"),
        (
            lambda: abstract(
                ResNet, ResNetConfig((1,), (4,), 3, block="bottleneck", op="depthwise")
            ),
            r"residuals\[0\].spatial.conv.conv reads 4 channels with 9 rows in 4 groups",
        ),
        (
            lambda: transform.apply(nearest(group=8), tiny())[0],
            r"layers\[0\].ffn.up is a Int4; only a Dense is corrected",
        ),
        (
            lambda: transform.apply(upcycle(experts=2), tiny())[0],
            r"layers\[0\].ffn is a MoE; FFN and GatedFFN have a layout",
        ),
        (
            lambda: models.remove(tiny(), [1, 3, 5]),
            "this Decoder has no FFN left to correct",
        ),
    ],
)
def test_layers_without_a_place_are_named(make, said):
    with pytest.raises(ConfigError, match=said):
        layout_of(make())
