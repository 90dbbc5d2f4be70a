"""The study of structured FFNs: claims are decided by all figures; its loop drops guides."""

import importlib

import numpy as np
import pytest

from ffnlab.bench.structured import Structured
from ffnlab.models.account import flops_per_token
from ffnlab.structure.structured_ffn import FORMS
from ffnlab.studies import structured_ffn_measure as measure
from ffnlab.studies.structured_ffn_measure import QUICK, WAYS, Exact, Run, Way

study = importlib.import_module("ffnlab.studies.structured_ffn")


def ended(*nats: float, flops: float = 1.0, early: float = 2.0, dropped: float = 0.0) -> Run:
    """A way of two seeds."""
    end = np.array(nats)
    return Run(4e-3, {4e-3: 2.0}, end * 0 + early, end, 9, flops, 0.5, dropped)


def found(**changed: Run) -> dict[str, Run]:
    """Figures as the paper has them."""
    ways = {
        "dense": ended(1.5, 1.5),
        **{f"{form} 63": ended(1.6 + i / 50, 1.6) for i, form in enumerate(FORMS)},
        **{f"{form} 32": ended(1.8 + i / 50, 1.8) for i, form in enumerate(FORMS)},
        **{f"{form} 32, guided": ended(1.7, 1.7) for form in FORMS},
        "low_rank 32, gaussian": ended(1.9, 1.9, early=2.2),
        "low_rank 32, equal FLOPs": ended(1.75, 1.75),
        "low_rank 32, guided, equal FLOPs": ended(1.65, 1.65),
    }
    assert set(ways) == set(WAYS)
    return ways | changed


def held(claims) -> list[bool]:
    """Which claims hold."""
    return [claim.holds for claim in claims]


def test_the_loss_rises_as_ffns_shrink():
    assert held(study.size_claims(found())) == [True]
    for wrong in ({"dense": ended(1.7, 1.7)}, {"low_rank 63": ended(1.9, 1.8)}):
        assert held(study.size_claims(found(**wrong))) == [False]


def test_low_rank_is_the_least_of_the_forms():
    assert held(study.form_claims(found())) == [True, True]
    assert held(study.form_claims(found(**{"block_dense 63": ended(1.5, 1.6)}))) == [False, True]
    assert held(study.form_claims(found(**{"low_rank 32": ended(1.9, 1.9)}))) == [True, False]
    few = {way: run for way, run in found().items() if not way.startswith("block")}
    assert study.form_claims(few) == []


def test_a_guide_gains_in_the_mean():
    assert held(study.guide_claims(found())) == [True] * 3
    one = found(**{"low_rank 32, guided": ended(1.85, 1.70)})
    assert held(study.guide_claims(one)) == [True] * 3, "mean over seeds"
    none = found(**{"low_rank 32, guided": ended(1.85, 1.80)})
    claims = study.guide_claims(none)
    assert held(claims) == [False, True, True] and "gain -0.025" in claims[0].ours


def test_flops_are_equal_and_gaps_compared():
    way = "low_rank 32, guided, equal FLOPs"
    assert held(study.equal_claims(found())) == [True, True]
    dear = found(**{way: ended(1.65, 1.65, flops=1.1)})
    assert held(study.equal_claims(dear)) == [False, True]
    assert held(study.equal_claims(found(**{way: ended(1.81, 1.81)}))) == [False, False]
    assert held(study.equal_claims(found(**{way: ended(1.76, 1.76)}))) == [True, False]
    assert study.equal_claims({"dense": ended(1.5, 1.5)}) == []


def test_starts_are_compared_early():
    assert held(study.start_claims(found(), 200)) == [True]
    slow = found(**{"low_rank 32": ended(1.8, 1.8, early=2.3)})
    assert held(study.start_claims(slow, 200)) == [False]


def test_what_is_exact_has_limits():
    good = Exact(1e-6, 0.0, (1e-6, 0.0), 1e-6, 0.52)
    assert held(study.exact_claims(good, found())) == [True] * 4
    for i, wrong in (
        (0, {"products": 2e-5}),
        (0, {"numbers": 0.01}),
        (1, {"merged": (2e-5, 0.0)}),
        (1, {"merged": (1e-6, 1e-9)}),
        (2, {"guided": 2e-5}),
        (3, {"rate": 0.44}),
        (3, {"rate": 0.56}),
    ):
        assert held(study.exact_claims(good._replace(**wrong), found()))[i] is False
    late = found(**{"block_dense 32, guided": ended(1.7, 1.7, dropped=1e-9)})
    assert held(study.exact_claims(good, late)) == [True, True, False, True]


def test_speeds_have_limits():
    names = [f"{form} {percent}" for form in FORMS for percent in (63, 32)]
    rows = {form: {1: 1.2, 8: 0.9} for form in FORMS}

    def made(low=2.5, crossover=8):
        ratios = dict.fromkeys(names, 1.5) | {"low_rank 32": low}
        return Structured({}, ratios, rows, dict.fromkeys(FORMS, crossover), "")

    assert held(study.speed_claims(made(), 64)) == [True, True, True]
    assert held(study.speed_claims(made(low=1.9), 64)) == [True, False, True]
    assert held(study.speed_claims(made(crossover=1), 64)) == [True, True, False]
    assert held(study.speed_claims(made(crossover=None), 64)) == [True, True, True]


def test_equal_flops_are_counted():
    dense = flops_per_token(measure.abstract(Way()), measure.CONTEXT)
    total, guides, work = measure.plan_of(WAYS["low_rank 32, guided, equal FLOPs"], 700)
    assert total == 700 + guides and work == pytest.approx(700 * dense, rel=0.002)
    assert guides / 700 == pytest.approx(0.3, abs=0.03), "the paper guides .30 of the steps"
    total, guides, work = measure.plan_of(WAYS["low_rank 32, equal FLOPs"], 700)
    assert guides == 0 and work == pytest.approx(700 * dense, rel=0.002)
    assert measure.plan_of(WAYS["low_rank 32, guided"], 700)[:2] == (700, 350)
    assert measure.share_of(WAYS["low_rank 32"]) == 0.3125
    shares = [measure.share_of(WAYS[f"{form} 63"]) for form in FORMS]
    assert max(abs(share - 0.625) for share in shares) < 0.02


@pytest.mark.slow
def test_a_guided_run_is_two_runs():
    sizes = QUICK._replace(steps=8, early=2, held_out=4)
    text = measure.texts(sizes, 0)
    way = WAYS["low_rank 32, guided"]
    run = measure.run_of(way, sizes._replace(seeds=2), text, 0)
    assert run.nats.shape == (2,) and np.isfinite(run.nats).all() and run.dropped == 0
    assert run.steps == 8 and list(run.tried) == list(sizes.rates)
