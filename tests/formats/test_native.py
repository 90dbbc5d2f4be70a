"""The native format: what is saved comes back as it was, and what cannot be is refused by path."""

import dataclasses
import functools
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as hs
from jax.sharding import NamedSharding, PartitionSpec

from ffnlab import compat, layers, models, transform, weights
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats import KINDS
from ffnlab.formats import safetensors as st
from ffnlab.formats.directory import NATIVE_FILE
from ffnlab.formats.native import read, schema
from ffnlab.formats.native.read import load, root_type
from ffnlab.formats.native.write import KNOWN, save
from ffnlab.quantization import fireq
from ffnlab.routing import untie
from ffnlab.sparsity import chess
from ffnlab.storage import structure
from ffnlab.testing import batches, tiny, tiny_encoder
from tests.contracts import LAYERS, WEIGHTS
from tests.quantized_models import int4, quantized


def check_equal(found, saved):
    """Structure, static fields and bits are those of the tree that was saved."""
    assert jax.tree.structure(found) == jax.tree.structure(saved)
    assert structure.describe(found) == structure.describe(saved)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(saved), strict=True):
        assert isinstance(a, jax.Array) and (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def there_and_back(model, folder, **options):
    """What is loaded of a model that was saved, compared with it."""
    save(model, folder)
    found = load(folder, **options)
    check_equal(found, model)
    assert root_type(folder) is type(model)
    return found


def edited(folder, change):
    """Changes the JSON of a native directory in place."""
    content = json.loads((folder / NATIVE_FILE).read_text())
    change(content)
    (folder / NATIVE_FILE).write_text(json.dumps(content))


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_weight(name, key, tmp_path):
    weight = WEIGHTS[name](key)
    there_and_back(weight, tmp_path / "bare")
    there_and_back(nnx.Param(weight, axes=("embed", "mlp")), tmp_path / "held")
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), weight)
    there_and_back({"stack": stacked}, tmp_path / "stacked")


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer(name, key, tmp_path):
    there_and_back(LAYERS[name].args[0](key), tmp_path / "m")


@functools.cache
def rewritten():
    """A decoder of sparse FFNs and INT4 weights, one block of it without attention."""
    recipe = transform.chain(chess(sparsity=0.5), fireq(group=8, top_k=2))
    small, _ = transform.apply(recipe, tiny(), batches())
    return models.remove(small, [2])


