"""Group norms: importances, penalty and order beside torch-pruning's, budgets, the transform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab import models, pruning, transform, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP, RMSNorm
from ffnlab.models import ConvNet, ResNet, ResNetConfig, groups, narrow
from ffnlab.pruning.group_importance import gains, group_penalty, importance
from ffnlab.pruning.group_norm import (
    Squares,
    group_norm,
    kept_of,
    largest,
    products,
    removal_steps,
)
from ffnlab.quantization import nearest
from ffnlab.recipes import parse_recipe
from ffnlab.testing import equal, tiny
from tests.fixtures.meta_pruning import record_library as record
from tests.hashed import parameter

KEY = jax.random.key(0)
TOLERANCE = 1e-6  # float32, relative to the largest: sums in another order
CONFIG = ResNetConfig(
    (1, 1), record.WIDTHS, 4, block="bottleneck", expansion=record.EXPANSION, stem_width=record.STEM
)
MAKERS = {
    "mlp": lambda: MLP(record.SIZES, key=KEY),
    "resnet": lambda: ResNet(CONFIG, key=KEY),
}
PARTS = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}


def torch_name(path):
    """What torch calls a variable: "residuals[0].spatial.conv.norm.scale" is in a Spatial."""
    path = path.replace("[", ".").replace("]", "").replace("spatial.conv.", "spatial.")
    owner, _, name = path.rpartition(".")
    return f"{owner}.{ {'w': 'weight', 'b': 'bias'}.get(name) or PARTS[name] }"


def to_torch(value):
    """A variable's array as torch stores it."""
    array = value.dense() if hasattr(value, "dense") else value
    return np.asarray(array)


def ours(array, shape):
    """A torch array as ours is stored: kernels [out, in, h, w] become [h w in, out]."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0).reshape(shape)
    return array.T if array.ndim == 2 else array


def torch_shape(path, shape):
    """Of the array that torch has at a path, of ours."""
    if len(shape) == 1 or not path.endswith("conv.w"):
        return shape[::-1]
    size = 3 if path in ("stem.conv.w",) or "spatial" in path else 1
    return (shape[1], shape[0] // size**2, size, size)


@functools.cache
def hashed_model(name):
    """The network of the fixture, its parameters by torch's names."""
    model, new = MAKERS[name](), {}
    for path, node in tree.walk(model):
        if not isinstance(node, nnx.Variable):
            continue
        value = node.get_value()
        shape = tuple(value.shape)
        drawn = parameter(torch_name(path), torch_shape(path, shape))
        array = jnp.asarray(ours(drawn, shape))
        new[path] = node.replace(type(value)(array) if hasattr(value, "dense") else array)
    return tree.replace(model, new)


@functools.cache
def recorded():
    from tests.conftest import FIXTURES

    with np.load(FIXTURES / "meta_pruning" / "library.npz", allow_pickle=False) as file:
        return dict(file)


def our_group(name):
    """The name of our group whose channels a layer of torch's makes."""
    first = name.replace(".conv", "").replace("shortcut", "expand").split(".")
    return f"{first[0]}[{first[1]}]" + "".join(f".{p}" for p in first[2:]) if first[1:] else name


@pytest.mark.parametrize("name", record.NETWORKS)
def test_importances_are_the_library_s(name):
    found, prefix = jax.jit(importance)(hashed_model(name)), f"{name}/importance/"
    known = {k.removeprefix(prefix): v for k, v in recorded().items() if k.startswith(prefix)}
    named = {our_group(k).replace("stem.conv", "stem"): v for k, v in known.items()}
    assert named.keys() == found.keys()
    for group, values in named.items():
        np.testing.assert_allclose(found[group], values, atol=TOLERANCE)


@pytest.mark.parametrize("name", record.NETWORKS)
def test_the_penalty_has_the_gradient_that_the_library_adds(name):
    model = hashed_model(name)
    gradient = jax.grad(lambda m: record.REG * group_penalty(m, alpha=float(record.ALPHA)))
    seen = 0
    for path, node in tree.walk(jax.jit(gradient)(model)):
        key = f"{name}/gradient/{torch_name(path)}" if isinstance(node, nnx.Variable) else ""
        if key in recorded():
            seen += 1
            wanted = recorded()[key]
            got = to_torch(node.get_value())
            wanted = ours(wanted, got.shape)
            np.testing.assert_allclose(got, wanted, atol=TOLERANCE * max(1, abs(wanted).max()))
    assert seen == sum(key.startswith(f"{name}/gradient/") for key in recorded())


def test_units_go_in_the_order_of_the_library():
    """It goes by threshold and stops where a layer would lose its last; before that, one order."""
    order = removal_steps(hashed_model("mlp"))
    place = [order["maps[0]"], order["maps[1]"]]
    left = [recorded()[f"mlp/left/{i}"] for i in (0, 1)]
    left[1] = left[1][:, :10]
    for step in range(len(left[0])):
        gone = sum(int((~side[step]).sum()) for side in left)
        for at, side in zip(place, left, strict=True):
            np.testing.assert_array_equal((at < 0) | (at >= gone), side[step])


