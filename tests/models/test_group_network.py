"""The network of groups: the authors' encoder, what is dropped, meshes, rounding, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import transform, tree
from ffnlab.data import ArrayBatches, Labelled
from ffnlab.errors import ConfigError
from ffnlab.formats import load, save
from ffnlab.graphs import keyed
from ffnlab.learning import backprop
from ffnlab.losses import labelled
from ffnlab.models import GroupNetworkConfig
from ffnlab.parallel import parse_mesh, train
from ffnlab.quantization import nearest
from ffnlab.weights import Dense, Int4
from tests.fixtures.rphgnn import record

GROUPS = tuple(record.ENCODER["groups"])
CONFIG = GroupNetworkConfig(GROUPS, record.CLASSES, record.ENCODER["hidden"])


def official_network(fuse):
    """The network with the recorded weights."""
    model = GroupNetworkConfig(GROUPS, 3, 6, fuse=fuse).make(key=jax.random.key(0))
    given = record.weights()
    maps = {"out": model.out, "layers.0": model.layers[0]}
    for g, group in enumerate(model.groups):
        maps[f"groups.{g}.mix"] = group.mix
        maps |= {f"groups.{g}.layers.{i}": layer for i, layer in enumerate(group.layers)}
    for name, module in maps.items():
        linear = getattr(module, "linear", module)
        w = given[f"{name}.w"]
        w = w[: record.ENCODER["hidden"]] if (fuse, name) == ("mean", "layers.0") else w
        assert linear.weight.shape == w.shape
        linear.w.set_value(Dense(jnp.asarray(w, jnp.float32)))
        linear.b.set_value(jnp.asarray(given[f"{name}.b"], jnp.float32))
        if module is not linear:
            module.act.slope.set_value(jnp.asarray(given[f"{name}.slope"], jnp.float32))
    return model


def rows():
    return jnp.asarray(
        np.concatenate([x.reshape(len(x), -1) for x in record.inputs()], axis=1), jnp.float32
    )


@pytest.mark.parametrize("fuse", ["concat", "mean"])
def test_the_authors_encoder_gives_the_same(fixtures, fuse):
    with np.load(fixtures / "rphgnn" / "official.npz", allow_pickle=False) as saved:
        expected = saved[f"encoder.{fuse}"]
    found = jax.jit(lambda model, x: model(x))(official_network(fuse), rows())
    np.testing.assert_allclose(found, expected, atol=1e-5)  # float32 beside float64
    half = official_network(fuse)(rows().astype(jnp.float16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, expected, atol=0.02)


def test_what_is_dropped_is_of_the_key():
    config = GroupNetworkConfig(GROUPS, 3, 64, input_drop=0.3, drop=0.5)
    model, x = config.make(key=jax.random.key(0)), rows()
    still = model(x)
    keys = jax.random.split(jax.random.key(1), 400)
    views = jax.jit(jax.vmap(lambda key: model(x, key=key)))(keys)
    np.testing.assert_allclose(views[0], jax.jit(lambda k: model(x, key=k))(keys[0]), atol=1e-5)
    assert float(views.std(0).min()) > 0.05 and np.isfinite(views).all()
    only_inputs = GroupNetworkConfig(GROUPS, 3, 64, input_drop=0.3).make(key=jax.random.key(0))
    assert not np.allclose(only_inputs(x, key=keys[0]), still)
    none = GroupNetworkConfig(GROUPS, 3, 64).make(key=jax.random.key(0))
    np.testing.assert_array_equal(none(x, key=keys[0]), none(x))
    np.testing.assert_array_equal(none(x), still)


def test_sizes_and_the_draw():
    model = GroupNetworkConfig(((4, 50), (1, 30)), 5, 200).make(key=jax.random.key(0))
    assert [group.mix.weight.shape for group in model.groups] == [(4, 2), (1, 1)]
    assert [group.layers[0].linear.weight.shape[0] for group in model.groups] == [100, 30]
    deviation = float(model.groups[0].layers[0].linear.weight.dense().std())
    assert deviation == pytest.approx((2 / 300) ** 0.5, rel=0.03)
    assert not model.out.bias.any() and model.layers[0].act.slope.get_value().tolist() == [0.25]
    small = GroupNetworkConfig(((4, 50),), 5, 20, group_layers=1, fused_layers=1)
    assert len(small.make(key=jax.random.key(0)).layers) == 0
    trained, _ = tree.trained(model)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trained))


@pytest.fixture(scope="module")
def learned():
    """Steps of learning, on a mesh or not: some rows, half of the hidden units dropped."""
    model = GroupNetworkConfig(GROUPS, 3, 8, input_drop=0.1, drop=0.5).make(key=jax.random.key(0))
    random = np.random.default_rng(0)
    rows = random.standard_normal((24, CONFIG.width), np.float32)
    batches = ArrayBatches(Labelled(rows, random.integers(0, 3, 24).astype(np.int32)), 8, 0)
    rule = backprop(keyed(labelled), optax.adam(1e-2), informed=True)
    return lambda steps, **options: train(
        rule, model, batches, steps, key=jax.random.key(1), **options
    )


def params(outcome):
    return jax.tree.leaves(tree.trained(outcome.state.model)[0])


@pytest.mark.parametrize("mesh", ["dp=2", "fsdp=2"])
def test_on_a_mesh_the_same_is_learned(learned, mesh):
    plain, placed = params(learned(4)), params(learned(4, mesh=parse_mesh(mesh)))
    for one, other in zip(plain, placed, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    whole = [leaf.sharding.is_fully_replicated for leaf in placed if leaf.ndim == 2]
    assert all(whole) == (mesh == "dp=2"), "weights are cut by their names"


def test_a_resumed_run_ends_in_the_same_bits(learned, tmp_path):
    learned(2, folder=tmp_path)
    resumed = params(learned(4, folder=tmp_path, resume=True))
    for one, other in zip(params(learned(4)), resumed, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize(("format", "apart"), [("int4", 0.25), ("int8", 0.02)])
def test_maps_are_rounded_saved_and_loaded(tmp_path, format, apart):
    model = GroupNetworkConfig(((4, 16), (1, 6)), 5, 32).make(key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 70))
    rounded, _ = transform.apply(nearest(format=format), model)
    if format == "int4":
        assert all(isinstance(b.layers[0].linear.weight, Int4) for b in rounded.groups)
    wanted, found = model(x), rounded(x)
    off = float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))
    assert 0 < off < apart  # a few steps of the format through five maps
    save(rounded, tmp_path, format="ffnlab")
    np.testing.assert_allclose(load(tmp_path)(x), found, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": ()}, "one or more pairs"),
        ({"groups": ((0, 3),)}, "one or more pairs"),
        ({"classes": 0}, "classes=0"),
        ({"filters": 0}, "filters=0"),
        ({"fuse": "max"}, "fuse='max' is not one of"),
        ({"drop": 1.0}, "drop=1.0 must lie in 0..1"),
    ],
)
def test_sizes_that_there_are_not(options, message):
    with pytest.raises(ConfigError, match=message):
        GroupNetworkConfig(**{"groups": GROUPS, "classes": 3} | options)


def test_rows_of_another_width():
    with pytest.raises(ConfigError, match=r"x \[4, 27\].* rows of 28 numbers"):
        CONFIG.make(key=jax.random.key(0))(rows()[:, 1:])