MODELS = {
    "decoder": tiny,
    "decoder-stacked": lambda: models.stack(tiny()),
    "decoder-remat": lambda: models.remat(models.stack(tiny()), "nothing"),
    "decoder-bf16": lambda: tiny(dtype=jnp.bfloat16),
    "decoder-rewritten": rewritten,
    "decoder-untied": lambda: transform.apply(untie(starts=(32,), norm="output"), tiny())[0],
    "encoder": lambda: models.Encoder(
        models.EncoderConfig(16, 8, 8, 2, 2, 4, types=2, head="masked"), key=jax.random.key(0)
    ),
    "mlp": lambda: layers.MLP((6, 5, 3), key=jax.random.key(0), activation="elu"),
    "convnet": lambda: models.ConvNet((1, 4, 5), 3, key=jax.random.key(0)),
    "audio": lambda: models.AudioEncoder(
        models.AudioEncoderConfig(4, 8, 8, 1, 2, max_positions=3), key=jax.random.key(0)
    ),
    "vit": lambda: models.stack(
        models.ViT(models.ViTConfig((8, 8), 4, 8, 8, 2, 2, classes=3), key=jax.random.key(0))
    ),
    "uvit": lambda: models.stack(
        models.UViT(
            models.UViTConfig((8, 8), 2, 8, 8, 2, 2, scaling="apart"), key=jax.random.key(0)
        )
    ),
    "resnet": lambda: models.ResNet(
        models.ResNetConfig((1, 1), (2, 3), 3, block="bottleneck", op="hybrid"),
        key=jax.random.key(0),
    ),
    "revcol": lambda: models.RevCol(
        models.RevColConfig((8, 8), (3, 5), (1, 1), 4, 3, patch=2, supervision=True),
        key=jax.random.key(0),
    ),
    "revcol-stacked": lambda: models.stack(
        models.RevCol(
            models.RevColConfig((8, 8), (3, 5), (1, 1), 3, 3, patch=2, tolerance=float("inf")),
            key=jax.random.key(0),
        )
    ),
    "vit-stages": lambda: models.ViT(
        models.ViTConfig((8, 8), 4, 8, 8, 2, 2, stride=2, pool="mean", stages=(1, 1)),
        key=jax.random.key(0),
    ),
    "autoencoder": lambda: models.ConvAutoencoder((1, 4, 5), key=jax.random.key(0)),
    "encoder-stacked": lambda: models.stack(tiny_encoder()),
    "graph": lambda: models.GraphNetworkConfig((3, 4, 2)).make(key=jax.random.key(0)),
    "graph-stacked": lambda: (
        models.GraphNetworkConfig((3, 4, 4, 4, 2), "sage").make(key=jax.random.key(0)).stacked()
    ),
    "noprop": lambda: models.NoPropConfig(3, 2, hidden=4, blocks=2).make(key=jax.random.key(0)),
    "noprop-learned": lambda: models.NoPropConfig(3, 2, blocks=0, embedding=4, schedule=3).make(
        key=jax.random.key(0)
    ),
    "hypernet": lambda: models.HypernetConfig(
        models.MLPConfig((3, 4, 2)), models.HypernetSpec(tasks=2, outputs="chunk_wise", hidden=(5,))
    ).make(key=jax.random.key(0)),
    "hypernet-of-resnet": lambda: models.HypernetConfig(
        models.ResNetConfig((1, 1), (2, 3), 3),
        models.HypernetSpec(
            outputs="component_wise", architecture="rnn", hidden=(3,), output_variability="dynamic"
        ),
    ).make(key=jax.random.key(0)),
    "meta": lambda: models.MetaNetworkConfig(2, 3, layers=2, width=4).make(key=jax.random.key(0)),
    "icgnn": lambda: models.ICGNNConfig(2, 2, edges=2, width=4).make(key=jax.random.key(0)),
    "icgnn-of-links": lambda: models.ICGNNConfig(3, 1, axes=2, width=4).make(key=jax.random.key(0)),
    "s_mamba": lambda: models.SMambaConfig(6, 3, 8, 5, states=2).make(key=jax.random.key(0)),
    "oneforecast": lambda: models.OneForecastConfig(
        (2, 3), 2, 1, 0, (0.0, 90.0, -90.0, 90.0), width=4, blocks=3
    ).make(key=jax.random.key(0)),
    "oneforecast-plain": lambda: models.OneForecastConfig(
        (2, 3), 2, 1, 0, width=4, blocks=3, gated=False
    ).make(key=jax.random.key(0)),
    "groups": lambda: models.GroupNetworkConfig(((3, 2), (1, 4)), 3, hidden=4, drop=0.5).make(
        key=jax.random.key(0)
    ),
    "mlp-prelu": lambda: models.MLPConfig((3, 4, 4, 2), "prelu").make(key=jax.random.key(0)),
    "sequence": lambda: models.SequenceConfig(3, 2, 4, 8, 5, heads=2).make(key=jax.random.key(0)),
    "physical": lambda: models.PhysicalConfig(3, 2, (4, 5), "two_bit", skip=True, slots=2).make(
        key=jax.random.key(0)
    ),
    "physical-chain": lambda: models.PhysicalConfig(4, 2, (4, 5), "tanh_chain", noise=0.5).make(
        key=jax.random.key(0)
    ),
    "physical-none": lambda: models.PhysicalConfig(4, 2, (4, 5), "none", level="batch").make(
        key=jax.random.key(0)
    ),
    "block": lambda: layers.Block(
        None,
        None,
        layers.RMSNorm(4),
        layers.FFN(4, 8, key=jax.random.key(0)),
        slots=("mid", "ffn"),
        joins=(layers.Join(0.5, "after"), layers.Join(residual=False)),
        others={"mid": (None, layers.FFN(4, 8, key=jax.random.key(1), activation="silu"))},
    ),
    "containers": lambda: {"a": (tiny().norm, [], ()), "b": [None, jnp.arange(3)], "": {}},
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model(name, tmp_path):
    found = there_and_back(MODELS[name](), tmp_path / "m")
    if name.startswith("decoder"):  # a module that was built bare can be rewritten like any other
        check_equal(found.layers, MODELS[name]().layers)
        found.layers = nnx.List([])
        assert isinstance(jax.tree.map(lambda leaf: leaf, found).layers, nnx.List)


def test_a_loaded_model_computes_the_same(tmp_path):
    model = rewritten()
    found = there_and_back(model, tmp_path / "m")
    np.testing.assert_array_equal(found(batches()[0]), model(batches()[0]))


@pytest.mark.parametrize("name", [*KNOWN, "int64", "complex64"])
def test_every_dtype(name, tmp_path):
    draw = np.random.default_rng(0)
    array = np.asarray(draw.integers(0, 7, (3, 5))).astype(KNOWN.get(name, name))
    if name in ("int64", "uint64", "float64", "complex64"):  # jax would cut the first three
        with pytest.raises(FormatError, match=rf"\['x'\]: an array of {name} cannot be stored"):
            save({"x": array}, tmp_path / "m")
        return
    edges = np.asarray([-8, -1, 7]).astype(KNOWN[name]) if name == "int4" else array[0]
    there_and_back({"x": array, "edges": edges, "one": array[0, 0, None][0:0]}, tmp_path / "m")
    stored = st.open_directory(tmp_path / "m").tensors["['x']"].dtype.name
    assert stored == {"int4": "int8", "uint4": "uint8"}.get(name, name)


SHAPES = hs.lists(hs.integers(0, 3), max_size=4).map(tuple)
STATIC = hs.recursive(
    hs.one_of(
        hs.none(),
        hs.booleans(),
        hs.integers(),
        hs.floats(allow_nan=False),
        hs.text(),
        hs.builds(layers.Join, hs.floats(allow_nan=False), hs.just("after"), hs.booleans()),
    ),
    lambda inner: hs.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(hs.dictionaries(hs.text(max_size=3), SHAPES, max_size=3), STATIC)
def test_any_shapes_and_static_fields(tmp_path_factory, shapes, value):
    folder = tmp_path_factory.mktemp("any")
    norm = layers.RMSNorm(2)
    norm.note = value
    there_and_back(
        {"arrays": {k: np.ones(s, "float16") for k, s in shapes.items()}, "": norm}, folder
    )


def test_what_is_tied_is_written_once_and_stays_one(tmp_path):
    norm = layers.RMSNorm(4)
    model = {"a": norm, "b": jax.tree.map(lambda leaf: leaf, norm), "c": layers.RMSNorm(4)}
    found = there_and_back(model, tmp_path / "m")
    assert set(st.open_directory(tmp_path / "m").tensors) == {
        "['a'].scale.value",
        "['c'].scale.value",
    }
    assert found["a"].scale.get_value() is found["b"].scale.get_value()
    assert found["a"].scale.get_value() is not found["c"].scale.get_value()


def test_names_of_tensors_are_paths(tmp_path):
    save(models.remove(tiny(), [0]), tmp_path / "m")
    names = set(st.open_directory(tmp_path / "m").tensors)
    assert {"embed.w.value.w", "layers[1].attn.q.w.value.w", "norm.scale.value"} <= names
    assert not any(name.startswith("layers[0].attn") for name in names)


def test_sharded_files_and_what_else_lies_there(tmp_path):
    folder = tmp_path / "m"
    models.save(tiny(), folder)
    (folder / "tokenizer.json").write_text("{}")
    save(tiny(), folder, max_shard_bytes=2000)
    present = {path.name for path in folder.iterdir()}
    assert {"tokenizer.json", NATIVE_FILE, st.INDEX_FILE} <= present
    assert not present & {"config.json", st.SINGLE_FILE}
    check_equal(load(folder), tiny())
    models.save(tiny(), folder)
    present = {path.name for path in folder.iterdir()}
    assert NATIVE_FILE not in present and {"tokenizer.json", "config.json"} <= present


def test_dtype_is_of_what_learns(tmp_path):
    model = rewritten()
    save(model, tmp_path / "f32")
    save(model, tmp_path / "bf16", dtype="bfloat16")
    cast = load(tmp_path / "f32", dtype=jnp.bfloat16)
    check_equal(load(tmp_path / "bf16"), cast)
    assert cast.embed.weight.dtype == jnp.bfloat16
    ffn = cast.layers[0].ffn
    assert ffn.threshold.get_value().dtype == jnp.float32
    check_equal(ffn.gate.weight, model.layers[0].ffn.gate.weight)
    assert isinstance(ffn.gate.weight, weights.Int4)
    for wrong, message in (("int8", "a float type"), ("float64", "float32, bfloat16 or float16")):
        with pytest.raises(ConfigError, match=message):
            load(tmp_path / "f32", dtype=wrong) if wrong == "int8" else save(
                model, tmp_path / "x", dtype=wrong
            )


def test_every_array_goes_where_it_is_told(tmp_path):
    model = models.stack(quantized(tiny(), lambda weight: int4(weight, group=8)))
    save(model, tmp_path / "m")
    mesh = compat.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
    asked = {}

    def where(path, axes, shape):
        asked[path] = axes
        cut = {"embed": "a", "mlp": "b"}
        parts = [
            cut.get(name) if side % 2 == 0 else None for name, side in zip(axes, shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*parts))

    found = load(tmp_path / "m", sharding=where)
    check_equal(jax.device_put(found, jax.devices()[0]), model)
    gate = "layers.period[0].ffn.gate.w.value."
    assert asked[gate + "codes"] == ("layers", "embed", "mlp")
    assert asked[gate + "divisor"] == ("layers",)
    codes = found.layers.period[0].ffn.gate.weight.codes
    assert codes.sharding.spec == PartitionSpec(None, "a", "b")


def test_reading_in_pieces(tmp_path, monkeypatch):
    model = {
        "w": np.arange(60, dtype="float32").reshape(10, 2, 3),
        "s": np.float32([7]).reshape(()),
    }
    monkeypatch.setattr(read, "PIECE", 50)
    there_and_back(model, tmp_path / "m")


class Own(nnx.Module):
    """A module of another package."""

    def __init__(self):
        self.w = nnx.Param(jnp.ones(2))


def with_attribute(name, value):
    """A norm with one more attribute."""
    norm = layers.RMSNorm(2)
    setattr(norm, name, value)
    return norm


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: {"x": [Own()]}, r"\['x'\]\[0\] is a Own, which the native format does not know"),
        (lambda: with_attribute("act", jax.nn.gelu), "the model.act is the .*gelu; a static"),
        (lambda: with_attribute("axes", ("a", ["b"])), r"the model.axes\[1\] is the list"),
        (lambda: with_attribute("_x", 1), "the model has the private attribute '_x'"),
        (lambda: with_attribute("x", float("nan")), "the model.x is NaN"),
        (
            lambda: with_attribute("spec", tiny().layers[0].attn.spec.rope.__class__),
            "the type Rope",
        ),
        (lambda: {"x": 1.5}, r"\['x'\] is a float, not an array"),
        (lambda: {3: jnp.ones(2)}, "the model has the key 3"),
        (lambda: {"x": jax.random.key(0)}, "an array of key<fry> cannot be stored"),
        (lambda: jax.eval_shape(lambda: {"x": jnp.ones(2)}), "ShapeDtypeStruct, not an array"),
        (lambda: {"x": nnx.Param(jnp.ones(2), colour=1)}, r"\['x'\] has the metadata 'colour'"),
        (lambda: {"x": nnx.Param({"y": jnp.ones(2)})}, r"\['x'\] holds a dict"),
        (lambda: {"x": nnx.BatchStat(jnp.ones(2))}, r"\['x'\] is a BatchStat"),
        (lambda: layers.LayerInputs(), "the model is a LayerInputs"),
        (lambda: {"x": nnx.Param(jnp.array([1, jnp.nan]))}, r"\['x'\].value holds NaN"),
    ],
)
def test_what_cannot_be_saved_is_named(model, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        save(model(), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_what_does_not_learn_may_be_infinite(tmp_path):
    there_and_back(layers.Statistic(jnp.array([jnp.inf, jnp.nan])), tmp_path / "m")
    mask = weights.SparseInput(weights.Dense(jnp.ones((2, 2))), jnp.float32(jnp.inf))
    there_and_back(nnx.Param(mask), tmp_path / "m")


def test_infinity_is_refused_where_it_is_checked(tmp_path):
    save(layers.RMSNorm(2), tmp_path / "m")
    entry = st.entry(np.array([1, np.inf], np.float32))
    st.write_file(tmp_path / "m" / st.SINGLE_FILE, {"scale.value": entry})
    with pytest.raises(FormatError, match=r"'scale.value' holds NaN or infinity"):
        load(tmp_path / "m")
    assert np.isinf(load(tmp_path / "m", check_finite=False).scale[...][1])


def test_int4_from_beyond(tmp_path):
    save({"x": jnp.ones(3, jnp.int4)}, tmp_path / "m")
    st.write_file(tmp_path / "m" / st.SINGLE_FILE, {"['x']": st.entry(np.int8([1, 8, 0]))})
    with pytest.raises(FormatError, match="is beyond int4"):
        load(tmp_path / "m")


def tree_of(content):
    """The entry of a norm's scale in the file of one."""
    return content["tree"]["children"]["scale"]


EDITS = {
    "version": (lambda c: c.update(version=2), "version 2; this version of ffnlab reads version 1"),
    "version-true": (lambda c: c.update(version=True), "version True"),
    "format": (lambda c: c.update(format="gguf"), "not a model of ffnlab"),
    "more": (lambda c: c.update(more=1), "exactly format, version and tree"),
    "type": (lambda c: c["tree"].update(type="os.system"), "'os.system' is no listed type"),
    "config": (lambda c: c["tree"].update(type="Rope"), "'Rope' is no listed type of a node"),
    "abstract": (lambda c: c["tree"].update(type="Weight"), "'Weight' is no listed type"),
    "private": (lambda c: c["tree"]["static"].update(_pytree__nodes=1), "'_pytree__nodes' is no"),
    "method": (lambda c: c["tree"]["static"].update(__call__=1), "'__call__' is no attribute"),
    "function": (lambda c: c["tree"]["static"].update(sow=1), "'sow' is no attribute of a RMSNorm"),
    "twice": (lambda c: c["tree"]["static"].update(scale=1), "'scale' is a child and a static"),
    "static": (lambda c: c["tree"]["static"].update(eps={"type": "Rope"}), "no static value"),
    "rope": (
        lambda c: c["tree"]["static"].update(eps={"type": "Rope", "fields": {"theta": 0.5}}),
        "rope needs theta > 1",
    ),
    "rope-type": (
        lambda c: c["tree"]["static"].update(eps={"type": "Rope", "fields": {"theta": "1"}}),
        "eps.theta: '1' is not of type float",
    ),
    "rope-field": (
        lambda c: c["tree"]["static"].update(eps={"type": "Rope", "fields": {"thetas": 1}}),
        "Rope has no field 'thetas'",
    ),
    "spec-lacks": (
        lambda c: c["tree"]["static"].update(eps={"type": "AttentionSpec", "fields": {"heads": 1}}),
        "AttentionSpec lacks its field 'kv_heads'",
    ),
    "axes": (lambda c: tree_of(c).update(static={"axes": [3]}), "are no list of names"),
    "metadata": (lambda c: tree_of(c).update(static={"ref": True}), "no static fields but axes"),
    "empty": (lambda c: tree_of(c).update(children={}), "holds one array or one weight"),
    "module-in-param": (
        lambda c: tree_of(c)["children"].update(value={"type": "list", "children": []}),
        "holds one array or one weight",
    ),
    "shape": (
        lambda c: tree_of(c)["children"]["value"].update(shape=[10**12, 10**6]),
        r"1 problems:\n  'scale.value' is float32\[2\], said to be float32\[10+, 10+\]",
    ),
    "dtype": (
        lambda c: tree_of(c)["children"]["value"].update(dtype="object"),
        "describes no array",
    ),
    "carrier": (
        lambda c: tree_of(c)["children"]["value"].update(stored="int8"),
        "describes no array of float32",
    ),
    "same": (
        lambda c: tree_of(c)["children"].update(value={"same": "scale.value"}),
        "which is no earlier array",
    ),
    "missing": (
        lambda c: c["tree"]["children"].update(
            w={"type": "Param", "children": {"value": {"dtype": "int8", "shape": []}}}
        ),
        "1 problems:\n  'w.value' is missing",
    ),
    "unknown": (
        lambda c: c["tree"].update(children={"scale": None}),
        "1 problems:\n  'scale.value' is not part of the model",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_file_that_says_something_else(name, tmp_path):
    change, message = EDITS[name]
    save(layers.RMSNorm(2), tmp_path / "m")
    edited(tmp_path / "m", change)
    with pytest.raises(FormatError, match=message):
        load(tmp_path / "m")


def test_a_weight_that_does_not_hold_together(key, tmp_path):
    def change(content, **static):
        content["tree"]["static"].update(static)

    for static, message in (
        ({"group": 6}, "group=6 with 3 rows of scales"),
        ({"rows": 10**9}, "rows=1000000000 does not fit"),
        ({"act": "e5"}, "act='e5'"),
        ({"group": "8"}, "group: '8' is not of type int"),
    ):
        save(WEIGHTS["Int4"](key), tmp_path / "m")
        edited(tmp_path / "m", lambda content, static=static: change(content, **static))
        with pytest.raises(FormatError, match=message):
            load(tmp_path / "m")
    save(WEIGHTS["Masked"](key), tmp_path / "m")
    edited(tmp_path / "m", lambda c: c["tree"]["children"].update(w=None))
    with pytest.raises(FormatError, match="'w': no Weight, which a Masked has"):
        load(tmp_path / "m")


def test_depth_and_count_are_bounded(tmp_path, monkeypatch):
    save(layers.RMSNorm(2), tmp_path / "m")
    deep = {"type": "list", "children": []}
    for _ in range(100):
        deep = {"type": "list", "children": [deep]}
    edited(tmp_path / "m", lambda c: c.update(tree=deep))
    with pytest.raises(FormatError, match="nested more than 64 deep"):
        load(tmp_path / "m")
    monkeypatch.setattr(read, "NODES", 10)
    edited(tmp_path / "m", lambda c: c.update(tree={"type": "list", "children": [None] * 10}))
    with pytest.raises(FormatError, match="over 10 nodes"):
        load(tmp_path / "m")
    static = []
    for _ in range(40):
        static = [static]
    edited(tmp_path / "m", lambda c: c.update(tree={"type": "RMSNorm", "static": {"x": static}}))
    edited(tmp_path / "m", lambda c: c["tree"].update(children={}))
    with pytest.raises(FormatError, match="nested more than 16 deep"):
        load(tmp_path / "m")


def test_no_directory(tmp_path):
    for folder, message in ((tmp_path / "x", "not a directory"), (tmp_path, "cannot be read")):
        with pytest.raises(FormatError, match=message):
            load(folder)


def test_every_kind_is_under_test():
    assert {name.partition("-")[0] for name in MODELS} >= KINDS.keys()


def test_type_names_are_unique_and_every_part_is_listed():
    known = schema.listed()
    assert all(name == kind.__name__ for name, kind in known.items())
    assert not known.keys() & schema.CONTAINERS.keys()
    above = set(models.ABOVE)
    for package in (layers, weights, models):
        for name in set(package.__all__) - above:
            kind = getattr(package, name)
            is_part = inspect.isclass(kind) and issubclass(kind, nnx.Module | weights.Weight)
            if is_part and not inspect.isabstract(kind):
                assert known[name] is kind
    assert {"AttentionSpec", "DecoderConfig", "Join", "Rope", "Statistic"} <= known.keys()
    assert not {"Cache", "Context", "Weight", "AxisNames", "Sampling"} & known.keys()


def test_two_types_of_one_name_are_refused(monkeypatch):
    other = type("Rope", (layers.RMSNorm,), {})
    monkeypatch.setattr(models, "Rope", other, raising=False)
    monkeypatch.setattr(models, "__all__", [*models.__all__, "Rope"])
    schema.listed.cache_clear()
    with pytest.raises(TypeError, match="two listed types are called Rope"):
        schema.listed()
    monkeypatch.undo()
    schema.listed.cache_clear()


def test_a_field_of_later_versions_keeps_older_files(tmp_path):
    attention = tiny().layers[0].attn
    save(attention, tmp_path / "m")
    fields = json.loads((tmp_path / "m" / NATIVE_FILE).read_text())["tree"]["static"]["spec"][
        "fields"
    ]
    assert "heads" in fields and "causal" not in fields
    attention.spec = dataclasses.replace(attention.spec, causal=False)
    there_and_back(attention, tmp_path / "m")
