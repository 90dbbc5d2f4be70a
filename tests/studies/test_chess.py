"""The CHESS study: its measurements on drawn FFNs and tiny models, and the study as a whole."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from ffnlab import models
from ffnlab.bench import sparse as bench
from ffnlab.studies import chess_measure as measure
from ffnlab.studies.chess_measure import Errors, Point, Speed

study = importlib.import_module("ffnlab.studies.chess")

ONE_BLOCK = models.DecoderConfig(
    vocab=64, width=16, hidden=32, layers=1, heads=4, kv_heads=2, head_dim=4
)


@pytest.mark.parametrize("seed", [0, 1])
def test_drawn_errors_are_the_cards_second_point(seed):
    for spread, allowed in study.ALLOWED.items():
        found = measure.drawn_errors(jax.random.key(seed), spread)
        assert 0.95 * found.oracle <= min(found.abs, found.sq)
        assert max(found.abs, found.sq) <= allowed * found.cats
        assert 0.025 < found.cats < 0.05  # the card's runs: .031 to .035


def test_one_point_of_the_sweep(key):
    model = models.stack(models.Decoder(ONE_BLOCK, key=key))
    draw = lambda n, m: np.asarray(jax.random.randint(key, (n, m), 0, 64))  # noqa: E731
    seen, rows = [draw(4, 32)], draw(18, 25)
    p = measure.measured(model, seen, rows, "CATS", 0.5, attention=False, sites=False)
    assert p.ffn.shape == (18,) and p.both is None and not p.site_zeros
    assert p.deviation <= 0.05 and len(p.zeros) == 1 and np.isnan(p.spread)


def test_spread_is_of_the_scale_in_both_versions():
    scales = np.exp(np.random.default_rng(0).normal(0, 0.3, 1000))
    assert measure.spread_of({"a": scales}, "ABS") == pytest.approx(0.3, rel=0.1)
    assert measure.spread_of({"a": scales**2}, "SQ") == pytest.approx(0.3, rel=0.1)


@pytest.mark.slow
def test_decoding_is_timed_against_the_dense_model():
    (found,) = measure.decode_speeds(ONE_BLOCK, (0.5,), tokens=4, turns=1, seed=0)
    assert found.ratio == found.dense / found.sparse > 0
    assert 0.2 < found.zeros < 0.8


def drawn_measurements(*, sites: bool):
    """A Measured as a run would give it, from a random generator."""
    random = np.random.default_rng(0)
    dense = 1 + random.random(6)

    def point(rule, k):
        cost = 0.01 * k * (1.0 if rule == "CATS" else 0.5)
        both = dense + 1.5 * cost if rule == "SQ" else None
        moved = {"layers[0].attn.o": k + 0.05} if sites and rule == "SQ" else {}
        return Point(rule, k, dense + cost, both, {"layers[0].ffn": k + 0.01}, moved, 0.3)

    levels = tuple(
        bench.Level(k, 1e-3, r) for k, r in ((0.0, 0.9), (0.5, 1.1), (0.7, 1.4), (0.9, 2.2))
    )
    return study.Measured(
        errors=[
            Errors(0.0, 0.034, 0.033, 0.033, 0.007),
            Errors(0.5, 0.034, 0.016, 0.016, 0.004),
            Errors(1.0, 0.033, 0.002, 0.002, 0.0007),
        ],
        dense=dense,
        points=[point(rule, k) for rule in measure.RULES for k in study.SPARSITIES],
        layer=bench.Comparison(levels, {"plain": 2e-3, "fused": 1e-3}, "float32"),
        speeds=[Speed(0.5, 0.49, 0.02, 0.018, 1.11)],
    )


@pytest.mark.parametrize("sites", [False, True])
def test_claims_rows_and_pictures_follow_the_measurements(sites):
    found = drawn_measurements(sites=sites)
    claims = [*study.threshold_claims(found), *study.loss_claims(found), *study.speed_claims(found)]
    misses = [claim.claim for claim in claims if not claim.holds]
    assert len(claims) == 8 + sites
    assert misses == (
        ["so do those of attention sites, with every site of a model sparsified"] * sites
    )
    assert len(study.rows_of(found)) == 9 + 4 + 1
    for draw in (study.draw_losses, study.draw_errors, study.draw_speed):
        figure = Figure()
        draw(figure, found)
        assert figure.axes


def with_point(found, rule, sparsity, **changes):
    """The same measurements, but for one point of the sweep."""
    points = [
        p._replace(**changes) if (p.rule, p.sparsity) == (rule, sparsity) else p
        for p in found.points
    ]
    return found._replace(points=points)


@pytest.mark.parametrize("sparsity", study.SPARSITIES)
@pytest.mark.parametrize("rule", ["ABS", "SQ"])
def test_losses_are_decided_at_every_sparsity_for_both_versions(rule, sparsity):
    found = drawn_measurements(sites=False)
    cats = 0.01 * sparsity
    for cost, expected in ((1.01, [False, False]), (0.95, [True, False]), (0.89, [True, True])):
        worse = with_point(found, rule, sparsity, ffn=found.dense + cost * cats)
        assert [claim.holds for claim in study.loss_claims(worse)[:2]] == expected


@pytest.mark.parametrize("sparsity", study.SPARSITIES)
def test_attention_sites_are_decided_at_every_sparsity(sparsity):
    found = drawn_measurements(sites=False)
    cats = 0.01 * sparsity  # the FFNs alone add half of it
    for cost, expected in ((1.6, [False, False]), (1.1, [True, False]), (0.9, [True, True])):
        worse = with_point(found, "SQ", sparsity, both=found.dense + cost * cats)
        assert [claim.holds for claim in study.loss_claims(worse)[2:]] == expected


def test_speeds_are_decided_at_every_sparsity():
    found = drawn_measurements(sites=False)
    for i in range(4):
        levels = list(found.layer.levels)
        levels[i] = bench.Level(levels[i].sparsity, 1e-3, 0.9 if i < 2 else 1.05)
        slow = found._replace(layer=dataclasses.replace(found.layer, levels=tuple(levels)))
        assert [claim.holds for claim in study.speed_claims(slow)] == [True, i < 2]
    slow = found._replace(speeds=[*found.speeds, Speed(0.7, 0.69, 0.02, 0.02, 1.0)])
    assert [claim.holds for claim in study.speed_claims(slow)] == [False, True]
