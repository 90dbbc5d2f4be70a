"""The search network: parity with the authors', and what it is where one candidate is all."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP, BatchNorm
from ffnlab.losses import labelled
from ffnlab.models import ConvNet, ResNet, ResNetConfig, ViT, ViTConfig
from ffnlab.models.cost import multiply_adds
from ffnlab.pruning.tas import core
from ffnlab.pruning.tas.core import Draw, Pairs
from ffnlab.pruning.tas.found import Shape, found_config, found_network, shape_of
from ffnlab.pruning.tas.network import (
    Architecture,
    as_draw,
    likely,
    most_likely,
    network,
    plain_of,
    with_candidates,
    with_moments,
)
from ffnlab.pruning.tas.sites import sites_of
from ffnlab.pruning.tas.work import work_of
from ffnlab.testing import tiny
from tests.fixtures.tas import record
from tests.often import often

KEY = jax.random.key(0)
TOLERANCE = 1e-5  # of the largest output: the same sums in another order, float32
CONVOLUTIONS = {
    "basic": {"spatial": "conv_a", "expand": "conv_b", "shortcut": "downsample"},
    "bottleneck": {
        "reduce": "conv_1x1",
        "spatial.conv": "conv_3x3",
        "expand": "conv_1x4",
        "shortcut": "downsample",
    },
}


@pytest.fixture(scope="module")
def official(fixtures):
    with np.load(fixtures / "tas" / "official.npz") as file:
        return dict(file)


def close(found, want, tolerance=TOLERANCE):
    found, want = np.asarray(found), np.asarray(want)
    assert found.shape == want.shape
    assert np.abs(found - want).max() <= tolerance * np.abs(want).max()


# Parity: the authors' network with given draws.


def theirs(path, name):
    """What the authors call the convolution at a path."""
    if path == "stem.conv":
        return "layers.0"
    number, place = re.fullmatch(r"residuals\[(\d+)\]\.(.+)\.conv", path).groups()
    return f"layers.{int(number) + 1}.{CONVOLUTIONS[name][place]}"


def with_weight(layer, w):
    layer.w = layer.w.replace(dataclasses.replace(layer.weight, w=jnp.asarray(w)))


def filled(model, sites, name):
    """The model with the authors' parameters; norms have other numbers where a size has none."""
    new = with_candidates(model, sites)
    nodes = dict(tree.walk(new))
    for path, row in sites.writes.items():
        conv, own, (rows, out) = nodes[path], theirs(path, name), nodes[path].weight.shape
        taps = conv.size if isinstance(conv.size, int) else conv.size[0]
        kernel = record.weights(f"{own}.conv.weight", (out, rows // taps**2, taps, taps))
        with_weight(conv, kernel.transpose(2, 3, 1, 0).reshape(rows, out))
        norm = nodes[f"{path.removesuffix('.conv')}.norm"]
        for ours, attribute in (("scale", "weight"), ("bias", "bias")):
            values = [
                record.weights(f"{own}.BNs.{i}.{attribute}", (size,))
                for i, size in enumerate(sites.widths[row].choices)
            ]
            padded = [np.pad(v, (0, out - len(v)), constant_values=7.0) for v in values]
            variable = getattr(norm, ours)
            setattr(norm, ours, variable.replace(jnp.asarray(np.stack(padded))))
    with_weight(new.head, record.weights("classifier.weight", new.head.weight.shape[::-1]).T)
    new.head.b = new.head.b.replace(jnp.asarray(record.weights("classifier.bias", (10,))))
    return new


@pytest.mark.slow  # pairs and interpolations, each by itself, are compared in test_core.py
@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_logits_gradients_and_statistics_are_the_authors(name, official):
    want = {k.partition(".")[2]: v for k, v in official.items() if k.startswith(f"{name}.")}
    _, depth, tau = record.NETWORKS[name]
    given = record.drawn(depth - 1)
    config = ResNetConfig((2, 2, 2), (16, 32, 64), 10, block=name, shortcut="pooled")
    model = ResNet(config, key=KEY)
    sites = sites_of(model, tied=False)
    assert len(sites.widths) == depth - 1
    cost = work_of(model, sites, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    whole = filled(model, sites, name)

    @jax.jit
    def asked(alpha, beta, stem):
        z = core.noisy(alpha, sites.width_counts, tau, jnp.asarray(given["alpha_noise"]))
        q = jax.nn.softmax(
            core.noisy(beta, sites.depth_counts, tau, jnp.asarray(given["beta_noise"]))
        )
        draw = Draw(core.mixed_pairs(z, jnp.asarray(given["pair"])), q)
        learned = tree.copy(whole)
        with_weight(learned.stem.conv, stem)
        net, seen = network(learned, sites, draw, training=True)
        logits = net(jnp.asarray(given["images"]))
        loss, _ = labelled(lambda _: logits, (0, given["classes"]))
        return loss, (logits, seen)

    variables = jnp.asarray(given["alpha"]), jnp.asarray(given["beta"]), whole.stem.conv.weight.w
    gradients, (logits, seen) = jax.grad(asked, (0, 1, 2), has_aux=True)(*variables)
    close(logits, want["logits"])
    close(gradients[0], want["alpha"], 1e-4)
    close(gradients[1], want["beta"], 1e-4)
    close(gradients[2], want["stem"].transpose(2, 3, 1, 0).reshape(27, 16), 1e-4)
    norm = with_moments(whole, seen).stem.norm
    for i, size in enumerate(sites.widths[0].choices):
        if i in given["pair"][0]:
            close(norm.mean[...][i, :size], want[f"mean {i}"])
            close(norm.variance[...][i, :size], want[f"variance {i}"])
        else:
            assert not norm.mean[...][i].any() and (norm.variance[...][i] == 1).all()
    for of, bridges, figure in ((likely, False, "expected"), (most_likely, True, "exact")):
        p = of(sites, Architecture(*variables[:2]))
        assert float(as_they_count(cost, p, bridges)) == pytest.approx(
            float(want[figure]), rel=1e-5
        )


def as_they_count(cost, p, bridges):
    """Behind a stage they count the channels of its last block, also where that is left out."""
    each = (p.widths * cost.sites.channels.astype(np.float32)).sum(-1)
    last = jnp.stack([each[depth.ends[-1]] for depth in cost.sites.depths])
    kept = jnp.append(core.reached(p.depths).reshape(-1), 1.0)
    return core.products(
        cost.terms, jnp.concatenate([each, jnp.ones(1), last]), kept, bridges=bridges
    )


# One candidate with all the weight.

RESNET = ResNetConfig((2, 3), (4, 6), 3, channels=2, image=(4, 4))
BOTTLENECK = dataclasses.replace(RESNET, block="bottleneck", expansion=2, blocks=(2, 2))
IMAGES = (4, 4, 2)
VIT = ViTConfig(image=(4, 4), patch=2, channels=2, width=8, hidden=12, layers=3, heads=2, classes=3)
CASES = {
    "mlp": (lambda: MLP((5, 8, 8, 8, 3), key=KEY, activation="gelu"), (5,)),
    "mlp-unequal": (lambda: MLP((5, 8, 7, 3), key=KEY, bias=False), (5,)),
    "resnet": (lambda: ResNet(RESNET, key=KEY), IMAGES),
    "resnet-short": (
        lambda: ResNet(dataclasses.replace(RESNET, blocks=(2, 1)), key=KEY),
        IMAGES,
    ),
    "resnet-pooled": (
        lambda: ResNet(dataclasses.replace(RESNET, shortcut="pooled"), key=KEY),
        IMAGES,
    ),
    "bottleneck": (lambda: ResNet(BOTTLENECK, key=KEY), IMAGES),
    "convnet": (lambda: ConvNet((2, 6, 5), 3, key=KEY), IMAGES),
    "vit": (lambda: ViT(VIT, key=KEY), IMAGES),
    "decoder": (tiny, ()),
}


def inputs_of(shape, rows=2):
    if not shape:
        return jax.random.randint(KEY, (rows, 7), 0, 64)
    return jax.random.uniform(jax.random.key(1), (rows, *shape))


def any_norms(model):
    """The model with batch norms of random numbers."""
    new = tree.copy(model)
    for i, (_, norm) in enumerate(tree.walk(new)):
        if isinstance(norm, BatchNorm):
            for j, name in enumerate(("scale", "bias", "mean", "variance")):
                variable, key = getattr(norm, name), jax.random.fold_in(KEY, 10 * i + j)
                drawn = jax.random.uniform(key, variable.get_value().shape, minval=0.5)
                setattr(norm, name, variable.replace(drawn))
    return new


@functools.cache
def case(name):
    """(Model, sites, work, model with candidates, inputs)."""
    make, shape = CASES[name]
    model, x = make(), inputs_of(CASES[name][1])
    del shape
    sites = sites_of(model)
    return model, sites, work_of(model, sites, x[:1]), any_norms(with_candidates(model, sites)), x


def one_hot(sites, seed):
    """A random shape as one-hot rows."""
    random = np.random.default_rng(seed)
    rows = []
    for counts, (n, most) in zip(
        (sites.width_counts, sites.depth_counts), sites.shapes, strict=True
    ):
        chosen = [random.integers(count) for count in counts]
        rows.append(jnp.asarray(np.eye(most, dtype=np.float32)[chosen].reshape(n, most)))
    return Architecture(*rows)


@pytest.mark.parametrize("name", often(CASES, "mlp", "resnet-short"))
def test_one_candidate_is_the_network_of_its_size(name, tmp_path):
    """Whatever the other candidate of a pair is: it counts nothing, and is not aligned to."""
    _, sites, cost, whole, x = case(name)
    chosen = one_hot(sites, seed=len(name))
    run = jax.jit(lambda draw: network(whole, sites, draw, training=False)[0](x))
    drawn = run(as_draw(chosen))
    other = jnp.asarray(np.array(sites.width_counts) - 1)
    index = jnp.stack([other, chosen.widths.argmax(-1)], -1)
    weights = jnp.tile(jnp.array([0.0, 1.0]), (len(index), 1))
    close(run(Draw(Pairs(index, weights), chosen.depths)), drawn)
    shape = shape_of(sites, chosen)
    net = found_network(whole, sites, shape, KEY)
    close(jax.jit(lambda net, x: net(x))(net, x), drawn)
    counted = multiply_adds(lambda net, x: net(x), net, x[:1])
    assert float(cost.megamacs(*chosen, bridges=True)) == pytest.approx(counted / 1e6, rel=1e-6)
    assert counted < cost.whole
    if name != "resnet-short":
        return
    models.save(net, tmp_path, format="ffnlab")
    again = models.load(tmp_path)
    assert jax.tree.structure(again) == jax.tree.structure(net)


@pytest.mark.parametrize("name", often(CASES, "mlp"))
def test_all_channels_are_the_model_itself(name):
    """The largest candidates of all, and nothing else, in training form too."""
    model, sites, cost, _, x = case(name)
    counts = sites.width_counts, sites.depth_counts
    last = Architecture(
        *(
            jax.nn.one_hot(jnp.array(count, jnp.int32) - 1, shape[1])
            for count, shape in zip(counts, sites.shapes, strict=True)
        )
    )
    whole = with_candidates(model, sites)
    run = jax.jit(lambda: network(whole, sites, as_draw(last), training=False)[0](x))
    close(run(), jax.jit(lambda: model(x))())
    assert float(cost.megamacs(*last, bridges=True)) == pytest.approx(cost.whole / 1e6, rel=1e-6)
    assert jax.tree.structure(plain_of(whole)) == jax.tree.structure(model)


def test_gradients_of_the_expected_work_are_finite_differences():
    _, sites, cost, _, _ = case("mlp")
    random = np.random.default_rng(0)
    arch = Architecture(*(jnp.asarray(random.normal(size=s), jnp.float32) for s in sites.shapes))

    @jax.jit
    def log_work(arch):
        return jnp.log(cost.megamacs(*likely(sites, arch), bridges=False))

    gradient = jax.grad(log_work)(arch)
    for part, logits in enumerate(arch):
        for at in ((0, 0), (0, 1)):
            ends = [
                float(log_work(arch._replace(**{arch._fields[part]: logits.at[at].add(step)})))
                for step in (-0.05, 0.05)
            ]
            found = float(gradient[part][at])
            assert found == pytest.approx((ends[1] - ends[0]) / 0.1, rel=2e-3, abs=1e-5)
            assert found != 0


@pytest.mark.slow
def test_a_search_of_single_convolutions_gives_a_configuration():
    model = ResNet(dataclasses.replace(RESNET, shortcut="projected"), key=KEY)
    sites = sites_of(model, tied=False)
    example = jax.ShapeDtypeStruct((1, *IMAGES), jnp.float32)
    cost = work_of(model, sites, example)
    chosen = one_hot(sites, 5)
    shape = shape_of(sites, chosen)
    config = found_config(model, sites, shape)
    assert config.blocks == tuple(shape.blocks.values())
    net = found_network(with_candidates(model, sites), sites, shape, KEY)
    assert net.config == config
    counted = multiply_adds(lambda net, x: net(x), net, example)
    assert float(cost.megamacs(*chosen, bridges=True)) == pytest.approx(counted / 1e6, rel=1e-6)
    assert any(b.shortcut is not None and b.stride == 1 for b in net.residuals)


def test_what_cannot_be_searched():
    for model, options, told in (
        (lambda: MLP((4, 3), key=KEY), {}, "has nothing to choose"),
        (
            lambda: MLP((4, 3, 2), key=KEY, activation="sigmoid"),
            {},
            "'sigmoid' makes something",
        ),
        (lambda: MLP((4, 3, 2), key=KEY, activation="prelu"), {}, "parameters of its own"),
        (
            lambda: MLP((4, 3, 2), key=KEY),
            {"tied": False},
            "tied=False is of a ResNet; the model is a MLP",
        ),
        (lambda: MLP((4, 3, 2), key=KEY), {"ratios": (0.2,)}, "leave none of the 3 channels"),
        (
            lambda: ResNet(RESNET, key=KEY),
            {"tied": False},
            "shortcut without parameters that changes",
        ),
        (
            lambda: ResNet(dataclasses.replace(BOTTLENECK, op="depthwise"), key=KEY),
            {},
            "is a convolution in groups",
        ),
        (
            lambda: ResNet(dataclasses.replace(BOTTLENECK, op="max"), key=KEY),
            {"tied": False},
            "needs convolutions",
        ),
    ):
        with pytest.raises(ConfigError, match=told):
            sites_of(jax.eval_shape(model), **options)
    with pytest.raises(ConfigError, match="nothing to choose|only a Block"):
        sites_of(models.remove(tiny(), range(1, 2 * tiny().config.layers, 2)))


def test_shapes_print():
    assert str(Shape({"maps[0]": 3}, {"maps": 1})) == "maps[0] 3, maps 1"
