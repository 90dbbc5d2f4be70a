"""The Macaron study: what decides its claims, and what it measures."""

import importlib

import jax
import numpy as np
import pytest

study = importlib.import_module("ffnlab.studies.macaron")
measure = importlib.import_module("ffnlab.studies.macaron_measure")
Run = measure.Run


def linear(lie=2.0, strang=3.0, lie_euler=2.0, strang_euler=2.0, ratio=1.5):
    """Errors of schemes whose exponents and last errors are given."""
    powers = {"Lie, exact": lie, "Strang, exact": strang}
    powers |= {"Lie, Euler": lie_euler, "Strang, Euler": strang_euler}
    sizes = (0.25, 0.125)
    over = {"Lie, Euler": ratio}
    errors = {
        name: np.array([[over.get(name, 1.0) * h**p for h in sizes]] * 2)
        for name, p in powers.items()
    }
    return measure.Errors(sizes, errors, {n: np.array([p, p]) for n, p in powers.items()})


def test_orders_are_judged_by_their_means():
    held = lambda found: [claim.holds for claim in study.order_claims(found)]  # noqa: E731
    assert held(linear()) == [True, False, True]
    assert held(linear(strang=2.8)) == [False, False, True]
    assert held(linear(lie=2.2)) == [False, False, True]
    assert held(linear(strang_euler=3.05))[1]
    assert not held(linear(ratio=0.5))[2]


def trained(lie, strang, power=2.0):
    errors = {"Lie, Euler": np.array(lie), "Strang, Euler": np.array(strang)}
    slopes = {name: np.full(len(lie), power) for name in errors}
    return measure.Errors((1.0, 0.5), errors, slopes)


def test_the_trained_decoder_is_judged_by_every_block():
    held = lambda *given: [c.holds for c in study.trained_claims(trained(*given))]  # noqa: E731
    assert held([[2.0, 1.0], [2.0, 1.0]], [[1.0, 2.0], [1.0, 2.0]]) == [True, False]
    assert held([[2.0, 1.0], [0.9, 1.0]], [[1.0, 0.1], [1.0, 0.1]])[0] is False
    assert held([[2.0, 1.0]], [[1.0, 2.0]], 3.0)[1]


def test_what_must_hold():
    counts = measure.Counts({"decoder": 1, "encoder": 3}, 1.0)
    nats = {"": 1.0, "kept": 1.0, "twice": 1.2, "moved": 3.0, "split": 1.1}
    change = dict.fromkeys(nats, 0.5) | {"kept": 1e-7}
    held = lambda c, n, d: [claim.holds for claim in study.exact_claims(c, measure.Kept(n, d))]  # noqa: E731
    assert held(counts, nats, change) == [True] * 3
    assert held(counts._replace(parameters={"decoder": 1, "encoder": 2}), nats, change)[0] is False
    assert held(counts._replace(products=1.01), nats, change)[0] is False
    assert held(counts, nats, change | {"kept": 1e-3})[1] is False
    for name in ("twice", "moved"):
        assert held(counts, nats | {name: 1.0}, change)[2] is False


def found(plain, half, whole):
    values = zip(measure.WAYS, (plain, half, whole), strict=True)
    return {way: Run(4e-3, {4e-3: 1.0, 8e-3: 2.0}, tuple(nats), 10) for way, nats in values}


def test_learning_is_judged_by_means_and_says_its_spread():
    first, second = study.learning_claims(found([1.7, 1.8], [1.7, 1.88], [1.6, 1.6]))
    assert first.holds and not second.holds and first.seeds == 2
    assert "1.790 (1.700 to 1.880)" in first.ours and "0.040 (0.000 to 0.080)" in first.ours
    assert "0.004, 0.008 tried alike" in first.evidence
    worse, _ = study.learning_claims(found([1.7, 1.7], [1.7, 1.85], [1.7, 1.7]))
    assert not worse.holds
    quick = found([1.7], [1.7], [1.7])
    del quick["Macaron, whole steps"]
    assert len(study.learning_claims(quick)) == 1


def test_ways_differ_in_their_blocks_alone():
    forms = {way: jax.eval_shape(lambda way=way: measure.decoder(way, 0)) for way in measure.WAYS}
    scales = {way: [join.scale for join in model.blocks()[0].joins] for way, model in forms.items()}
    assert list(scales.values()) == [[1, 1], [0.5, 1, 0.5], [1, 1, 1]]
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(model)) for model in forms.values()]
    assert sizes[1] == sizes[2] == sizes[0] + 2 * measure.LAYERS * measure.WIDTH
    counted = measure.counts()
    assert counted.parameters == {"decoder": 1, "encoder": 3} and counted.products == 1


def test_linear_fields_have_the_orders_of_their_schemes():
    slopes = {name: each.mean() for name, each in measure.linear_errors(4, 0).slopes.items()}
    wanted = {"Lie, exact": 2, "Strang, exact": 3, "Lie, Euler": 2, "Strang, Euler": 2}
    assert slopes == pytest.approx(wanted, abs=0.15)


@pytest.mark.slow
def test_a_trained_block_is_held_against_the_equation():
    """With short steps either scheme's error falls with the square."""
    tokens = np.frombuffer(b"def main():", np.uint8)[None].astype(np.int32)
    errors = measure.trained_errors(tokens)
    for name in ("Lie, Euler", "Strang, Euler"):
        values = errors.errors[name]
        assert values.shape == (8, 6) and (np.diff(values[1:]) < 0).all()
        np.testing.assert_allclose(values[1:, -2] / values[1:, -1], 4, rtol=0.1)
