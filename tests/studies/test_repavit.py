"""The RePaViT study: claims are decided by all widths and seeds; what a fold gives."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import tree
from ffnlab.layers import BatchNorm
from tuned import assert_tuned, cases, with_scores

study = importlib.import_module("ffnlab.studies.repavit")
PLAIN, FOLDED = study.PLAIN, study.FOLDED
NAMES = (PLAIN, "idle 0", "idle 0.5", "idle 0.75", "idle 1", FOLDED)


def forms(*scores):
    return {name: [score, score] for name, score in zip(NAMES, scores, strict=True)}


def held(found):
    return [claim.holds for claim in study.accuracy_claims(found)]


def test_claims_are_decided_by_every_width():
    found = cases(narrow=forms(0.96, 0.95, 0.95, 0.94, 0.9, 0.93))
    found |= cases(wide=forms(0.97, 0.97, 0.96, 0.96, 0.93, 0.95))
    assert held(found) == [True] * 4
    first, mild, gap, direct = study.accuracy_claims(found)
    assert_tuned(first, "idle 0.5", "idle 1")
    assert_tuned(mild, "idle 0", "idle 0.5", "idle 0.75")
    assert_tuned(gap, PLAIN, "idle 0.75")
    assert_tuned(direct, "idle 0.75", FOLDED)
    assert "0.020 at narrow, 0.010 at wide" in gap.evidence
    for case, side, score, index in (
        ("narrow", "idle 1", 0.94, 0),
        ("wide", "idle 1", 0.95, 0),
        ("wide", "idle 0.75", 0.94, 1),
        ("narrow", "idle 0.5", 0.92, 1),
        ("wide", PLAIN, 0.99, 2),
        ("narrow", FOLDED, 0.94, 3),
    ):
        assert held(with_scores(found, case, side, [score] * 2))[index] is False, (case, side)


def test_without_three_quarters_there_is_one_claim():
    found = {"narrow": dict(cases(a=forms(*[0.9] * 6))["a"])}
    del found["narrow"]["idle 0.75"]
    assert len(study.accuracy_claims(found)) == 1


def test_all_sides_try_as_many_rates_from_the_same_network():
    sizes = study.Sizes((8,), (0.5, 0.75), (1e-3, 1e-2), 20, (0,))
    sides = study.sides(8, sizes)
    assert [side.name for side in sides] == [PLAIN, "idle 0.5", "idle 0.75", FOLDED]
    assert {tuple(s["rate"] for s in side.grid) for side in sides} == {(1e-3, 1e-2)}
    plain, half, _, bare = (side.model(3) for side in sides)
    same = lambda a, b: np.testing.assert_array_equal(a.weight.dense(), b.weight.dense())  # noqa: E731
    same(plain.layers[1].ffn.up, half.layers[1].ffn.up)
    same(plain.head, bare.head)
    assert bare.layers[0].ffn_norm is None and half.layers[0].ffn.active == 16


def test_a_fold_is_measured_on_what_was_learned():
    model = study.repaired(8, 0.75, 0)
    model = tree.map_at(
        model,
        tree.of_type(BatchNorm),
        lambda norm: norm.with_statistics(norm.mean[...] + 0.3, norm.variance[...] * 2),
    )
    x = np.asarray(jax.random.uniform(jax.random.key(0), (5, 8, 8, 1)), np.float32)
    error, changed = study.folding_error(model, x)
    assert 0 < error < 1e-5 and changed == 0
    assert study.ratio_of(0.75) == pytest.approx(0.375, abs=1e-6)
    assert jnp.ndim(study.plain(8, 0)(x)) == 2


def test_speed_is_judged_against_the_form_before_the_fold():
    fast, slow = (
        study.speed_claim({"unfolded": r, "plain": p}) for r, p in ((0.9, 1.2), (1.1, 0.9))
    )
    assert fast.holds and not slow.holds and fast.timed and "1.20 of the plain" in fast.ours
