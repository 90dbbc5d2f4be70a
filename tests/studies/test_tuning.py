"""Comparisons of tuned sides: what chooses, what is reported, and what a claim says of it."""

import dataclasses
import os
import signal

import jax
import numpy as np
import optax
import pytest

from ffnlab.data import Labelled, gaussian_clusters
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP
from ffnlab.learning import backprop, counter_current, labelled, lamb, lars
from ffnlab.studies import classify, tuning
from ffnlab.studies.tuning import Side, compare, deficit, grid, splits
from tuned import assert_tuned, cases, reached

RATES = (1e-4, 0.1, 1e4)  # one that learns nothing in time, one that does, one that diverges


def sides(rates=RATES, steps=30) -> list[Side]:
    start = lambda seed: MLP((6, 8, 3), key=jax.random.key(seed), bias=False)  # noqa: E731
    local = counter_current(optimizer=classify.clipped_sgd())
    rules = {
        "backprop": lambda s: backprop(labelled, optax.sgd(s["rate"])),
        "counter-current": lambda s: classify.at_rate(local, s["rate"]),
    }
    return [Side(n, grid(rate=rates), rule, start, 20, steps) for n, rule in rules.items()]


@pytest.fixture(scope="module")
def data():
    return gaussian_clusters(0, train=300, test=100, width=6, classes=3, per_class=1, noise=0.5)


def test_no_row_is_in_two_splits():
    tagged = lambda a, b: Labelled(  # noqa: E731
        np.arange(a, b, dtype=np.float32)[:, None], np.arange(a, b, dtype=np.int32)
    )
    found = splits((tagged(0, 50), tagged(50, 60)))
    rows = [set(part.y.tolist()) for part in found]
    assert [len(part) for part in rows] == [40, 10, 10]
    assert set.union(*rows) == set(range(60)), "every row is somewhere, and in one place only"
    assert rows[2] == set(range(50, 60)), "test rows stay test rows"
    for part in found:
        np.testing.assert_array_equal(part.x[:, 0], part.y)
    assert [set(part.y.tolist()) for part in splits((tagged(0, 50), tagged(50, 60)))] == rows


def test_classes_of_test_rows_do_not_choose(data):
    """With poisoned test labels, by which an untrained network is best, nothing else is chosen."""
    train, test = data
    poisoned = Labelled(test.x, (test.y + 1) % 3)
    found, other = (compare(sides(), splits((train, held)), [0, 1]) for held in (test, poisoned))
    for name in found:
        assert found[name].setting == other[name].setting
        assert found[name].tried == other[name].tried
        assert found[name].mean > 0.8 > 0.2 > other[name].mean
    assert found["backprop"].setting == {"rate": 0.1}


def test_test_rows_are_read_after_the_choice(data):
    """Each side scores every setting on validation rows, then the chosen one on test rows."""
    split, read = splits(data), []

    def score(rule, state, rows):
        read.append("test" if rows is split.test else "validation")
        assert rows is split.test or rows is split.validation
        return classify.accuracy(rule, state, rows)

    compare(sides((0.03, 0.1, 0.3), steps=2)[:1], split, [4, 5], score=score)
    assert read == ["validation"] * 3 + ["test"] * 2


def test_the_best_by_validation_is_chosen_and_tested(data):
    """The picker takes the highest score, or the lowest; diverged runs lose either way."""
    split, values = splits(data), {1e-4: 0.7, 0.1: 0.2}
    made = {rate: backprop(labelled, optax.sgd(rate)) for rate in RATES}

    def score(rule, state, rows):
        return next(values[rate] for rate, known in made.items() if known is rule)

    side = dataclasses.replace(sides()[0], rule=lambda s: made[s["rate"]])
    for lower, best in ((False, 1e-4), (True, 0.1)):
        found = compare([side], split, [0], score=score, lower=lower)["backprop"]
        assert found.setting == {"rate": best} and found.scores == (values[best],)
        worst = float("inf") if lower else 0.0
        assert found.tried[2] == ({"rate": 1e4}, worst), "it diverged"


def test_what_is_reported_is_what_was_trained(data):
    split = splits(data)
    found = compare(sides((0.1,)), split, [3, 7])
    for side in sides((0.1,)):
        tuned = found[side.name]
        for seed, score, state in zip((3, 7), tuned.scores, tuned.states, strict=True):
            rule = side.rule({"rate": 0.1})
            alone = classify.learned(
                rule, side.model(seed), split.train, batch=20, steps=30, seed=seed
            )
            assert score == classify.accuracy(rule, alone, split.test)
            jax.tree.map(np.testing.assert_array_equal, state.model, alone.model)
        assert tuned.seeds == (3, 7) and tuned.parameters == 6 * 8 + 8 * 3
        assert tuned.mirror == (72 if side.name == "counter-current" else 0)
    assert found["backprop"].mean > 0.8


def test_a_state_that_predicts_nan_is_the_worst(data):
    score = lambda rule, state, rows: float("nan")  # noqa: E731
    found = compare(sides((0.1,), 2)[:1], splits(data), [0], score=score)["backprop"]
    assert found.scores == (0.0,) and found.tried[0][1] == 0.0


def test_bad_comparisons(data):
    one, two = sides()
    few = dataclasses.replace(two, grid=two.grid[:2])
    for bad in ([one, few], [one, one], [dataclasses.replace(one, grid=[])]):
        with pytest.raises(ConfigError, match="settings tried"):
            compare(bad, splits(data), [0])
    with pytest.raises(ConfigError, match=r"seeds=\[\]"):
        compare([one], splits(data), [])
    for fraction in (0.0, 1.0):
        with pytest.raises(ConfigError, match="fraction"):
            splits(data, fraction=fraction)


