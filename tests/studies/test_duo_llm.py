"""The Duo-LLM study: its claims are decided by all figures; its parts train on a little text."""

import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import routing
from ffnlab.routing import BIG, OracleReport
from ffnlab.studies.result import Claim

study = importlib.import_module("ffnlab.studies.duo_llm")

PATTERNS = np.array(list(itertools.product(range(2), repeat=study.LAYERS)))
ALL_BIG = 3.0


def report(
    step: float = 0.1, gain: float = 1.0, late: float = 0.1, selection: float = 0.0
) -> OracleReport:
    """Two tokens: each big branch lowers all losses by `step`, and each token has patterns of its
    own that are `gain` lower; with two big branches they are late ones, with four early ones.

    Args:
      late: by how much, for late ones; a negative number turns both around.
      selection: by how much every big branch raises the losses again.
    """
    bigs = (PATTERNS == BIG).sum(1)
    losses = np.full((1, 2, len(PATTERNS)), ALL_BIG) + step * (study.LAYERS - bigs)
    half = study.LAYERS // 2
    in_late = (PATTERNS[:, half:] == BIG).sum(1)
    in_early = bigs - in_late
    losses -= np.where(bigs <= 2, late * in_late, late * in_early) * (bigs < study.LAYERS)
    for token in range(2):
        own = (PATTERNS[:, token] == BIG) & (bigs < 6)
        losses[0, token] -= gain * own * (7 - np.abs(bigs - 3)) / 7
    return OracleReport((losses + selection * bigs).astype(np.float32), PATTERNS)


def held(claims: list[Claim]) -> list[bool]:
    """Which claims hold."""
    return [claim.holds for claim in claims]


def test_claims_of_the_oracle_need_every_seed():
    good = report()
    assert held(study.oracle_claims([good, good], "", 0.05))[:2] == [True, True]
    bad = report(gain=0.0, late=0.0)  # then every big branch helps, and one does not beat six
    assert held(study.oracle_claims([bad], "", 0.05)) == [False, False, True]
    assert held(study.oracle_claims([good, bad], "", 0.05))[:2] == [False, False]
    worse = report(gain=0.0, late=0.0, selection=0.2)
    assert held(study.oracle_claims([worse], "", 0.05))[2] is False


def test_one_big_layer_must_win_by_the_margin():
    found = report(gain=0.85, late=0.0)
    lead = found.oracle(study.LAYERS) - found.oracle(1)
    assert held(study.oracle_claims([found], "", lead - 0.01))[0] is True
    assert held(study.oracle_claims([found], "", lead + 0.01))[0] is False


def test_branches_must_stand_for_each_other():
    plain = report(gain=0.0, late=0.0)
    assert held(study.stage_claims([plain])) == [True, True]
    worse = report(step=-0.1, gain=0.0, late=0.0)
    assert held(study.stage_claims([worse]))[0] is False
    assert held(study.stage_claims([plain, worse]))[0] is False


def test_places_are_those_of_the_oracle():
    assert held(study.place_claims([report(gain=0.0, late=0.3)])) == [True, True]
    assert held(study.place_claims([report(gain=0.0, late=-0.3)])) == [False, False]
    both = [report(gain=0.0, late=0.3), report(gain=0.0, late=-0.3)]
    assert held(study.place_claims(both)) == [False, False]


def routed(found: OracleReport, **changed: float) -> list:
    """Routers between the oracle and the mean, but for one."""
    budgets = range(1, study.LAYERS)
    made = [study.Routed(b, float(b), (found.oracle(b) + found.mean(b)) / 2) for b in budgets]
    made[2] = made[2]._replace(**changed)
    return made


def test_every_router_counts():
    found = report()
    assert held(study.router_claims([found], [routed(found)])) == [True, True, True]
    for i, changed in enumerate(
        ({"big": 3.4}, {"nats": found.oracle(3) - 0.01}, {"nats": found.mean(3) + 0.01})
    ):
        claims = held(study.router_claims([found], [routed(found, **changed)]))
        assert claims[i] is False and claims.count(True) == 2


def test_a_violated_inequality_is_seen():
    found = report()
    assert held(study.logical_claims([found])) == [True]
    object.__setattr__(found, "oracle", lambda budget=None: 9.0)
    assert held(study.logical_claims([found])) == [False]


@pytest.mark.slow
def test_members_learn_as_seeds_of_their_own(monkeypatch):
    """Two seeds side by side are the two models, each drawn by its seed, after a few steps."""
    small = {"layers": 2, "width": 8, "hidden": 16, "heads": 1, "kv_heads": 1, "head_dim": 8}
    monkeypatch.setattr(study, "CONFIG", study.dataclasses.replace(study.CONFIG, **small))
    monkeypatch.setattr(study, "BATCH", 2)
    monkeypatch.setattr(study, "LENGTH", 6)
    monkeypatch.setattr(study, "LAYERS", 2)
    text = bytes(range(97, 123)) * 20
    found = study.trained([3, 4], text, 3)
    assert len(found) == 2
    starts = [study.duo_of(study.CONFIG, seed) for seed in (3, 4)]
    for model, start in zip(found, starts, strict=True):
        moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), model, start)
        sizes = [float(x) for x in jax.tree.leaves(moved)]
        assert 0 < max(sizes) < 0.05, "three small steps away from its own start"
    held_out = jnp.asarray(np.frombuffer(text[: 4 * 7], np.uint8).reshape(4, 7), jnp.int32)
    (one,) = study.routers(found[0], text, held_out, 2, 0)
    losses = routing.oracle()(found[0], [held_out], progress=False)
    assert one.budget == 1 and 0 < one.big < 2
    assert losses.oracle() < one.nats == pytest.approx(losses.mean(), rel=0.2)
