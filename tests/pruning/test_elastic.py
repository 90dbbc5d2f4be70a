"""Elastic training: every network by masks is the one cut out, and one step trains them all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.data import ArrayBatches
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP, BatchNorm, Block, Join
from ffnlab.learning import backprop, labelled, members, next_token
from ffnlab.losses import Moment, measuring
from ffnlab.models import (
    ConvNet,
    Encoder,
    EncoderConfig,
    ResNet,
    ResNetConfig,
    ViT,
    ViTConfig,
    gated,
    groups,
    remove,
    stack,
)
from ffnlab.parallel import LoopOptions, train
from ffnlab.pruning import Net, cut, elastic, formed
from ffnlab.pruning.elastic import nets
from ffnlab.testing import counted, equal, tiny
from ffnlab.tree import walk
from tests.often import often

KEY = jax.random.key(0)
TOLERANCE = 1e-6  # of the length of the output: the same sums in another order, float32
ROWS = jax.random.normal(jax.random.key(1), (6, 4))
IMAGES = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
CLASSES = jnp.array([0, 1, 1, 0, 1, 0])
BERT = EncoderConfig(32, 8, 10, 3, 2, 4, max_positions=8, head="masked")
VIT = ViTConfig((8, 8), 4, 8, 10, 3, 2, classes=3)
MODELS = {
    "mlp": (lambda: MLP((4, 5, 6, 2), key=KEY), ROWS),
    "convnet": (lambda: ConvNet((3, 4, 5, 4), 2, key=KEY), IMAGES),
    "resnet": (lambda: ResNet(ResNetConfig((2, 1, 1), (4, 6, 9), 3), key=KEY), IMAGES),
    "vit": (lambda: ViT(VIT, key=KEY), IMAGES),
    "bert": (lambda: Encoder(BERT, key=KEY), jnp.array([[1, 2, 3]])),
    "decoder": (lambda: tiny(), jnp.array([[1, 2, 3]])),
    "stacked decoder": (lambda: stack(tiny()), jnp.array([[1, 2, 3]])),
    "ffns alone": (lambda: remove(ViT(VIT, key=KEY), [0, 2, 4]), IMAGES),
}
DEEP = ("vit", "bert", "decoder", "stacked decoder", "ffns alone")


@jax.jit
def run(model, x):
    return model(x)


@jax.jit
def run_formed(model, net, x):
    return formed(model, net)(x)


def biased(model):
    """A model of which nothing is zero: biases of masked units would be seen."""
    rng = np.random.default_rng(3)
    draw = lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)  # noqa: E731
    return jax.tree.map(lambda x: draw(x) if x.ndim == 1 and x.dtype == jnp.float32 else x, model)


def close(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.linalg.norm(a - b) <= TOLERANCE * np.linalg.norm(b)


@pytest.mark.parametrize("name", often(MODELS, "mlp", "ffns alone"))
def test_a_network_by_masks_is_the_one_that_is_cut_out(name):
    make, x = MODELS[name]
    model, rng = biased(make()), np.random.default_rng(0)
    for depth in (1, 2) if name in DEEP else (None, None):
        widths = {g.name: int(rng.integers(1, g.size + 1)) for g in groups(model)}
        net = Net(widths, depth)
        small = cut(model, net)
        want = run(small, x)
        assert np.linalg.norm(run(model, x) - want) > 1e-3 * np.linalg.norm(want)
        close(run_formed(model, jax.tree.map(jnp.asarray, net), x), want)
        left = {g.name: g.size for g in groups(small)}
        assert left.items() <= widths.items()  # groups of blocks that went are gone


def test_the_largest_network_is_the_model_itself():
    model = biased(ViT(VIT, key=KEY))
    whole = Net({g.name: g.size for g in groups(model)}, 3)
    np.testing.assert_array_equal(run_formed(model, whole, IMAGES), run(model, IMAGES))
    assert equal(cut(model, whole), model)


@settings(max_examples=25)
@given(st.integers(0, 2**31 - 1), st.integers(0, 7), st.booleans())
def test_networks_of_a_step(seed, drawn, sandwich):
    widths, depths = {"a": (3, 1, 8), "b": (2, 5)}, (4, 2)
    found = nets(widths, depths, jax.random.key(seed), drawn=drawn, sandwich=sandwich)
    told = [(int(n.widths["a"]), int(n.widths["b"]), int(n.depth)) for n in found]
    if sandwich:
        assert told[:2] == [(8, 5, 4), (1, 2, 2)]
    assert len(told) == drawn + 2 * sandwich
    assert all(a in (3, 1, 8) and b in (2, 5) and d in (4, 2) for a, b, d in told)


def test_networks_are_drawn_evenly_and_each_choice_by_itself():
    widths = {"a": (1, 2), "b": (1, 2)}
    draw = jax.jit(
        lambda key: [
            (n.widths["a"], n.widths["b"], n.depth)
            for n in nets(widths, (1, 2), key, drawn=2, sandwich=False)
        ]
    )
    rows = np.array(jax.vmap(draw)(jax.random.split(KEY, 2000)))  # [2, 3, 2000]
    assert not np.array_equal(rows[0], rows[1])
    for row in rows:
        share = np.unique(row, axis=1, return_counts=True)[1] / 2000
        np.testing.assert_allclose(share, 1 / 8, atol=0.03)  # all eight; sigma is .0074


def moment(seed=1):
    return Moment(jnp.int32(0), jax.random.key(seed))


def test_the_loss_is_the_mean_over_its_networks():
    model, batch = biased(MLP((4, 5, 6, 2), key=KEY)), (ROWS, CLASSES)
    widths = {"maps[0]": (2, 5), "maps[1]": (1, 3, 6)}
    found = nets(widths, (), jax.random.split(moment().key)[0], drawn=3, sandwich=True)
    each = [labelled(cut(model, jax.tree.map(int, net)), batch) for net in found]
    mean, metrics = elastic(labelled, widths, drawn=3)(model, batch, moment())
    assert float(mean) == pytest.approx(np.mean([float(v) for v, _ in each]), rel=1e-5)
    assert float(metrics["largest"]) == pytest.approx(float(each[0][0]), rel=1e-5)
    assert float(metrics["smallest"]) == pytest.approx(float(each[1][0]), rel=1e-5)
    accuracy = np.mean([float(m["accuracy"]) for _, m in each])
    assert float(metrics["accuracy"]) == pytest.approx(accuracy, rel=1e-5)
    alone = elastic(labelled, widths.items(), drawn=1, sandwich=False)(model, batch, moment())
    assert set(alone[1]) == {"accuracy"}


def test_without_a_choice_left_it_is_the_loss_and_its_gradient():
    model, batch = biased(MLP((4, 5, 2), key=KEY)), (ROWS, CLASSES)
    whole = elastic(labelled, {"maps[0]": (5,)}, drawn=1)
    ours = jax.grad(lambda m: whole(m, batch, moment())[0])(model)
    want = jax.grad(lambda m: labelled(m, batch)[0])(model)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_only_networks_that_have_a_unit_teach_it():
    model, batch = biased(MLP((4, 5, 2), key=KEY, activation="tanh")), (ROWS, CLASSES)
    loss = elastic(labelled, {"maps[0]": (2, 3)}, drawn=2)
    found = jax.grad(lambda m: loss(m, batch, moment())[0])(model)
    w = np.asarray(found.maps[0].weight.dense())
    assert (np.abs(w[:, :2]) > 0).any(0).all() and (w[:, 3:] == 0).all()


def test_an_informed_loss_gets_one_moment_for_all_networks():
    seen = []

    def drawing(model, batch, moment):
        seen.append(moment)
        return labelled(model, batch)

    loss = elastic(drawing, {"maps[0]": (2, 5)}, drawn=1, informed=True)
    loss(MLP((4, 5, 2), key=KEY), (ROWS, CLASSES), Moment(jnp.int32(7), KEY))
    assert len(seen) == 3 and all(m.step == 7 for m in seen)
    keys = [jax.random.key_data(m.key).tolist() for m in seen]
    assert keys[0] == keys[1] == keys[2] != jax.random.key_data(KEY).tolist()


def test_statistics_are_those_of_the_largest_network():
    model = biased(ResNet(ResNetConfig((1,), (4,), 2), key=KEY))
    batch = (IMAGES, jnp.array([0, 1]))
    loss = elastic(measuring(labelled), {"stem": (1, 4), "residuals[0].spatial": (2, 4)}, drawn=1)
    found, want = loss(model, batch, moment())[2], measuring(labelled)(model, batch)[2]
    assert set(found) == set(want)
    for path in want:
        for a, b in zip(*map(jax.tree.leaves, (found[path], want[path])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def digits(n=64, sides=False):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, n).astype(np.int32)
    x = rng.normal(size=(n, 8, 8, 1) if sides else (n, 4)).astype(np.float32)
    x[np.arange(n), 0] += 4.0 * y.reshape(-1, *[1] * (x.ndim - 2)) - 2.0
    return x, y


@pytest.mark.parametrize("kind", often(["mlp", "ffns alone"], "mlp"))
def test_it_learns_by_backprop_in_one_program(kind):
    """All sizes get better in training, and steps of other draws compile nothing."""
    if kind == "mlp":
        model, depths = MLP((4, 8, 2), key=KEY), ()
        widths = {"maps[0]": (1, 4, 8)}
        smallest, data = Net({"maps[0]": 1}), digits()
    else:
        config = ViTConfig((8, 8), 8, 6, 8, 3, 1, channels=1, classes=2, pool="mean")
        model, depths = remove(ViT(config, key=KEY), [0, 2, 4]), (1, 2, 3)
        widths = {f"layers[{i}].ffn": (2, 8) for i in range(3)}
        smallest, data = Net(dict.fromkeys(widths, 2), 1), digits(sides=True)
    rule = backprop(elastic(labelled, widths, depths=depths), optax.sgd(0.3), informed=True)
    batches = ArrayBatches(data, 16)
    state = rule.init(model, KEY)
    state, metrics = rule.step(state, batches(0))
    with counted() as count:
        for position in range(1, 30):
            state, last = rule.step(state, batches(position))
            assert all(np.isfinite(v) for v in last.values())
    assert count.programs == 0
    rows = jax.tree.map(jnp.asarray, data)
    before, after = (labelled(cut(m, smallest), rows) for m in (model, state.model))
    assert after[0] < 0.7 * before[0] and float(after[1]["accuracy"]) > 0.9
    assert float(last["largest"]) < 0.7 * float(metrics["largest"])


@pytest.mark.slow
def test_members_learn_it_side_by_side():
    data, widths = digits(), {"maps[0]": (1, 8)}
    rows = jax.tree.map(jnp.asarray, data)
    make = lambda rate: backprop(elastic(labelled, widths), optax.sgd(rate), informed=True)  # noqa: E731
    rule = members(make, 2, vary={"rate": [0.3, 0.3]})
    models = jax.vmap(lambda key: MLP((4, 8, 2), key=key))(jax.random.split(KEY, 2))
    options = LoopOptions(log_every=0, progress=False)
    batches = ArrayBatches(data, 16)
    found = train(rule, models, batches, 60, key=KEY, options=options, together=10)
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], rule.model(found.state))
        assert float(labelled(cut(one, Net({"maps[0]": 1})), rows)[1]["accuracy"]) > 0.9


@pytest.mark.slow
def test_a_decoder_learns_in_all_depths():
    rule = backprop(elastic(next_token, depths=(1, 3)), optax.sgd(0.3, 0.9), informed=True)
    state, tokens = rule.init(tiny(), KEY), jnp.tile(jnp.arange(12), (4, 2))
    for _ in range(40):
        state, metrics = rule.step(state, tokens)
    assert float(metrics["smallest"]) < 1.0 and float(metrics["largest"]) < 1.0


def test_gates_reach_the_layers_beside_other_inputs():
    model = biased(ViT(VIT, key=KEY))
    gates = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    want = run(remove(model, [1, 2]), IMAGES)
    new = gated(model, gates)
    close(new(IMAGES), want)
    close(new.output(new.run(IMAGES, branches=True)[0]), want)
    assert isinstance(new, ViT) and type(gated(model, gates)) is type(new)
    assert type(model) is ViT and not hasattr(model, "gates")


FIRST = {"maps[0]": (1, 2)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "leave nothing to choose"),
        ({"widths": {}, "depths": ()}, "leave nothing to choose"),
        ({"widths": [("maps[0]", (1,)), ("maps[0]", (2,))]}, "names 'maps\\[0\\]' twice"),
        ({"widths": {"maps[0]": (0, 2)}}, "each at least 1"),
        ({"widths": {"maps[0]": ()}}, "one or more widths"),
        ({"depths": (0, 1)}, "depths=0 must be at least 1"),
        ({"widths": FIRST, "drawn": 8}, "drawn=8 with sandwich=True: 0 to 7"),
        ({"widths": FIRST, "drawn": -1}, "drawn=-1"),
        ({"widths": FIRST, "drawn": 0, "sandwich": False}, "1 to 7 are accepted"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(ConfigError, match=said):
        elastic(labelled, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"widths": {"maps[1]": (1,)}}, "is no group of this model; it has maps"),
        ({"widths": {"maps[0]": (2, 6)}}, "the group has 5 units"),
        ({"depths": (1,)}, "is accepted"),
    ],
)
def test_what_a_model_does_not_have(options, said):
    model = MLP((4, 5, 2), key=KEY)
    with counted() as count, pytest.raises(ConfigError, match=said):
        elastic(labelled, **options)(model, (ROWS, CLASSES), moment())
    assert count.programs <= 2  # of the key
    with pytest.raises(ConfigError, match=said):
        cut(
            model,
            Net(
                {n: max(w) for n, w in options.get("widths", {}).items()},
                *options.get("depths", ()),
            ),
        )


def test_blocks_that_cannot_be_switched_off():
    with pytest.raises(ConfigError, match="the model has 3 blocks"):
        elastic(labelled, depths=(4,))(ViT(VIT, key=KEY), (IMAGES, CLASSES[:2]), moment())
    with pytest.raises(ConfigError, match="depth=0 must be at least 1"):
        cut(ViT(VIT, key=KEY), Net({}, 0))
    with pytest.raises(ConfigError, match="the model has 3 layers of 2 sublayers"):
        gated(ViT(VIT, key=KEY), np.ones((2, 2), np.float32))
    model = ViT(VIT, key=KEY)
    block = model.layers[1]
    model.layers[1] = Block(
        block.attn_norm, block.attn, block.ffn_norm, block.ffn, joins=(Join(), Join(residual=False))
    )
    with pytest.raises(ConfigError, match="sublayer 1 of layer 1 has no residual"):
        gated(model, np.ones((3, 2), np.float32))
    assert not any(isinstance(node, BatchNorm) for _, node in walk(model))