def test_one_bad_seed_of_one_case_decides():
    found = cases(
        a={"ours": [0.95, 0.96], "theirs": [0.96, 0.96], "third": [0.9, 0.9]},
        b={"ours": [0.90, 0.93], "theirs": [0.90, 0.95]},
    )
    assert deficit(found, "ours", "theirs") == pytest.approx(0.02)
    assert deficit(found, "ours", "theirs") <= 0.02, "rounding does not decide"
    assert deficit(found, "ours", "theirs", cases=["a"]) == pytest.approx(0.01)
    assert deficit(found, "ours", "third") == pytest.approx(-0.05)
    assert tuning.scores(found, "ours") == [0.95, 0.96, 0.90, 0.93]


def test_a_claim_names_parameters_tuning_and_seeds():
    found = cases(a={"ours": [0.5, 0.7], "theirs": [0.25, 0.75]})
    found["b"] = {
        "ours": reached([0.9, 0.9], parameters=99, mirror=7),
        "theirs": reached([1.0, 1.0]),
    }
    claim = tuning.tuned_claim("c", "p", "a rule", True, found, "ours", "theirs")
    assert_tuned(claim, "ours", "theirs")
    assert claim.ours == (
        "a: ours 0.600 (0.500 to 0.700), theirs 0.500 (0.250 to 0.750); "
        "b: ours 0.900 (0.900 to 0.900), theirs 1.000 (1.000 to 1.000)"
    )
    assert claim.evidence == (
        "a rule; each side the best of 2 settings on validation rows, chosen with seed 0, tested "
        "with seeds 0, 1 of networks and order of rows. ours: 1,234 parameters (a), 99 parameters "
        "+ 7 of a mirror (b); tried rate of 0.1, 0.3; chosen rate 0.3. theirs: 1,234 parameters; "
        "tried rate of 0.1, 0.3; chosen rate 0.3"
    )


def test_tables_hold_what_was_measured():
    found = cases(a={"ours": [0.5, 0.75]})
    assert tuning.table(found) == [
        {
            "case": "a",
            "side": "ours",
            "parameters": 1234,
            "chosen": "rate 0.3",
            "accuracy": 0.625,
            "lowest": 0.5,
            "highest": 0.75,
        }
    ]
    assert tuning.trials(found) == {"a": {"ours": {"rate 0.1": 0.5, "rate 0.3": 0.6}}}
    assert tuning.values(found) == {("a", "ours"): (0.5, 0.75)}


OPTIMIZERS = {
    "clipped SGD": (lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate))),
    "Nesterov": lambda rate: optax.sgd(optax.linear_schedule(0.0, rate, 2), 0.9, nesterov=True),
    "AdamW": lambda rate: optax.adamw(rate, weight_decay=0.1),
    "LAMB": lambda rate: lamb(optax.linear_schedule(0.0, rate, 2), weight_decay=0.1),
    "LARS": lambda rate: lars(optax.linear_schedule(0.0, rate, 2), weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rate_in_the_state_is_the_optimizer_s_rate(name, key, data):
    """Optimizers at rate 1 whose updates are multiplied are those at the rate; one compilation."""
    batch = tuple(part[:20] for part in data[0])
    paced = backprop(labelled, classify.paced(OPTIMIZERS[name](1.0)))
    for rate in (0.02, 0.3):
        ends = []
        for rule in (classify.at_rate(paced, rate), backprop(labelled, OPTIMIZERS[name](rate))):
            state = rule.init(MLP((6, 4, 3), key=key), key)
            for _ in range(3):
                state, _ = rule.step(state, batch)
            ends.append(jax.tree.leaves(state.model))
        for ours, wanted in zip(*ends, strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=2e-5, atol=1e-6)  # float32, three steps
    assert paced.step._cache_size() == 1


def test_both_networks_of_a_rule_get_the_rate(key, data):
    """Steps of counter-current learning are as long as the rate says, up and down."""
    rule = counter_current(optimizer=classify.clipped_sgd())
    batch, moved = tuple(part[:20] for part in data[0]), []
    for rate in (1e-3, 2e-3):
        state = classify.at_rate(rule, rate).init(MLP((6, 4, 3), key=key, bias=False), key)
        before = jax.tree.map(np.asarray, (state.model, state.mirror))
        after, _ = rule.step(state, batch)
        after = (after.model, after.mirror)
        moved.append([a - b for a, b in zip(*map(jax.tree.leaves, (after, before)), strict=True)])
    for one, two in zip(*moved, strict=True):
        np.testing.assert_allclose(two, 2 * one, rtol=1e-2, atol=1e-6)
        assert np.any(one != 0)


def test_a_rate_needs_an_optimizer_that_takes_it(key):
    with pytest.raises(KeyError):
        classify.at_rate(backprop(labelled, optax.sgd(0.1)), 0.1).init(MLP((6, 3), key=key), key)


def test_a_signal_stops_a_comparison(data):
    """Half-trained networks are no result: SIGTERM in the middle of a run ends all of them."""
    calls = []

    def rule_of(setting):
        rule = backprop(labelled, optax.sgd(setting["rate"]))

        def step(state, batch):
            calls.append(setting)
            os.kill(os.getpid(), signal.SIGTERM)
            return rule.step(state, batch)

        return dataclasses.replace(rule, step=step)

    stopped = dataclasses.replace(sides()[0], rule=rule_of)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 1 of 30"):
        compare([stopped], splits(data), [0])
    assert len(calls) == 1
