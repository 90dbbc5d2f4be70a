"""The studies of information: how their claims are decided, and what is measured on the way."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.analysis import Cells, gradient_drift, mutual_information
from ffnlab.analysis.information_plane import layers_of
from ffnlab.data import ring
from ffnlab.learning import labelled
from ffnlab.studies import information_measure as measures

plane = importlib.import_module("ffnlab.studies.information_plane")
adaptive = importlib.import_module("ffnlab.studies.adaptive_mi")

EPOCHS = np.array([0, 5, 20, 30, 177, 400, 800, 2000, 4000.0])
FALL = np.array([8, 9, 10, 10.5, 9, 6, 4, 3, 2.0])
LEVEL = np.array([12, 11.9, 11.5, 11, 10, 6.0])


def told(fall=FALL, test=0.98, known=0.95, seeds=2, layers=6):
    """A course whose layers all lose bits in one way, each from a level of its own."""
    x = np.stack([np.tile(fall[:, None], (1, seeds))] * layers, -1)
    y = np.full_like(x, known)
    accuracy = np.full(x.shape[:2], test)
    ratio = np.tile(np.array([1, 5, 4, 2, 0.8, 0.5, 0.3, 0.2, 0.1])[:, None, None], (1, seeds, 6))
    return measures.Course(EPOCHS, x, y, accuracy, accuracy, ratio, ())


def changed(course, **fields):
    """The same with other figures of the second seed."""
    new = {}
    for name, value in fields.items():
        new[name] = getattr(course, name).copy()
        new[name][:, 1] = value if np.ndim(value) < 1 else np.asarray(value)[:, None]
    return course._replace(**new)


def test_phases_are_decided_by_every_seed():
    assert [c.holds for c in plane.phase_claims(told(), 2)] == [True, True]
    for fields in ({"x": FALL / 3}, {"y": 0.85}):
        assert [c.holds for c in plane.phase_claims(changed(told(), **fields), 2)][0] is False
    low = told()._replace(test=np.where(np.arange(2) == 1, 0.94, told().test))
    assert not plane.phase_claims(low, 2)[0].holds
    late = changed(told(), x=np.array([1, 2, 3, 4, 5, 6, 7, 12, 2.0]))
    assert [c.holds for c in plane.phase_claims(late, 2)] == [True, False]


def test_the_control_is_decided_by_what_is_lost_late():
    still = told(np.array([2, 4, 6, 7, 8, 8, 8, 7.5, 7.0]))
    found = {plane.TANH: told(), plane.RELU: still}
    assert plane.control_claim(found, 2).holds
    loses = changed(still, x=np.array([2, 4, 6, 7, 8, 8, 8, 7.5, 6.4]))
    assert not plane.control_claim(found | {plane.RELU: loses}, 2).holds
    bad = still._replace(test=still.test * 0 + 0.8)
    assert not plane.control_claim(found | {plane.RELU: bad}, 2).holds


def test_the_inequality_is_asked_of_every_layer_and_epoch():
    falling = told()._replace(x=told().x * 0 + LEVEL)
    assert plane.inequality_claim(falling, 2).holds
    for place in ((0, 1, 3), (8, 0, 5)):
        x = falling.x.copy()
        x[place] = x[(*place[:2], place[2] - 1)] + 0.2
        assert not plane.inequality_claim(falling._replace(x=x), 2).holds


def test_drift_and_its_switch_are_decided_by_every_seed():
    assert [c.holds for c in plane.drift_claims(told(), 2)] == [True, False]
    near = told(np.array([8, 9, 10, 10.5, 11, 6, 4, 3, 2.0]))
    assert [c.holds for c in plane.drift_claims(near, 2)] == [True, True]
    ratio = near.ratio.copy()
    ratio[:, 1] = 0.9
    assert [c.holds for c in plane.drift_claims(near._replace(ratio=ratio), 2)] == [False, False]


def test_the_bound_is_asked_of_all_layers_and_of_the_fifth():
    curve = np.array([[0, 0], [1, 0.8], [12, 0.9]])
    y = np.interp(LEVEL, *curve.T) - 0.05
    good = measures.Bound(np.tile(LEVEL, (2, 1)), np.tile(y, (2, 1)), curve, 0.9)
    assert plane.bound_claim(good, 2).holds
    for layer, shift in ((0, 0.08), (4, -0.06)):
        other = good.y.copy()
        other[1, layer] += shift
        assert not plane.bound_claim(good._replace(y=other), 2).holds


def test_depth_is_decided_by_means():
    def course_that_learns(at):
        train = np.tile((EPOCHS >= at)[:, None].astype(float), (1, 2))
        return told()._replace(train=train)

    depths = {n: course_that_learns(e) for n, e in ((1, 2000), (2, 400), (3, 30))}
    assert plane.depth_claim(depths, 2).holds
    assert not plane.depth_claim(depths | {3: course_that_learns(800)}, 2).holds
    never = depths | {1: course_that_learns(1e9)}
    assert plane.depth_claim(never, 2).holds and "never" in plane.depth_claim(never, 2).ours


def test_penalties_and_signs_are_decided_by_means():
    found = {}
    for name in adaptive.BOTH:
        fall = FALL if name == "tanh" else FALL[::-1]
        x = np.tile(fall[:, None, None], (1, 4, 6))
        x[:, 2:] -= 2
        y = np.tile(np.linspace(0.4, 0.9, 9)[:, None, None], (1, 4, 6))
        test = np.tile(np.array([0.9, 0.92, 0.93, 0.95]), (9, 1))
        found[name] = measures.Course(EPOCHS, x, y, test, test, np.zeros(0), ())
    assert [c.holds for c in adaptive.penalty_claims(found, 2)] == [True, True]
    assert [c.holds for c in adaptive.phase_claims(found, 2)] == [True, True]
    for name in adaptive.BOTH:
        x = found[name].x.copy()
        x[:, 2:] += 1
        other = found | {name: found[name]._replace(x=x)}
        assert [c.holds for c in adaptive.penalty_claims(other, 2)] == [False, True]
        turned = found | {name: found[name]._replace(x=found[name].x[::-1])}
        assert [c.holds for c in adaptive.phase_claims(turned, 2)] == [
            name != "tanh",
            name != "relu",
        ]
    worse = found | {"relu": found["relu"]._replace(test=found["relu"].test[:, ::-1])}
    assert [c.holds for c in adaptive.penalty_claims(worse, 2)] == [True, False]


def test_a_correlation_is_within_nonlinearities():
    x = np.zeros((2, 8, 6))
    x[0, :, 5] = [3, 1, 4, 2, 0, 0, 0, 0]
    test = np.zeros((2, 8))
    test[1] = x[0, :, 5] / 100
    one = measures.Course(EPOCHS[:2], x, x, test, test, np.zeros(0), ())
    apart = one._replace(test=test + 0.5)
    claim = adaptive.last_claim({"tanh": one, "relu": apart}, 4)
    assert "6 +1.00" in claim.ours
    assert not adaptive.last_claim({"tanh": one._replace(test=1 - test)}, 4).holds


def test_scales_are_decided_by_both_ways():
    following, fixed = [[5.0, 6.0]] * 3, [[1.0, 2.0], [5.0, 6.0], [7.0, 8.0]]
    good = {"following": following, "of one width": fixed}
    assert adaptive.scale_claim({"tanh": good}, 2).holds
    assert not adaptive.scale_claim({"tanh": good | {"following": fixed}}, 2).holds
    assert not adaptive.scale_claim({"tanh": good | {"of one width": following}}, 2).holds


# What is measured.

CASE = measures.Case((12, 4, 3, 2), "tanh", 512, 3, penalties=(0.0, 0.1), drift=True)


@pytest.mark.slow
def test_members_are_measured_on_the_way():
    world = plane.world_of(ring(), 0)
    found = measures.course(CASE, world, Cells(8), (0, 1), points=3)
    assert found.epochs.tolist() == [0, 1, 2, 3]
    assert found.x.shape == found.y.shape == (4, 2, 3) and found.ratio.shape == (4, 2, 3)
    net = jax.tree.map(lambda leaf: leaf[1], found.nets)
    values = layers_of(net, jnp.asarray(world.x))
    codes = np.asarray(Cells(8).codes(values["maps[1]"]))
    states = np.unique(codes, axis=0, return_inverse=True)[1]
    want = mutual_information(states, world.y) / np.log(2)
    assert found.y[-1, 1, 1] == pytest.approx(want, abs=1e-4)
    right = np.asarray(values["maps[2]"]).argmax(-1) == world.y
    held = np.ones(4096, bool)
    held[world.trained] = False
    assert found.test[-1, 1] == pytest.approx(right[held].mean(), abs=1e-6)
    assert found.train[-1, 1] == pytest.approx(right[~held].mean(), abs=1e-6)
    x, y = (jnp.asarray(part[world.trained]) for part in (world.x, world.y))
    parts = [(x[i : i + 512], y[i : i + 512]) for i in range(0, 3072, 512)]
    drift = gradient_drift(labelled, select="maps[*].w")(net, parts)
    ratios = [drift.layers[f"maps[{i}]"].ratio for i in range(3)]
    np.testing.assert_allclose(found.ratio[-1, 1], ratios, rtol=1e-3)
    plain, penalized = (
        sum(float(jnp.sum(m.weight.dense()[i] ** 2)) for m in found.nets.maps) for i in (0, 1)
    )
    assert penalized < plain, "the same draw would be larger without a penalty"


def test_a_penalty_counts_all_maps_but_the_last(key):
    net = CASE.made(key)
    batch = jnp.ones((4, 12)), jnp.zeros(4, int)
    plain, held = (measures.penalized(jnp.float32(p))(net, batch)[0] for p in (0.0, 0.5))
    squares = sum(float(jnp.sum(m.weight.dense() ** 2)) for m in list(net.maps)[:2])
    assert float(held - plain) == pytest.approx(0.25 * squares, rel=1e-5)


def test_soft_labels_have_their_information_and_their_curve():
    world = ring(3.0)
    shares = np.stack([1 - world.p, world.p], -1)
    x, y = measures.soft_information(np.arange(4096)[:, None], shares)
    h = lambda p: -(p * np.log2(p) + (1 - p) * np.log2(1 - p))  # noqa: E731
    assert x == pytest.approx(12)
    assert y == pytest.approx(h(world.p.mean()) - h(world.p).mean(), abs=1e-9)
    x, y = measures.soft_information(np.zeros((4096, 1), int), shares)
    assert (x, y) == pytest.approx((0, 0), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("study", "claims"), [(plane, 4), (adaptive, 7)])
def test_the_quick_forms(tmp_path, study, claims):
    result = study.run(out=tmp_path, quick=True)
    assert len(result.claims) == claims and list(tmp_path.glob("*.png"))


def test_rectifiers_that_learn_begin_as_relu():
    case = adaptive.Flat((3, 4, 4, 2), "prelu", 8, 1)
    net = case.made(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    same = adaptive.Flat((3, 4, 4, 2), "relu", 8, 1).made(jax.random.key(0))
    assert np.array_equal(net(x), same(x))
    srelu = adaptive.Flat((3, 4, 4, 2), "srelu", 8, 1).made(jax.random.key(0))
    assert np.asarray(srelu(x)) == pytest.approx(np.asarray(same(x)), abs=1e-6)
