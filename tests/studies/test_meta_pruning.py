"""The study of meta pruning: what decides its claims, what it chooses, and what it cuts."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import tree
from ffnlab.data import Labelled
from ffnlab.layers import MLP
from ffnlab.models import ResNet, ResNetConfig, narrow
from ffnlab.pruning import kept_of
from ffnlab.pruning.group_norm import products
from ffnlab.studies import meta_pruning_measure as measure
from ffnlab.studies import meta_pruning_resnets as resnets
from ffnlab.studies.meta_pruning_measure import (
    CORRECTED,
    PLAIN,
    SIDES,
    SPEED_UPS,
    TRAINED,
    Begun,
    Meta,
    Point,
)
from ffnlab.studies.tuning import Splits

study = importlib.import_module("ffnlab.studies.meta_pruning")
KEY = jax.random.key(0)
NET = MLP((6, 8, 7, 3), key=KEY)
# name -> accuracy of a side at every speed-up
RAW = {PLAIN: (0.80, 0.4, 0.2, 0.1), TRAINED: (0.82, 0.5, 0.3, 0.1)}
RAW[CORRECTED] = (0.88, 0.6, 0.4, 0.2)
TUNED = {PLAIN: (0.97, 0.96, 0.94, 0.8), TRAINED: (0.97, 0.96, 0.95, 0.8)}
TUNED[CORRECTED] = (0.97, 0.97, 0.95, 0.9)


def found(raw=RAW, tuned=TUNED, **more):
    """Points of three nets, alike but for a little."""
    options = {"whole": {}, "at_once": {}} | more
    return [
        Point(
            side,
            net,
            speed_up,
            (3, 2),
            options["whole"].get(side, 0.97),
            options["at_once"].get(side, 0.7),
            raw[side][k] + (net - 1) * 0.001,
            tuned[side][k] + (net - 1) * 0.001,
            NET,
            {},
            (0.1, 0.1),
        )
        for side in SIDES
        for net in range(3)
        for k, speed_up in enumerate(SPEED_UPS)
    ]


def changed(values, side, k, value):
    return values | {side: tuple(value if i == k else v for i, v in enumerate(values[side]))}


def test_gains_are_of_the_mean_over_nets_and_of_either_side():
    held = lambda raw, side: study.gain_claim(study.figures(found(raw), "raw"), side)  # noqa: E731
    assert held(RAW, PLAIN).holds and held(RAW, TRAINED).holds
    assert held(RAW, PLAIN).seeds == 3 and "0.880 (0.879 to 0.881)" in held(RAW, PLAIN).ours
    near = changed(RAW, TRAINED, 0, 0.84)
    assert held(near, PLAIN).holds and not held(near, TRAINED).holds
    assert not held(changed(RAW, CORRECTED, 0, 0.849), PLAIN).holds


def test_an_eighth_may_be_half_a_point_worse():
    def holds(value, side):
        at = study.figures(found(tuned=changed(TUNED, CORRECTED, 2, value)), "tuned")
        return study.tuned_claim(at, side).holds

    assert holds(0.9455, TRAINED) and not holds(0.9445, TRAINED)
    assert holds(0.9445, PLAIN) and not holds(0.934, PLAIN)


def test_every_speed_up_counts_against_both_sides():
    for name, values in (("raw", RAW), ("tuned", TUNED)):
        whole = lambda values, name=name: study.every_claim(  # noqa: E731
            study.figures(found(**{name: values}), name), name, "when"
        )
        assert whole(values).holds
        for side in (PLAIN, TRAINED):
            for k in range(len(SPEED_UPS)):
                assert not whole(changed(values, side, k, 0.99)).holds
        assert "16 times" in whole(values).ours and whole(values).seeds == 3


def test_what_was_learned_and_what_it_costs():
    of = lambda data, penalty: study.learning_claim(  # noqa: E731
        Meta(None, {"data": 0.01, "penalty": 900.0}, {"data": data, "penalty": penalty})
    )
    assert of(0.3, 450.0).holds and not of(0.3, 451.0).holds and not of(0.51, 400.0).holds
    assert study.whole_claim(found(whole={CORRECTED: 0.961})).holds
    assert not study.whole_claim(found(whole={CORRECTED: 0.959})).holds
    assert not study.at_once_claim(found()).holds
    assert study.at_once_claim(found(at_once={CORRECTED: 0.71})).holds


def test_a_table_has_means_and_a_picture_all_sides():
    rows = study.rows_of(found())
    assert len(rows) == 12 and rows[0]["side"] == PLAIN and rows[0]["widths"] == "3-2 3-2 3-2"
    np.testing.assert_allclose(rows[4]["raw"], RAW[TRAINED][0])
    figure = importlib.import_module("matplotlib.figure").Figure()
    study.curves(figure, found())
    assert [len(axes.lines) for axes in figure.axes] == [3, 3]


@pytest.fixture(scope="module")
def point():
    """The net, masked to half its work."""
    kept = kept_of(NET, speed_up=2.0)
    sizes = tuple(int(stays.sum()) for stays in kept.values())
    form = measure.off(NET, kept)
    return Point(CORRECTED, 0, 2.0, sizes, 0.9, 0.9, 0.9, 0.9, form, kept, (0.1, 0.1))


def test_what_is_masked_is_what_is_left(point, monkeypatch):
    monkeypatch.setattr(measure, "SIZES", (6, 8, 7, 3))
    small, far = measure.left_of(point)
    assert small.sizes == [6, *point.sizes, 3] and far < 1e-5
    assert measure.work_left(point, small) >= 2
    claim = study.cut_claim([point])
    assert claim.holds and claim.seeds == 0
    more = point._replace(speed_up=3.0)  # less work went than was asked for
    assert not study.cut_claim([more]).holds


def test_rates_are_chosen_by_validation_rows_of_what_is_pruned(point):
    x = jax.random.normal(KEY, (40, 6))
    y = np.asarray(point.form(x).argmax(-1), np.int32)
    data = Splits(None, Labelled(np.asarray(x), y), None)
    worse = jax.tree.map(lambda leaf: -leaf, NET)
    begun = [
        Begun(CORRECTED, 0, 2.0, 0.03, worse, point.kept),
        Begun(CORRECTED, 0, 2.0, 0.1, NET, point.kept),
        Begun(CORRECTED, 0, 4.0, 0.2, worse, point.kept),
    ]
    chosen = measure.best_of(begun, data)
    assert [(each.speed_up, each.rate) for each in chosen] == [(2.0, 0.1), (4.0, 0.2)]


def test_patches_that_are_held_out_are_of_other_columns():
    learn, held = (resnets.patches(3, 0, held_out=which) for which in (False, True))
    assert learn.shape == held.shape == (3, 32, 32, 3) and learn.dtype == np.float32
    np.testing.assert_array_equal(learn, resnets.patches(3, 0, held_out=False))
    load = importlib.import_module("sklearn.datasets").load_sample_images
    photographs = np.stack(load().images).astype(np.float32) / 255
    for patch in held:
        ways = [patch, patch[:, ::-1]]
        columns = photographs[:, :, resnets.WIDE :]
        first = [np.argwhere((columns == way[0, 0]).all(-1)) for way in ways]
        assert any(len(places) for places in first)


def test_agreement_of_real_nets_is_decided_at_every_speed_up():
    good = {1.5: (0.9, 0.9), 2.0: (0.7, 0.705), 3.0: (0.5, 0.4)}
    one = resnets.Pruned("ResNet-56", 0.4, (0.6, 0.9), good, good, (1e-6, 1.01))
    assert [claim.holds for claim in one.claims()] == [True] * 3
    assert "it never saw" in one.claims()[0].evidence
    worse = good | {3.0: (0.38, 0.4)}
    assert [c.holds for c in one._replace(tuned=worse).claims()] == [True, False, True]
    assert [c.holds for c in one._replace(raw=worse).claims()] == [False, True, True]
    for cut in ((1e-2, 1.01), (1e-6, 0.99)):
        assert not one._replace(cut=cut).claims()[2].holds
    assert one.row()["raw, 2 times"] == "0.700 / 0.705"


@pytest.mark.slow
def test_a_small_net_is_pruned_by_both_sides(monkeypatch):
    """As the real ones are, of a net of one block in each stage."""
    net = ResNet(ResNetConfig((1, 1), (4, 6), 5, image=(32, 32)), key=KEY)
    monkeypatch.setattr(resnets, "SPEED_UPS", (1.5,))
    sizes = resnets.Sizes((16, 16), meta_steps=2, meta_batch=8, steps=2, batch=4)
    learn, held = (resnets.patches(16, 0, held_out=which) for which in (False, True))
    meta = resnets.meta_of(net, learn, sizes, 0)
    one = resnets.pruned("ResNet-20", net, meta, learn, held, sizes, 0)
    assert set(one.raw) == set(one.tuned) == {1.5}
    assert one.cut[0] < 1e-4 and one.cut[1] >= 1
    assert "learned from" in one.claims()[0].evidence
    kept = kept_of(net, speed_up=1.5)
    numbers = resnets.numbers(kept)
    small = narrow(net, kept)
    np.testing.assert_allclose(
        small(jnp.asarray(held)), resnets.scores(net, held, numbers), rtol=1e-4, atol=1e-4
    )
    assert products(small) * 1.5 <= products(net)
    assert tree.nbytes(small) < tree.nbytes(net)


def test_rates_that_were_chosen_are_told_and_where_they_lie_among_those_tried():
    points = [p._replace(rates=(0.0 if p.side == PLAIN else 0.1, study.RATES[-1])) for p in found()]
    count = len(points)
    chosen = count + count * 2 // 3  # two sides train on before, too
    assert study.rates_of(points) == f"{count} of {chosen} chosen at an end of those tried"
    rows = {(row["side"], row["speed-up"]): row["rates"] for row in study.rows_of(points)}
    assert rows[PLAIN, 2.0] == "0/1 0/1 0/1"
    assert rows[CORRECTED, 16.0] == "0.1/1 0.1/1 0.1/1"


@pytest.mark.slow
def test_a_tiny_run_of_the_digits(monkeypatch):
    monkeypatch.setattr(measure, "NET_STEPS", 40)
    data = measure.data_of(0)
    nets = measure.networks(data, 2, 0)
    meta = measure.meta_trained(nets[:1], data, 2, 0)
    points = measure.points(nets[1:], meta.network, data, 20, 0)
    assert {(p.side, p.speed_up) for p in points} == {(s, k) for s in SIDES for k in SPEED_UPS}
    assert all(0 <= p.raw <= 1 and 0 <= p.tuned <= 1 for p in points)
    assert meta.after["penalty"] < meta.before["penalty"]
