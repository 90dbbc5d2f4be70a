"""The layer-wise search: its rules by brute force, and that it never says safe."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab.analysis import Grid, layerwise_search, verify
from ffnlab.analysis.layerwise import (
    Region,
    common_step,
    most_apart,
    multiples,
    next_region,
    pulled_back,
)
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP


def drawn(seed, d=7, e=9, units=3, spans=None):
    """A layer's values, the map that reads it, and a region of it."""
    random = np.random.default_rng(seed)
    dims = tuple(int(i) for i in random.choice(d, units, replace=False))
    spans = tuple(random.uniform(0.01, 0.2, units)) if spans is None else spans
    region = Region(dims, spans, tuple(int(n) for n in random.integers(1, 4, units)))
    return region, random.standard_normal(d), random.standard_normal((d, e)), random.normal(size=e)


@given(st.integers(0, 2**31), st.integers(1, 4))
def test_images_of_all_points_lie_in_the_next_region(seed, units):
    region, values, weight, bias = drawn(seed, units=units)
    found = next_region(region, values, weight, bias)
    assert len(found.dims) == units == len(set(found.dims))
    after = values @ weight + bias
    steps = [range(-n, n + 1) for n in region.counts]
    for move in itertools.product(*steps):
        point = values.copy()
        point[list(region.dims)] += np.array(region.spans) * move
        image = (point @ weight + bias)[list(found.dims)]
        apart = np.abs(image - after[list(found.dims)])
        assert (apart <= found.reach + 1e-9).all()


@given(st.integers(0, 2**31))
def test_the_step_of_one_unit_is_its_span_times_the_weight(seed):
    """Where the rest of the layer is 0, so that nothing else sets the step."""
    region, values, weight, _ = drawn(seed, units=1)
    values[np.arange(7) != region.dims[0]] = 0
    found = next_region(region, values, weight, np.zeros(9))
    expected = region.spans[0] * abs(weight[region.dims[0], found.dims[0]])
    assert found.spans[0] == pytest.approx(expected, rel=1e-12)
    assert found.counts[0] == region.counts[0] ** 2


def test_a_step_is_halved_until_all_are_multiples():
    assert common_step(np.array([1.0, 2.0, 5.05])) == 1.0
    assert common_step(np.array([1.0, 2.5])) == 0.5
    assert common_step(np.array([1.0, 1.25, 3.0])) == 0.25
    assert common_step(np.array([1.0, 1.11])) == 0.125  # 0.015 from nine of it


def test_multiples_of_a_span():
    assert multiples(0.5, 1.3, 9).tolist() == [-1, -0.5, 0, 0.5, 1]
    assert multiples(0.1, 10.0, 5).tolist() == pytest.approx([-10, -5, 0, 5, 10])
    assert multiples(2.0, 1.0, 5).tolist() == [0]


def test_units_most_apart_come_first():
    values = np.array([0.0, 5.0, 1.0, -3.0])
    assert most_apart(values, 2) == [1, 3]
    assert most_apart(values, 2, taken=[1]) == [3, 0]


@given(st.integers(0, 2**31))
def test_what_is_pulled_back_gives_what_was_wanted(seed):
    region, values, weight, bias = drawn(seed)
    dims = (0, 4, 5)
    wanted = np.random.default_rng(seed).standard_normal((6, 3))
    points, does = pulled_back(region, values, weight, bias, dims, wanted)
    assert does.all()
    assert (points @ weight + bias)[:, dims] == pytest.approx(wanted, abs=1e-6)
    still = np.delete(np.arange(7), region.dims)
    assert np.array_equal(points[:, still], np.repeat(values[None, still], 6, 0))


def test_what_cannot_be_given_is_said():
    region, values, weight, bias = drawn(0)
    weight[list(region.dims)] = 0.0
    wanted = np.stack([(values @ weight + bias)[[0, 4, 5]], np.full(3, 9.0)])
    _, does = pulled_back(region, values, weight, bias, (0, 4, 5), wanted)
    assert does.tolist() == [True, False]


NETS = [MLP((6, 8, 8, 3), key=jax.random.key(seed)) for seed in range(4)]


@pytest.mark.parametrize("net", NETS)
def test_a_witness_has_another_class_and_nothing_is_called_safe(net):
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(8):
        x = random.random(6)
        found = layerwise_search(net, x, units=2, span=0.1, count=2, groups=3, most_points=2000)
        seen.add(found.status)
        assert found.status in ("unsafe", "unknown") and found.points > 0
        if found.status == "unsafe":
            w = [(np.asarray(m.weight.dense()), np.asarray(m.bias)) for m in net.maps]
            h = found.witness
            for weight, bias in w[:-1]:
                h = np.maximum(h @ weight + bias, 0)
            logits = h @ w[-1][0] + w[-1][1]
            assert logits[found.other] >= logits[found.label] - 1e-6
            assert np.abs(found.witness - x).max() <= 0.2 + 0.01 + 1e-12
            assert found.witness.min() >= 0 and found.witness.max() <= 1
    assert seen


def test_the_input_alone_is_the_grid_of_its_group():
    random = np.random.default_rng(1)
    told = []
    for _ in range(30):
        x = random.random(6)
        dims = most_apart(x, 2)
        mine = layerwise_search(NETS[0], x, units=2, span=0.3, count=2, layers=0)
        grid = verify(NETS[0], Grid(x, dims, 0.3, 2))
        assert (mine.status == "unsafe") == (grid.status == "unsafe")
        told.append(mine.status)
    assert len(set(told)) == 2


def test_deeper_layers_ask_more_points_and_never_find_less():
    random = np.random.default_rng(2)
    found = []
    for _ in range(40):
        x = random.random(6)
        options = {"units": 2, "span": 0.4, "count": 1, "groups": 3, "most_points": 2000}
        flat = layerwise_search(NETS[0], x, layers=0, **options)
        deep = layerwise_search(NETS[0], x, **options)
        assert flat.status == "unknown" or deep.status == "unsafe"
        assert deep.points >= flat.points
        if flat.status == "unknown":  # points of later layers come back within the input's region
            assert deep.points > flat.points
            found.append(deep.status)
    assert set(found) == {"unknown", "unsafe"}  # some between the points of the grid


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"units": 0}, "units=0"),
        ({"span": 0.0}, "step=0.0 must be positive"),
        ({"count": 0}, "count=0"),
        ({"layers": 3}, r"layers=3 must lie in 0..2"),
        ({"high": 0.1}, "outside of low=0.0, high=0.1"),
    ],
)
def test_bad_input_is_named(options, said):
    with pytest.raises(ConfigError, match=said):
        layerwise_search(NETS[0], np.full(6, 0.5), **options)


def test_other_networks_are_refused():
    with pytest.raises(ConfigError, match="activation='tanh'; an MLP with 'relu' is accepted"):
        layerwise_search(MLP((6, 3), activation="tanh", key=jax.random.key(0)), np.full(6, 0.5))