def drawn(model, seed=0):
    """The same model with normal numbers everywhere, variances positive."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) + 0.1, x.dtype), model)


BASIC = drawn(ResNet(ResNetConfig((1, 1), (3, 5), 3, image=(4, 4)), key=KEY))
NETS = {
    "mlp": drawn(MLP((4, 6, 5, 3), key=KEY)),
    "convnet": drawn(ConvNet((2, 4, 3), 3, key=KEY)),
    "resnet": BASIC,
    "decoder": tiny(),
}


@pytest.mark.parametrize("name", NETS)
@settings(max_examples=3, deadline=None)
@given(st.integers(0, 2**31))
def test_what_is_gone_is_left_out_of_every_sum(name, seed):
    """Importance among what is left is that of the narrowed model, up to the norms that narrow."""
    model, rng = NETS[name], np.random.default_rng(seed)
    names = {group.name for group in groups(model)} - {"embed"}  # whose RMS norms are adapted
    sums, keep = Squares(model, names), {}
    for group, (each, _) in sums.groups.items():
        keep[group] = rng.random(each.size) < 0.6
        keep[group][rng.integers(each.size)] = True
        for unit in np.flatnonzero(~keep[group]):
            sums.take_out(group, int(unit))
    after = Squares(narrow(model, keep), names)
    for group, stays in keep.items():
        found = sums.importance(group, stays)[stays]
        np.testing.assert_allclose(found, after.importance(group, stays[stays]), rtol=1e-6)


def test_of_an_mlp_by_hand():
    model = NETS["mlp"]
    w1, w2, w3 = (np.asarray(m.weight.dense(), np.float64) for m in model.maps)
    sizes = [(w1**2).sum(0) + (w2**2).sum(1), (w2**2).sum(0) + (w3**2).sum(1)]
    rates = []
    for size in sizes:
        root = np.sqrt(size / size.max())
        rates.append(4.0 ** ((root.max() - root) / (root.max() - root.min())))
    of_four = jax.jit(jax.value_and_grad(lambda m: group_penalty(m, alpha=4.0)))
    value, gradient = of_four(model)
    want = sum(0.5 * (rate * size).sum() for rate, size in zip(rates, sizes, strict=True))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    middle = np.asarray(gradient.maps[1].weight.dense())
    np.testing.assert_allclose(middle, (rates[0][:, None] + rates[1]) * w2, rtol=1e-4)
    assert all(not m.b[...].any() for m in gradient.maps)


def test_alike_units_and_dead_groups_have_finite_penalties():
    assert gains(jnp.full(4, 3.0), 16.0).tolist() == [1] * 4
    dead = jax.tree.map(jnp.zeros_like, NETS["mlp"])
    value, gradient = jax.jit(jax.value_and_grad(group_penalty))(dead)
    assert value == 0 and not any(leaf.any() for leaf in jax.tree.leaves(gradient))
    assert all(not values.any() for values in jax.jit(importance)(dead).values())
    order = removal_steps(dead)
    assert sorted(np.concatenate(list(order.values())).tolist()) == [-1, -1, *range(9)]
    with pytest.raises(ConfigError, match="alpha=0.5 must be at least 1"):
        group_penalty(dead, alpha=0.5)


def test_norms_count_their_scale_and_nothing_else():
    """Of a Gemma with the 1 that it adds; biases and statistics do not."""

    def at(**new):
        norm = tree.copy(BASIC.residuals[0].spatial.norm)
        for name, value in new.items():
            setattr(norm, name, getattr(norm, name).replace(jnp.asarray(value)))
        return {"residuals[0].spatial.norm": norm}

    found = jax.jit(importance)
    same = found(tree.replace(BASIC, at(bias=[9.0] * 3, mean=[9.0] * 3, variance=[9.0] * 3)))
    other = found(tree.replace(BASIC, at(scale=[9.0, 0.0, 0.0])))
    known, name = found(BASIC), "residuals[0].spatial"
    assert all(equal(same[group], known[group]) for group in known)
    changed = {group for group in known if not equal(known[group], other[group])}
    assert changed == {name} and float(other[name][0]) == 1
    gemma = models.Decoder(models.DecoderConfig(8, 6, 4, 1, 1, 1, 4, norm_offset=1.0), key=KEY)
    plain = tree.map_at(gemma, tree.of_type(RMSNorm), shifted)
    np.testing.assert_allclose(found(gemma)["embed"], found(plain)["embed"], rtol=1e-6)


def shifted(norm):
    """The same norm with its offset in the scale."""
    new = tree.copy(norm)
    new.scale, new.offset = norm.scale.replace(norm.scale[...] + norm.offset), 0.0
    return new


@pytest.mark.parametrize(
    ("name", "speed_up"),
    [("mlp", 1.0), ("mlp", 1.5), ("mlp", 3.0), ("convnet", 2.0), ("resnet", 3.0)],
)
def test_a_budget_is_met_by_the_first_unit_that_meets_it(name, speed_up):
    model = NETS[name]
    keep = kept_of(model, speed_up=speed_up)
    whole, left = products(model), products(narrow(model, keep))
    assert left * speed_up <= whole
    order = removal_steps(model)
    gone = sum(int((~stays).sum()) for stays in keep.values())
    if speed_up == 1:
        assert gone == 0
        return
    one_less = {group: (at < 0) | (at >= gone - 1) for group, at in order.items()}
    assert products(narrow(model, one_less)) * speed_up > whole
    assert all(stays.any() for stays in keep.values())


def test_the_most_important_unit_of_every_group_stays_last():
    for model in NETS.values():
        order, sizes = removal_steps(model), {g.name: g.size for g in groups(model)}
        assert {name: len(at) for name, at in order.items()} == sizes
        assert all((at < 0).sum() == 1 for at in order.values())
        gone = np.sort(np.concatenate([at[at >= 0] for at in order.values()]))
        np.testing.assert_array_equal(gone, np.arange(len(gone)))
    few = removal_steps(NETS["mlp"], steps=1)
    ranked = jax.jit(importance)(NETS["mlp"])
    for name, at in few.items():  # at once: in the order of the importances of the whole
        assert at[int(ranked[name].argmax())] == -1
        others = at >= 0
        by_place = np.asarray(ranked[name])[others][np.argsort(at[others])]
        assert (np.diff(by_place) >= 0).all()


def test_a_rate_takes_as_large_a_share_of_each_selected_group():
    step = group_norm(rate=0.4, select="layers[*].ffn")
    new, kept = transform.apply(step, tiny())
    assert {name: int(stays.sum()) for name, stays in kept.items()} == {
        f"layers[{i}].ffn": 32 - 12 for i in range(3)
    }
    assert new.config.hidden == 20
    ranked = jax.jit(importance)(tiny())
    for name, stays in kept.items():
        values = np.asarray(ranked[name])
        assert values[stays].min() >= values[~stays].max()
    one = kept_of(NETS["mlp"], rate=0.99)
    assert [int(stays.sum()) for stays in one.values()] == [1, 1]


def test_a_rate_is_rounded_down_and_not_the_float_of_it():
    """100 * 0.29 is 28.999999999999996, and 29 units are its share."""
    values = np.arange(100.0)
    assert [int((~largest(values, rate)).sum()) for rate in (0.29, 0.57, 0.299)] == [29, 57, 29]


def test_packed_weights_that_cannot_be_cut_there_are_named():
    packed, _ = transform.apply(nearest(format="int8", group=8), tiny())
    with pytest.raises(ConfigError, match=r"layers\[0\].ffn.down.w: 16 of 32 rows: Int8: a group"):
        transform.apply(group_norm(rate=0.5, select="layers[0].ffn"), packed)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "rate=None and speed_up=None: give exactly one"),
        ({"rate": 0.5, "speed_up": 2.0}, "give exactly one"),
        ({"rate": 1.0}, r"rate=1.0 is outside \[0, 1\)"),
        ({"rate": -0.1}, r"rate=-0.1 is outside"),
        ({"speed_up": 0.9}, "speed_up=0.9 must be at least 1"),
        ({"speed_up": float("nan")}, "speed_up=nan must be at least 1"),
        ({"rate": 0.5, "steps": 0}, "steps=0 must be at least 1"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(ConfigError, match=said):
        group_norm(**options)


def test_budgets_and_groups_that_there_are_not():
    net = NETS["mlp"]
    with pytest.raises(ConfigError) as caught:
        transform.apply(group_norm(speed_up=50.0), net)
    # One unit of each hidden layer: 4 x 1 + 1 x 1 + 1 x 3 of 4 x 6 + 6 x 5 + 5 x 3.
    assert "speed_up=50.0 of 69 multiplications is not reached" in str(caught.value)
    assert "does 8, 8.62 times less" in str(caught.value)
    with pytest.raises(ConfigError, match=r"select='layers\[\*\]' fits no group.*maps\[0\], maps"):
        transform.apply(group_norm(rate=0.5, select="layers[*]"), net)
    with pytest.raises(ConfigError, match="it has no groups"):
        removal_steps(MLP((3, 2), key=KEY))
    with pytest.raises(ConfigError, match="a Linear is of no kind"):
        products(net.maps[0])


def test_a_recipe_names_it():
    (stage,) = parse_recipe(
        '[[stage]]\ntransform = "group_norm"\nrate = 0.25\nselect = "layers[*].ffn"'
    ).stages
    new, _ = transform.apply(stage.build(), tiny())
    assert new.config.hidden == 24 and pruning.group_norm is group_norm
    with pytest.raises(ConfigError, match="stage 1 .group_norm.: rate=2.0 is outside"):
        parse_recipe('[[stage]]\ntransform = "group_norm"\nrate = 2')
