"""Networks inside a model: by masks as cut out, saved and loaded, counted by hand."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import formats, transform, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP
from ffnlab.losses import labelled
from ffnlab.models import Encoder, EncoderConfig, ViT, ViTConfig, remove, stack
from ffnlab.pruning.search import (
    SearchOptions,
    hypervolume,
    measured,
    measuring,
    search,
    supernet,
)
from ffnlab.quantization import nearest
from ffnlab.testing import counted, equal, tiny
from ffnlab.weights import Dense, Float8, Int8

KEY = jax.random.key(0)
TOLERANCE = 1e-6  # of the length of the output: the same sums in another order, float32
CONFIG = ViTConfig((4, 4), 4, 6, 8, 3, 1, channels=1, classes=3, pool="mean")
ALL = ("float", "int8", "float8")
IMAGES = jax.random.uniform(jax.random.key(1), (5, 4, 4, 1))
BATCH = (IMAGES, jnp.array([0, 1, 2, 1, 0]))


def stack_of_ffns(config=CONFIG):
    """A ViT of one patch without attention: residual FFNs on 16 features, no array zero."""
    model = remove(ViT(config, key=KEY), range(0, 2 * config.layers, 2))
    rng = np.random.default_rng(0)
    draw = lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)  # noqa: E731
    return jax.tree.map(draw, model)


@pytest.fixture(scope="module")
def case():
    model = stack_of_ffns()
    return model, supernet(model, (2, 5, 8), depths=(1, 2, 3), formats=ALL)


def close(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) <= TOLERANCE * np.linalg.norm(b)


def configs(net, count, seed=0):
    vectors = net.space.sample(np.random.default_rng(seed), count)
    return [net.space.decode(vector) for vector in net.space.canonical(vectors)]


def test_networks_of_bfloat16_are_rounded_to_every_format():
    """Codes times scales are float32 there, and the weights beside them are not."""
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), stack_of_ffns())
    net, x = supernet(model, (2, 8), formats=ALL), IMAGES.astype(jnp.bfloat16)
    config = {"depth": (3,), "width": (2, 8, 2), "format": ALL}
    found = jax.jit(lambda m, chosen: net.formed(m, chosen)(x))(model, net.numbers(config))
    want = jax.jit(lambda m: m(x))(net.cut(model, config))
    assert found.dtype == want.dtype
    found, want = (np.asarray(each, np.float64) for each in (found, want))
    assert np.linalg.norm(found - want) <= 2**-6 * np.linalg.norm(want)  # two bits of eight


def test_quantized_weights_are_refused_before_anything_is_measured():
    packed, _ = transform.apply(nearest(format="int8", group=None), tiny())
    rounded = tree.copy(tiny())
    up = rounded.layers[1].ffn.up
    rounded.layers[1].ffn.up = up.replace(Dense(up.weight.w, act="e4m3"))
    for model, path in (
        (packed, r"layers\[0\].ffn.gate.w is a Int8"),
        (rounded, r"1\].ffn.up.w is"),
    ):
        with pytest.raises(ConfigError, match=path):
            supernet(model, (8, 16))


def test_the_space(case):
    _, net = case
    assert [v.name for v in net.space.variables] == ["depth", "width", "format"]
    assert net.space.networks == 9 + 9**2 + 9**3
    assert net.depths == (1, 2, 3)
    assert net.widths == {f"layers[{i}].ffn": (2, 5, 8) for i in range(3)}


def test_a_network_by_masks_is_the_one_cut_out_saved_and_loaded(case, tmp_path):
    """Also in formats: a scale is of the rows that are left."""
    model, net = case
    run = jax.jit(lambda model, chosen, x: net.formed(model, chosen)(x))
    kinds = {"float": Dense, "int8": Int8, "float8": Float8}
    for i, config in enumerate(configs(net, 2)):
        small, depth = net.cut(model, config), config["depth"][0]
        want = small(IMAGES)
        close(run(model, net.numbers(config), IMAGES), want)
        blocks = zip(small.layers, config["width"], config["format"], strict=True)
        for number, (block, width, form) in enumerate(blocks):
            assert (block.ffn is not None) == (number < depth)
            if block.ffn is not None:
                assert block.ffn.up.weight.shape == (6, width)
                assert type(block.ffn.up.weight) is type(block.ffn.down.weight) is kinds[form]
        formats.save(small, tmp_path / str(i), format="ffnlab")
        back = formats.load(tmp_path / str(i))
        assert equal(back, small) and np.array_equal(back(IMAGES), want)


def test_the_largest_network_is_the_model(case):
    model, net = case
    whole = {"depth": (3,), "width": (8, 8, 8), "format": ("float",) * 3}
    assert np.array_equal(net.formed(model, net.numbers(whole))(IMAGES), model(IMAGES))
    assert equal(net.cut(model, whole), model)


def test_rounding_happens_after_the_cut(case):
    """The largest entry of a column of `down` is one of the rows that go."""
    model, net = case
    model = tree.copy(model)
    down = model.layers[0].ffn.down
    model.layers[0].ffn.down = down.replace(Dense(down.weight.dense().at[7].mul(100.0)))
    config = {"depth": (1,), "width": (5, 8, 8), "format": ("int8", "float", "float")}
    close(net.formed(model, net.numbers(config))(IMAGES), net.cut(model, config)(IMAGES))


def by_hand(config):
    """Products of one image and bytes of the network, from its sizes alone."""
    depth = config["depth"][0]
    active = list(zip(config["width"], config["format"], strict=True))[:depth]
    macs = 16 * 6 + sum(2 * 6 * width for width, _ in active) + 6 * 3
    floats = 16 * 6 + 6 + 6 + 2 * 6 + 6 * 3 + 3  # patches, position, last norm, head
    stored = 4 * floats
    for width, form in active:
        stored += 4 * (2 * 6 + width + 6)  # norm, biases
        matrices = 2 * 6 * width
        stored += 4 * matrices if form == "float" else matrices + 4 * (width + 6)  # scales
    return macs, stored


def test_what_is_measured(case):
    model, net = case
    measure = measuring(net, model, BATCH, turns=None)
    first, *rest = configs(net, 6, seed=1)
    measure(first)
    for config in rest:
        found = measure(config)
        assert set(found) == {"loss", "accuracy", "macs", "bytes"}
        assert (found["macs"], found["bytes"]) == by_hand(config)
        small = net.cut(model, config)
        assert found["bytes"] == tree.nbytes(small)
        want, metrics = labelled(small, BATCH)
        assert found["loss"] == pytest.approx(float(want), rel=1e-5)
        assert found["accuracy"] == pytest.approx(float(metrics["accuracy"]))
    with counted() as count:
        measure(first)
        for config in configs(net, 5, seed=2):
            measure(config)
    assert count.programs == 0


def test_a_search_finds_a_front_with_latency(case):
    """Every row of the log is what its network costs; NaN of an unlucky one is dropped."""
    model, net = case
    plain = measuring(net, model, BATCH, turns=1)
    asked = []

    def measure(config):
        asked.append(config)
        return plain(config) | ({"loss": float("nan")} if len(asked) == 2 else {})

    options = SearchOptions(("loss", "bytes", "latency"), budget=6, tactic="random", population=3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        log = search(net.space, measure, options)
    assert len(said) == 1 and "not finite" in str(said[0].message)
    vectors, values = measured(log)
    assert len(vectors) == 5 and (values[:, 2] > 0).all()
    for vector, row in zip(vectors, values, strict=True):
        assert row[1] == by_hand(net.space.decode(vector))[1]
    assert hypervolume(values, (9.0, 9e9, 9e9)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("make", ["decoder", "stacked", "encoder"])
def test_other_models_of_blocks(make):
    if make == "encoder":
        config = EncoderConfig(32, 8, 10, 2, 2, 4, max_positions=8, head="masked", gated=True)
        model, sizes, blocks = Encoder(config, key=KEY), (3, 10), 2
    else:
        model, sizes, blocks = tiny(), (5, 32), 3
        model = stack(model) if make == "stacked" else model
    net = supernet(model, sizes, depths=(1, blocks), formats=ALL)
    tokens = jnp.array([[1, 2, 3], [3, 2, 1]])
    run = jax.jit(lambda model, chosen, x: net.formed(model, chosen)(x))
    for config in configs(net, 3):
        close(run(model, net.numbers(config), tokens), net.cut(model, config)(tokens))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"widths": (0, 4)}, "widths=\\[0, 4\\]: one or more from 1 to 8"),
        ({"widths": (4, 9)}, "from 1 to 8"),
        ({"widths": ()}, "widths=\\[\\]"),
        ({"widths": (4, 4)}, "must all be different"),
        ({"depths": (0, 1)}, "depths=\\[0, 1\\]: one or more from 1 to 3"),
        ({"depths": (4,)}, "from 1 to 3"),
        ({"formats": ("int4",)}, "formats=\\['int4'\\]: some of"),
        ({"formats": ()}, "formats=\\[\\]"),
    ],
)
def test_bad_choices(case, options, said):
    with pytest.raises(ConfigError, match=said):
        supernet(case[0], **{"widths": (4, 8)} | options)


def test_bad_models_and_configurations(case):
    model, net = case
    with pytest.raises(ConfigError, match="is accepted"):
        supernet(MLP((2, 3, 2), key=KEY), (2,))
    with pytest.raises(ConfigError, match="block 1 has no FFN"):
        supernet(remove(model, [3]), (4, 8))
    config = {"depth": (3,), "width": (8, 8, 3), "format": ("float",) * 3}
    for ask in (net.net, net.numbers, lambda config: net.cut(model, config)):
        with pytest.raises(ConfigError, match="3 is none of"):
            ask(config)
