"""Meta-training and its transform: the loss by hand, one program, relabelled nets, recipes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import formats, models, transform, tree
from ffnlab.errors import ConfigError, FormatError
from ffnlab.layers import MLP
from ffnlab.learning import backprop, labelled
from ffnlab.models import (
    ConvNet,
    MetaNetworkConfig,
    ResNet,
    ResNetConfig,
    groups,
    narrow,
)
from ffnlab.models.groups import COLUMNS
from ffnlab.pruning import group_norm, group_penalty
from ffnlab.pruning.group_norm import products
from ffnlab.pruning.meta import Lessons, corrected, lesson, meta_loss, meta_prune
from ffnlab.recipes import parse_recipe
from ffnlab.testing import counted, equal, tiny
from ffnlab.weights import Dense

KEY = jax.random.key(0)
TOLERANCE = 1e-5  # of the card, float32
SIZES = (4, 6, 5, 3)


def meta(nodes, edges, ratio=0.5, key=KEY):
    return MetaNetworkConfig(nodes, edges, layers=2, width=6, ratio=ratio).make(key=key)


NET = meta(1, 1)


def mlp(seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    model = MLP(SIZES, key=keys[0])
    for linear, k in zip(model.maps, keys[1:], strict=True):
        linear.b.set_value(jax.random.normal(k, linear.b[...].shape))
    return model


def rows(count=12):
    random = np.random.default_rng(0)
    x = random.normal(size=(count, SIZES[0])).astype(np.float32)
    return x, random.integers(0, SIZES[-1], count).astype(np.int32)


def moved(model, name, order):
    """The same function with the units of a group in another order."""
    (group,) = (g for g in groups(model) if g.name == name)
    new = tree.copy(model)
    nodes = dict(tree.walk(new))
    for part in group.parts:
        variable = nodes[part.path]
        if not hasattr(variable, "get_value"):
            raise AssertionError("a shortcut without parameters cannot be moved")
        value = variable.get_value()
        array = value.dense() if isinstance(value, Dense) else value
        place = np.arange(array.shape[part.axis])
        place[part.index.reshape(-1)] = part.index[order].reshape(-1)
        array = array[..., place] if part.axis == COLUMNS else array[place]
        variable.set_value(Dense(array) if isinstance(value, Dense) else array)
    return new


RESNET = ResNet(ResNetConfig((1, 1), (3, 4), 3, block="bottleneck", expansion=2), key=KEY)
MODELS = {
    "mlp": (NET, lambda: mlp(1), "maps[0]"),
    "convnet": (meta(5, 9), lambda: ConvNet((2, 4, 3), 3, key=KEY), "convs[1]"),
    "resnet, inside": (meta(8, 9), lambda: RESNET, "residuals[1].reduce"),
    "resnet, a sum": (meta(8, 9), lambda: RESNET, "residuals[0].expand"),
    "decoder": (meta(2, 2), tiny, "layers[1].ffn"),
}


@pytest.mark.parametrize("name", MODELS)
def test_relabelled_hidden_neurons_come_out_relabelled(name):
    """The corrected network of a relabelled one is the relabelled corrected one, bit for bit in its
    places, to 1e-5 in its numbers: the function is the same."""
    net, make, group = MODELS[name]
    model = make()
    (size,) = (g.size for g in groups(model) if g.name == group)
    order = np.random.default_rng(1).permutation(size)
    found, known = corrected(net, moved(model, group, order)), corrected(net, model)
    for a, b in zip(
        jax.tree.leaves(found), jax.tree.leaves(moved(known, group, order)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=TOLERANCE)
    assert not equal(known, model)


def test_what_is_in_no_graph_stays():
    model = tiny()
    new = corrected(meta(2, 2), model)
    for path, node in tree.walk(model):
        if "ffn." not in path and hasattr(node, "get_value"):
            assert equal(dict(tree.walk(new))[path], node), path
    stacked = corrected(meta(2, 2), models.stack(model))
    assert equal(models.unstack(stacked), new)
    statistics = corrected(meta(8, 9), RESNET).stem.norm
    assert equal(statistics.mean, RESNET.stem.norm.mean)


def test_the_loss_is_the_sum_over_batches_and_the_penalty_once():
    model, (x, y) = mlp(1), rows()
    one = lesson(model, (x, y), batches=3)
    value, told = jax.jit(meta_loss(reg=0.1, alpha=4.0))(NET, one)
    new = corrected(NET, model)
    cut = lambda i: (jnp.asarray(x[i : i + 4]), y[i : i + 4])  # noqa: E731
    parts = [labelled(new, cut(i)) for i in (0, 4, 8)]
    nats = [float(part[0]) for part in parts]
    penalty = float(group_penalty(new, alpha=4.0))
    np.testing.assert_allclose(value, sum(nats) + 0.1 * penalty, rtol=1e-5)
    np.testing.assert_allclose(told["data"], np.mean(nats), rtol=1e-5)
    np.testing.assert_allclose(told["penalty"], penalty, rtol=1e-5)
    right = [float(part[1]["accuracy"]) for part in parts]
    np.testing.assert_allclose(told["accuracy"], np.mean(right), rtol=1e-5)


def test_one_program_serves_all_data_models_of_a_kind_and_the_loss_falls():
    # Plain descent, as optax's Adam takes integers for floats, which this folder's tests refuse.
    rule = backprop(
        meta_loss(reg=0.01), optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    )
    state = rule.init(meta(1, 1, ratio=0.2), KEY)
    lessons = Lessons([lesson(mlp(seed), rows()) for seed in range(3)])
    state, first = rule.step(state, lessons(0))
    with counted() as count:
        for position in range(1, 60):
            state, last = rule.step(state, lessons(position))
    assert count.programs == 0
    assert last["loss"] < first["loss"] and last["penalty"] < first["penalty"]
    assert equal(lessons(4).model, mlp(1))


def test_it_takes_out_what_is_small_in_the_corrected_network(tmp_path):
    formats.save(NET, tmp_path / "meta", format="ffnlab")
    model, where = mlp(7), str(tmp_path / "meta")
    step = meta_prune(metanetwork=where, speed_up=2.0)
    new, kept = transform.apply(step, model)
    by_hand = corrected(NET, model)
    same, also = transform.apply(group_norm(speed_up=2.0), by_hand)
    assert equal(kept, also) and equal(new, same) and equal(new, narrow(by_hand, kept))
    assert products(new) * 2 <= products(model)
    (stage,) = parse_recipe(
        f'[[stage]]\ntransform = "meta_prune"\nmetanetwork = "{where}"\nspeed_up = 2.0'
    ).stages
    assert equal(transform.apply(stage.build(), model)[0], new)


def test_what_is_refused(tmp_path):
    formats.save(mlp(0), tmp_path / "mlp", format="ffnlab")
    for options, said in (
        ({"metanetwork": NET}, "rate=None and speed_up=None: give exactly one"),
        ({"metanetwork": NET, "speed_up": 0.5}, "speed_up=0.5 must be at least 1"),
        (
            {"metanetwork": str(tmp_path / "mlp"), "rate": 0.5},
            "mlp holds a model of kind 'mlp'; accepted here: 'meta'",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            meta_prune(**options)
    with pytest.raises(FormatError):
        meta_prune(metanetwork=str(tmp_path / "nowhere"), rate=0.5)
    wrong = "the metanetwork has 1 numbers of a node and 1 of an edge; a model of layout 'resnet'"
    with pytest.raises(ConfigError, match=wrong):
        transform.apply(meta_prune(metanetwork=NET, rate=0.5), RESNET)
    with pytest.raises(ConfigError, match=wrong):
        meta_loss()(NET, lesson(RESNET, rows()))
    for call, said in (
        (lambda: meta_loss(reg=-1.0), "reg=-1.0 must be at least 0"),
        (lambda: meta_loss(alpha=0.5), "alpha=0.5 must be at least 1"),
        (lambda: lesson(mlp(0), rows(3), batches=4), "batches=4 of 3 rows"),
        (lambda: lesson(mlp(0), (), batches=1), "batches=1 of 0 rows"),
        (lambda: Lessons([]), r"lessons=\[\]: a data model or more"),
    ):
        with pytest.raises(ConfigError, match=said):
            call()
