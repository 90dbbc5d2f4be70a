"""The study of linear interpreters: how its claims are decided, and what it measures."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.layers import MLP
from ffnlab.studies import linear_interpreter_measure as measures
from ffnlab.weights import Dense

study = importlib.import_module("ffnlab.studies.linear_interpreter")

GOOD = {name: measures.Exact(1e-12, 1e-13, 1e-12, 0.2) for name in measures.NETS}
GOOD |= {name: measures.Exact(1e-12, 1e-13, 1e-12, 0.0) for name in measures.PIECEWISE}
REMOVED = {"most votes": 0.9, "brightest": 0.5, "any lit": 0.2}
VOTED = measures.Voted(0.97, 1e-6, 0.6, 0.3, 0.7, REMOVED)


def read(**drops):
    given = {"most votes": 2.0, "last": 1.5, "any": 0.1} | drops
    drops = {name: np.full(3, drop) for name, drop in given.items()}
    ids = np.full((3, measures.LENGTH), 97)
    votes = np.linspace(-1, 1, ids.size).reshape(ids.shape)
    return measures.Bytes(ids, ids[:, 0], votes, np.zeros(3), 1e-5, drops)


def test_exactness_is_decided_by_every_network():
    assert [c.holds for c in study.exact_claims(GOOD)] == [True, True]
    for name in measures.NETS:
        for field in ("here", "affine", "transposed"):
            bad = GOOD | {name: GOOD[name]._replace(**{field: 2e-4})}
            assert [c.holds for c in study.exact_claims(bad)] == [False, True]
        is_rounded = GOOD | {name: GOOD[name]._replace(here=1e-6)}
        assert study.exact_claims(is_rounded)[0].holds == (name == "decoder")
        other = 1e-9 if name in measures.PIECEWISE else 0.0
        bad = GOOD | {name: GOOD[name]._replace(jacobian=other)}
        assert [c.holds for c in study.exact_claims(bad)] == [True, False]


def test_votes_are_decided_by_every_seed():
    held = lambda *found: [c.holds for c in study.vote_claims(found, None)]  # noqa: E731
    assert held(VOTED, VOTED) == [True] * 3
    assert held(VOTED, VOTED._replace(rebuilt=1e-4)) == [False, True, True]
    assert held(VOTED, VOTED._replace(accuracy=0.94)) == [False, True, True]
    assert held(VOTED, VOTED._replace(share=0.4)) == [True, False, True]
    assert held(VOTED, VOTED._replace(changed=0.4)) == [True, False, True]
    for name in ("brightest", "any lit"):
        assert held(VOTED, VOTED._replace(removed=REMOVED | {name: 0.9})) == [True, True, False]
    assert study.copy_claim([0.6, 0.7]).holds and not study.copy_claim([0.6, 0.4]).holds


def test_bytes_are_decided_by_both_rivals():
    assert [c.holds for c in study.byte_claims(read())] == [True, True]
    for name in ("last", "any"):
        assert [c.holds for c in study.byte_claims(read(**{name: 2.5}))] == [True, False]


def test_what_votes_say_of_a_linear_network(monkeypatch):
    """One map and a constant: everything is known."""
    net = MLP((4, 2), key=jax.random.key(0))
    net.maps[0] = net.maps[0].replace(Dense(jnp.eye(4, 2)))
    net.maps[0].b[...] = jnp.array([0.0, 1.5])
    images = jnp.array([[1.0, 0, 0.5, 0], [3.0, 1, 0, 0]])
    key = jax.random.key(1)
    monkeypatch.setattr(measures, "REMOVED", 1)
    found = measures.voted(net, images, jnp.array([1, 0]), key)
    assert float(found.accuracy) == 1 and float(found.rebuilt) < 1e-6
    assert float(found.share) == pytest.approx((1 + 0) / 2), "1.5 of 1.5, and 0 of 3"
    assert float(found.changed) == 0.5 and float(found.without) == 0.5
    assert float(found.removed["most votes"]) == 0.5, "without its 3 the second is of class 1"


def test_a_row_of_an_identity_lies_near():
    """A denoiser that passes everything on has all of each row on its own pixel."""

    def net(images):
        return images + 0.5

    around, leading = measures.bases.__wrapped__(net, jnp.ones((8, 8, 1)), jax.random.key(0))
    assert float(around) == 1 and leading.shape == (8, 8, 8)
    spread = lambda images: jnp.ones_like(images) * images.mean()  # noqa: E731
    around, _ = measures.bases.__wrapped__(spread, jnp.ones((8, 8, 1)), jax.random.key(0))
    assert float(around) == pytest.approx((36 * 9 + 24 * 6 + 4 * 4) / 64**2)


@pytest.mark.slow
def test_the_quick_form(tmp_path):
    result = study.run(out=tmp_path, quick=True)
    holds = {claim.claim: claim.holds for claim in result.claims}
    assert len(holds) == 8 and sum(holds.values()) >= 7
    assert not holds["classifiers lean heavily on their constants"]
    assert {path.stem for path in tmp_path.glob("*.png")} == {"digits", "bytes", "bases"}
