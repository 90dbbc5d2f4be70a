"""The study of hardware-aware NAS: how its claims are decided, and what it measures."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from ffnlab import tree
from ffnlab.clock import Spread
from ffnlab.data import Labelled
from ffnlab.pruning.search import macs, start
from ffnlab.pruning.search.loop import Log
from ffnlab.studies import hardware_aware_nas_known as known
from ffnlab.studies import hardware_aware_nas_measure as measure
from ffnlab.studies import hardware_aware_nas_network as network
from ffnlab.studies.digit_images import digit_images
from ffnlab.studies.hardware_aware_nas_measure import COUNTED, QUICK, TIMED, Beside, Chosen, Found
from ffnlab.studies.hardware_aware_nas_pictures import fronts, latencies, lines

study = importlib.import_module("ffnlab.studies.hardware_aware_nas")
LINAS, EVOLUTION, RANDOM = known.TACTICS
NET = network.network()


def holds(claims):
    return [claim.holds for claim in claims]


# Problems that are known.


def test_the_front_of_zdt1_has_the_volume_said():
    x = np.zeros((20001, 30))
    x[:, 0] = np.linspace(0, 1, 20001)
    points = known.zdt1(x)
    np.testing.assert_allclose(points[:, 1], 1 - np.sqrt(points[:, 0]))
    under = np.trapezoid(1.1 - points[:, 1], points[:, 0]) + 0.1 * 1.1
    assert known.TRUE_VOLUME == pytest.approx(under, abs=1e-4)
    assert known.TRUE_VOLUME == pytest.approx(0.8767, abs=1e-4)


def test_the_landscape_adds_up_what_entries_and_pairs_add():
    """Without pairs a change of one entry changes the loss alike whatever the others are."""
    ask = known.landscape(0)
    at = lambda *x: ask({"width": (*x, *[0] * (12 - len(x)))})  # noqa: E731
    apart = (at(1)["loss"] - at(0)["loss"]) - (at(1, 3)["loss"] - at(0, 3)["loss"])
    assert abs(apart) > 1e-3  # the pair of the first two
    costs = [at(*x)["macs"] for x in ((0,), (1,), (2,))]
    assert costs[2] - costs[1] == pytest.approx(costs[1] - costs[0]) and costs[1] > costs[0]
    assert known.landscape(1)({"width": (0,) * 12}) != at(0)


def efficient(linas, evolution, seeds=5):
    """The same of all seeds, after 50, 100 and 200 measurements."""
    rows = {LINAS: linas, EVOLUTION: evolution, RANDOM: (0.1, 0.1, 0.1)}
    return {tactic: np.tile(values, (seeds, 1)) for tactic, values in rows.items()}


def test_known_problems_are_judged_by_the_thresholds_of_the_card():
    good = efficient((0.5, 0.7, 0.8), (0.4, 0.6, 0.7))
    assert holds(study.known_claims(np.full(5, 0.86), good)) == [True, True, True]
    assert holds(study.known_claims(np.array([0.86] * 4 + [0.84]), good)) == [False, True, True]
    one_lost = {t: v.copy() for t, v in good.items()}
    one_lost[LINAS][0, 1] = 0.59
    assert holds(study.known_claims(np.full(5, 0.86), one_lost))[1:] == [True, False]
    one_lost[LINAS][1, 1] = 0.59
    assert not study.known_claims(np.full(5, 0.86), one_lost)[1].holds
    enough = efficient((0.5, 0.6931, 0.8), (0.4, 0.6, 0.7))
    assert study.known_claims(np.full(5, 0.86), enough)[2].holds
    little = efficient((0.5, 0.692, 0.8), (0.4, 0.6, 0.7))
    assert not study.known_claims(np.full(5, 0.86), little)[2].holds
    two = study.known_claims(np.full(2, 0.86), efficient((0.5, 0.7, 0.8), (0.4, 0.6, 0.7), 2))
    assert "in 2 of 2 seeds" in two[1].evidence and two[1].seeds == 2
    assert len(study.known_rows(np.full(2, 0.86), good)) == 1 + 3 * 3


def test_a_search_may_lose_with_one_seed_of_five():
    assert [study.needed(n) for n in (1, 2, 4, 5, 6)] == [1, 2, 4, 4, 5]
    volumes = {LINAS: np.full(5, 0.5), EVOLUTION: np.full(5, 0.5), RANDOM: np.full(5, 0.4)}
    judged = lambda pair=COUNTED[0]: study.search_claims(pair, volumes)  # noqa: E731
    assert holds(judged()) == [True, True]  # equal is no worse
    volumes[RANDOM][:2] = 0.6
    assert holds(judged()) == [False, True]
    volumes[RANDOM][0] = 0.4
    assert holds(judged()) == [True, True]
    assert "at least as much in 4 of 5" in judged()[0].ours
    assert [c.claim.split(" LINAS")[0] for c in judged() + judged(COUNTED[1])] == [
        *["by loss and MACs"] * 2,
        *["by loss and bytes"] * 2,
    ]


# The digits' networks.


def test_digits_are_moved_and_stay_whole():
    part = Labelled(np.arange(1, 9, dtype=np.float32).reshape(2, 2, 2, 1), np.array([3, 5]))
    found = network.moved(part, 40, np.random.default_rng(0))
    assert found.x.shape == (80, 12, 12, 1) and found.y.tolist() == [3] * 40 + [5] * 40
    places = set()
    for image, whole in zip(found.x[..., 0], np.repeat(part.x[..., 0], 40, axis=0), strict=True):
        rows, columns = np.nonzero(image)
        top, left = rows.min(), columns.min()
        assert np.array_equal(image[top : top + 2, left : left + 2], whole)
        assert image.sum() == whole.sum()
        places.add((top, left))
    assert len(places) > 35 and max(max(p) for p in places) == 10


def test_every_part_holds_its_own_digits_several_times():
    source, data = digit_images(0), network.moved_digits(0)
    for part, own, copies in zip(data, source, (8, 4, 4), strict=True):
        assert np.array_equal(part.y, np.repeat(own.y, copies))
        sums = np.repeat(own.x.sum((1, 2, 3)), copies)
        np.testing.assert_allclose(part.x.sum((1, 2, 3)), sums, rtol=1e-5)


def test_multiply_adds_from_sizes_are_those_counted():
    shapes = jax.eval_shape(network.stack, jax.random.key(0))
    for config in (
        {"depth": (4,), "width": (32,) * 4, "format": ("float",) * 4},
        {"depth": (2,), "width": (4, 16, 2, 2), "format": ("int8", "float8", "float", "float")},
    ):
        small = jax.eval_shape(lambda model, c=config: NET.cut(model, c), shapes)
        assert macs(small, network.IMAGE) == network.macs_of(config)
    others = network.alike(NET, config, 0, 5)
    assert all(abs(network.macs_of(o) / network.macs_of(config) - 1) <= 0.01 for o in others)
    assert len({str(other) for other in others}) >= 3 and config not in others


def log_of(rows, objectives, seed=0, expected=None):
    """A log of given values of drawn networks."""
    sizes = QUICK._replace(budget=len(rows), timed=len(rows), population=2)
    log = start(NET.space, measure.options_of(sizes, objectives, "random", seed))
    vectors = NET.space.canonical(NET.space.sample(np.random.default_rng(seed), len(rows)))
    values = np.array(rows, float)
    said = np.full_like(values, np.nan) if expected is None else np.array(expected, float)
    return Log(vectors, values, said, np.asarray(len(rows)), log.population, log.identity)


def test_volumes_are_shares_of_one_box():
    by_macs, by_bytes = COUNTED
    loss, most = measure.worst(by_macs)
    assert (loss, most) == (pytest.approx(np.log(10)), 144 * 32 + 4 * 2 * 32 * 32 + 320)
    half = log_of([[loss / 2, most / 2], [loss, most]], by_macs)
    assert measure.volumes(by_macs, [half]).tolist() == [pytest.approx(1 / 4)]
    assert measure.volumes(TIMED, [log_of([[loss / 2, 0.25]] * 2, TIMED)])[0] == pytest.approx(
        3 / 8
    )
    whole = tree.nbytes(network.stack(jax.random.key(0)))
    assert measure.worst(by_bytes).tolist() == [loss, whole]


def test_predictors_are_asked_of_networks_they_have_not_seen():
    """Losses and costs that are sums over choices: ridge tells them; noise it does not."""
    rng = np.random.default_rng(0)
    weights = rng.random((NET.space.features, 2)) + 0.1
    rows = lambda log: NET.space.one_hot(log.vectors) @ weights  # noqa: E731
    first, second = (log_of(np.zeros((40, 2)), COUNTED[0], seed) for seed in (0, 1))
    first = first._replace(values=rows(first))
    noisy = rows(second)
    noisy[:, 1] = rng.random(40)
    vectors = second.vectors.copy()
    vectors[:10], noisy[:10] = first.vectors[:10], first.values[:10]
    told = measure.foretold(NET.space, first, second._replace(values=noisy, vectors=vectors))
    seen = {row.tobytes() for row in first.vectors}
    new = sum(row.tobytes() not in seen for row in vectors)
    assert new <= 30 and [one.networks for one in told] == [new] * 2
    assert told[0].order > 0.6 and told[0].error < 0.1 and told[1].order < 0.4


def test_predictors_of_both_searches_tell_of_the_loss(monkeypatch):
    """Two seeds of two pairs: four of the loss, two of each cost, in the order of the seeds."""
    asked = []

    def foretold(space, first, second):
        asked.append((first, second))
        return [measure.Foretold(float(len(asked)), 0.0, 1), measure.Foretold(-1.0, 0.0, 1)]

    monkeypatch.setattr(measure, "foretold", foretold)
    counted = found().counted
    told = measure.all_foretold(NET.space, counted)
    assert {name: len(ones) for name, ones in told.items()} == {"loss": 4, "macs": 2, "bytes": 2}
    assert [one.order for one in told["loss"]] == [1.0, 2.0, 3.0, 4.0]
    wanted = [(counted[p][RANDOM][i], counted[p][LINAS][i]) for p in COUNTED for i in (0, 1)]
    assert all(a is c and b is d for (a, b), (c, d) in zip(asked, wanted, strict=True))


def found(**changes):
    """What two seeds found."""
    logs = {
        pair: {
            tactic: [log_of([[1.0, 2e3], [0.5, 3e3]], pair, seed) for seed in (0, 1)]
            for tactic in known.TACTICS
        }
        for pair in COUNTED
    }
    timed = {
        t: log_of([[1.0, 0.4], [0.5, 0.8]], TIMED, expected=[[np.nan] * 2, [0.6, 0.7]])
        for t in known.TACTICS
    }
    told = {name: [measure.Foretold(0.95, 0.01, 9)] * 2 for name in ("loss", "macs", "bytes")}
    config = {"depth": (1,), "width": (4,) * 4, "format": ("float",) * 4}
    besides = [Beside(config, 0.9, (0.8, 0.85), (config,)), Beside(config, 0.8, (0.7,), ())]
    return Found([], logs, timed, told, besides, loaded())._replace(**changes)


def loaded(**changes):
    again = Spread(0.5, 0.4, 0.6)
    config = {"depth": (1,), "width": (4,) * 4, "format": ("float",) * 4}
    counts = ((5.0, 6.0), (5, 6))
    return Chosen(config, None, 0.55, 0.45, again, 1e-7, True, counts)._replace(**changes)


def test_predictors_and_finds_are_judged_by_their_means():
    assert holds(study.told_claims(found())) == [True, True]
    poor, good = measure.Foretold(0.84, 0.1, 9), measure.Foretold(0.97, 0.1, 9)

    def with_one(name, *told):
        return study.told_claims(found(told=found().told | {name: list(told)}))

    for name in ("loss", "macs"):
        assert holds(with_one(name, poor, good)) == [True, True]  # mean .905
        assert holds(with_one(name, poor, poor)) == [False, True]
    assert holds(with_one("bytes", poor, poor)) == [True, True]
    worse = [one._replace(found=0.7) for one in found().besides]
    assert holds(study.told_claims(found(besides=worse))) == [True, False]
    assert "tau 0.950 (0.950 to 0.950), off by 1.0 %" in study.told_claims(found())[0].ours


def test_the_loaded_network_is_judged():
    assert holds(study.chosen_claims(loaded())) == [True, True, True]
    for change in ({"change": 2e-6}, {"kept": False}, {"counts": ((5.0, 6.0), (5, 7))}):
        assert holds(study.chosen_claims(loaded(**change))) == [False, True, True]
    for said, near in ((0.39, False), (0.41, True), (0.59, True), (0.61, False)):
        assert study.chosen_claims(loaded(said=said))[1].holds == near
    for time, kept in ((0.82, True), (0.83, False)):
        again = Spread(time, time, time)
        assert study.chosen_claims(loaded(again=again, said=time))[2].holds == kept
    assert [claim.timed for claim in study.chosen_claims(loaded())] == [False, True, True]


def test_searches_by_latency_are_judged_where_all_were_run():
    volumes = {LINAS: np.array([0.5]), EVOLUTION: np.array([0.5]), RANDOM: np.array([0.4])}
    assert holds(study.latency_claims(volumes)) == [True]
    assert not study.latency_claims(volumes | {EVOLUTION: np.array([0.51])})[0].holds
    assert study.latency_claims({LINAS: np.array([0.5])}) == []


def test_rows_and_pictures():
    table = study.search_rows(found())
    assert [row.get("search") for row in table] == [*known.TACTICS] * 3 + [None] * 3
    assert table[-1]["tau"] == pytest.approx(0.95)
    for draw in (
        lambda figure: fronts(figure, found()),
        lambda figure: lines(figure, efficient((0.5, 0.7, 0.8), (0.4, 0.6, 0.7))),
        lambda figure: latencies(figure, found()),
    ):
        figure = Figure()
        draw(figure)
        assert figure.axes and all(axes.get_xlabel() for axes in figure.axes)


def test_answers_are_remembered():
    asked = []

    def ask(config):
        asked.append(config)
        return {"loss": float(len(asked))}

    first, second = ({"width": (1, 2)}, {"width": (2, 1)})
    remember = measure.remembered(ask)
    answers = [remember(config)["loss"] for config in (first, second, first)]
    assert answers == [1.0, 2.0, 1.0] and asked == [first, second]


@pytest.mark.slow
def test_a_chosen_network_is_cut_out_saved_and_loaded():
    model = network.stack(jax.random.key(0))
    rows = Labelled(np.random.default_rng(0).random((8, 12, 12, 1), np.float32), np.arange(8) % 10)
    log = log_of([[1.0, 0.4], [0.5, 0.8], [1.2, 0.3], [0.9, 0.7]], TIMED)
    told = measure.measuring(NET, model, measure.on_device(rows), turns=None)
    one = measure.chosen(NET, model, log, told, rows, turns=2)
    assert one.config == NET.space.decode(log.vectors[3]) and one.searched == 0.7
    assert one.kept and one.change <= 1e-6 and one.counts[0] == one.counts[1]
    assert one.model(jnp.asarray(rows.x)).shape == (8, 10)
    entries = study.closing(
        NET, found(models=[model], chosen=one), network.Splits(rows, rows, rows), 0
    )
    assert [row["network"] for row in entries] == [
        "whole",
        "found",
        "drawn, equal MACs",
        "smallest",
    ]
    assert entries[1]["MACs"] == pytest.approx(entries[2]["MACs"], rel=0.01)
