"""The study of safety: how its claims are decided."""

import importlib

import numpy as np
import pytest

from ffnlab.analysis import Verdict

study = importlib.import_module("ffnlab.studies.safety_verification")

SAFE, UNKNOWN = Verdict("safe", 0, proof="bounds"), Verdict("unknown", 0)
UNSAFE = Verdict("unsafe", 0, np.zeros(64), 1)


def found(held=4, free=3, *, unknown=0, accuracy=0.97):
    """Two seeds, five images each, of which so many are safe."""

    def of(count):
        verdicts = [SAFE] * count + [UNKNOWN] * unknown + [UNSAFE] * (5 - count - unknown)
        grids = [SAFE] * count + [UNSAFE] * (5 - count)
        return study.Found([accuracy] * 2, [grids] * 2, [grids] * 2, {0.02: [verdicts] * 2})

    return {study.HELD: of(held), study.FREE: of(free)}


def test_grids_are_decided_and_witnessed():
    assert study.found_claim(found(), 2).holds
    assert not study.found_claim(found(accuracy=0.95), 2).holds
    for verdict in (UNKNOWN, Verdict("unsafe", 0), Verdict("unsafe", 0, np.zeros(64), 0)):
        for field in ("grids", "wide"):
            bad = found()
            rows = getattr(bad[study.FREE], field)
            rows[1] = [*rows[1][:4], verdict]
            assert not study.found_claim(bad, 2).holds


def test_a_penalty_is_decided_in_every_region():
    assert study.penalty_claim(found(), 2).holds
    assert not study.penalty_claim(found(3, 3), 2).holds, "as safe is not safer"
    assert not study.penalty_claim(found(2, 3), 2).holds
    for field in ("grids", "wide", "cubes"):
        mixed = found()
        worse = {"cubes": {0.02: [[UNSAFE] * 5] * 2}}.get(field, [[UNSAFE] * 5] * 2)
        mixed[study.HELD] = mixed[study.HELD]._replace(**{field: worse})
        assert not study.penalty_claim(mixed, 2).holds


def test_cubes_are_to_be_decided():
    assert study.decided_claim(found(), 2).holds
    assert not study.decided_claim(found(unknown=1), 2).holds


def test_no_verdict_may_be_against_the_program():
    assert study.agreement_claim(study.Agreement(9, 5, 0, 2)).holds
    assert not study.agreement_claim(study.Agreement(9, 5, 1, 0)).holds


def test_rounded_weights_are_decided_by_proof_and_by_points():
    good = study.Rounded(0.6, np.array([1.0, 2.0]), np.array([0.5, 1.0]))
    assert study.rounded_claim(good).holds
    assert not study.rounded_claim(good._replace(same=0.4)).holds
    assert not study.rounded_claim(good._replace(seen=np.array([0.5, 2.1]))).holds


def test_pixels_are_those_furthest_from_the_mean():
    image = np.array([0.0, 1.0, 0.5, 0.5, 0.5, 0.9, 0.4, 0.1])
    assert study.furthest(image) == [1, 0, 5, 7, 6]


def test_small_networks_agree_with_the_program():
    agreed = study.agreement(6, 0)
    assert agreed.asked == 6 and agreed.wrong == 0 and 0 < agreed.safe <= 6


@pytest.mark.slow
def test_the_quick_form(tmp_path):
    result = study.run(out=tmp_path, quick=True)
    holds = {claim.claim: claim.holds for claim in result.claims}
    assert len(holds) == 5
    assert holds["what is called safe is safe, what is called unsafe is not"]
    assert {path.stem for path in tmp_path.glob("*.png")} == {"verdicts", "witnesses"}
