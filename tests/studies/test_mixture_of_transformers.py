"""The study of Mixture-of-Transformers: claims are decided by all figures; its loop trains."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab.losses import next_token, packed_next_token
from ffnlab.studies import mixture_of_transformers_measure as measure
from ffnlab.studies.mixture_of_transformers_measure import QUICK, Exact, Run, Task
from ffnlab.testing import batches, equal, tiny

study = importlib.import_module("ffnlab.studies.mixture_of_transformers")

SMALL = QUICK._replace(steps=(4, 4), batch=(2, 2), held_out=3)
NAMES = ("rules", "text and images")


def ended(*nats: float, dense: float = 2.0) -> Run:
    """A way of two seeds that ends so far above the dense model's 2 nats; .1 above that before."""
    end = dense + np.array(nats)
    return Run(1e-3, {1e-3: 2.0}, np.stack([end + 0.2, end + 0.1, end]), np.stack([end, end]), 9)


def found(**changed: Run) -> dict:
    """A dense model, and ways that gain; the same on both tasks but for the first."""
    ways = {"dense": ended(0.0, 0.0), "FFN": ended(-0.2, -0.3), "norms": ended(0.0, 0.0)}
    ways["all"] = ended(-0.3, -0.3)
    return {NAMES[0]: ways | changed, NAMES[1]: ways}


def tasks() -> list[Task]:
    """What of tasks the claims ask."""
    return [Task(name, None, 0, 8, None, None, None, None) for name in NAMES]


def held(claims) -> list[bool]:
    """Which claims hold."""
    return [claim.holds for claim in claims]


def test_a_gain_is_one_of_every_seed_and_mark():
    assert held(study.speed_claims(found(), tasks())) == [True] * 4
    one = ended(-0.3, 0.01)
    assert held(study.speed_claims(found(all=one), tasks())) == [False, False, True, True]
    early = ended(-0.3, -0.3)
    early.nats[0, 1] = 2.3
    assert held(study.speed_claims(found(all=early), tasks())) == [False, True, True, True]
    late = ended(-0.07, -0.085)  # at three quarters 2.03 and 2.015, of 2.02 that are accepted
    assert held(study.speed_claims(found(all=late), tasks())) == [True, False, True, True]


def test_parts_may_be_a_hundredth_worse_and_the_ffn_s_share_is_of_means():
    assert held(study.part_claims(found())) == [True] * 4
    assert held(study.part_claims(found(norms=ended(0.009, -0.5))))[0] is True
    assert held(study.part_claims(found(norms=ended(0.011, -0.5))))[0] is False
    assert held(study.part_claims(found(FFN=ended(-0.14, -0.15))))[1] is False
    assert held(study.part_claims(found(FFN=ended(-0.15, -0.16))))[1] is True
    none = study.part_claims(found(FFN=ended(0.1, 0.1), all=ended(0.1, 0.1)))[1]
    assert not none.holds and "there is no gain" in none.ours


def test_images_gain_in_every_seed():
    assert held(study.kind_claims(found())) == [True]
    worse = found()
    worse[NAMES[1]] = worse[NAMES[1]] | {"all": ended(-0.3, 0.1)}
    assert held(study.kind_claims(worse)) == [False]


def test_what_is_exact_has_limits():
    good = Exact(1e-7, (1e-6, 1e-6), 1.01, 1.0, 2.0)
    assert held(study.exact_claims(good)) == [True] * 3
    assert held(study.exact_claims(good._replace(tied=2e-6)))[0] is False
    assert held(study.exact_claims(good._replace(ways=(1e-6, 2e-5))))[1] is False
    for wrong in ({"work": 1.03}, {"closed": 0.97}, {"size": 1.9}):
        assert held(study.exact_claims(good._replace(**wrong)))[2] is False


def test_nats_are_of_the_kind_of_the_token_that_is_predicted():
    model, rows = tiny(), batches()[0]
    nats = measure.by_kind(model, rows, 40)
    each = optax.softmax_cross_entropy_with_integer_labels(model(rows[:, :-1]), rows[:, 1:])
    is_second = np.asarray(rows[:, 1:]) >= 40
    assert 0 < is_second.mean() < 1
    np.testing.assert_allclose(nats["second"], np.asarray(each)[is_second].mean(), rtol=1e-5)
    np.testing.assert_allclose(nats["first"], np.asarray(each)[~is_second].mean(), rtol=1e-5)
    np.testing.assert_allclose(nats["all"], next_token(model, rows)[0], rtol=1e-5)


@pytest.fixture(scope="module")
def small():
    """Both tasks at a small size."""
    pytest.importorskip("sklearn")
    return measure.tasks(SMALL, 5)


def test_rows_that_choose_learn_and_report_are_others(small):
    rules, shown = small
    sets = [rules.batches(5)(0), rules.validation, rules.test]
    assert len({row.tobytes() for part in sets for row in part}) == sum(map(len, sets))
    images = [rows.tokens[:, 5:60].tobytes() for rows in (shown.validation, shown.test)]
    learned = shown.batches(0).digits
    assert images[0] != images[1] and len(learned.y) == 1797 - 2 * 360
    model, rows = measure.decoder(shown, "dense", 0), jax.tree.map(jnp.asarray, shown.test)
    packed = measure.by_kind(model, rows, shown.start)
    np.testing.assert_allclose(packed["all"], packed_next_token(model, rows)[0], rtol=1e-5)


def test_ways_start_as_the_dense_model_of_their_seed(small):
    rules, rows = small[0], jnp.asarray(small[0].test[:, :9])
    for seed in (0, 1):
        dense = measure.decoder(rules, "dense", seed)
        for way in ("FFN", "all"):
            np.testing.assert_allclose(
                measure.decoder(rules, way, seed)(rows), dense(rows), atol=1e-5
            )
    assert not equal(measure.decoder(rules, "all", 0), measure.decoder(rules, "all", 1))


def test_a_rate_is_chosen_by_validation_rows_and_kept_for_all_seeds(small, monkeypatch):
    asked = []

    def learned(task, way, rates, seeds):
        asked.append((way, list(rates), list(seeds)))
        best = [abs(rate - 0.3) for rate in rates]
        return {
            "validation": np.array([[0.0] * len(rates)] * 2 + [best]),
            "test": np.array([seeds] * 3, float) + np.array([[9.0], [8.0], [7.0]]),
            **{kind: np.array([seeds] * 3, float) for kind in measure.KINDS},
        }

    monkeypatch.setattr(measure, "learned", learned)
    sizes = SMALL._replace(rates=(0.1, 0.3, 0.9), seeds=3)
    reached = measure.run_of(small[0], "all", sizes, 4)
    assert asked == [("all", [0.1, 0.3, 0.9], [4] * 3), ("all", [0.3, 0.3], [5, 6])]
    assert reached.rate == 0.3 and reached.nats[-1].tolist() == [11, 12, 13]
    assert reached.kinds.tolist() == [[4, 5, 6]] * 2
    dense = measure.decoder(small[0], "dense", 4)
    assert reached.parameters > 1.9 * sum(x.size for x in jax.tree.leaves(dense.layers))


@pytest.mark.slow
def test_runs_side_by_side_learn_at_their_own_rates(small):
    shown = small[1]
    found = measure.learned(shown, "all", [1e-8, 2e-2], [0, 0])
    assert {name: x.shape for name, x in found.items()} == dict.fromkeys(
        ("validation", "test", *measure.KINDS), (3, 2)
    )
    still, moved = found["test"].T
    assert abs(still[0] - still[-1]) < 1e-3 < moved[0] - moved[-1], "after 2, 3 and 4 steps"
