"""The study of Robust QA: its toys, how sides are chosen, and when a claim holds."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.layers import MoE
from ffnlab.studies import robust_qa_measure as measure
from ffnlab.studies import robust_qa_minilm as minilm
from ffnlab.studies import robust_qa_tasks as tasks
from ffnlab.testing import tiny_encoder

study = importlib.import_module("ffnlab.studies.robust_qa_moe")


def test_each_cluster_has_a_map_of_its_own():
    task = tasks.Regression(3)
    x, y = task.draw(np.random.default_rng(0), 500)
    by_cluster = np.tanh(np.einsum("nd,cde->nce", x, task.maps))
    off = np.abs(by_cluster - y[:, None]).max(-1)
    assert (off.min(1) < 1e-5).all() and set(off.argmin(1)) == set(range(tasks.CLUSTERS))


def test_an_answer_is_what_stands_between_its_marker_and_the_next_stop():
    inputs, ends = tasks.span_draw(np.random.default_rng(1), 200, (0, 2))
    for row, (first, last) in zip(inputs["tokens"], ends, strict=True):
        asked = row.tolist().index(tasks.ASKED)
        assert first == asked + 1 and row[last + 1 :].tolist().index(tasks.STOP) == 0
        assert (row[first : last + 1] >= tasks.FIRST_WORD).all()
        domain = {(int(t) - tasks.FIRST_WORD) // tasks.WORDS for t in row if t >= tasks.FIRST_WORD}
        assert len(domain) == 1 and domain < {0, 2}


def test_f1_of_places_is_the_loop():
    random = np.random.default_rng(2)
    logits = random.normal(size=(20, 6, 2)).astype(np.float32)
    ends = np.sort(random.integers(6, size=(20, 2)), axis=1)
    expected = []
    for each, (a, b) in zip(logits, ends, strict=True):
        pairs = [(s, e) for s in range(6) for e in range(s, 6)]
        s, e = max(pairs, key=lambda p: float(each[p[0], 0]) + float(each[p[1], 1]))
        found, right = set(range(s, e + 1)), set(range(a, b + 1))
        expected.append(2 * len(found & right) / (len(found) + len(right)))
    assert tasks.token_f1(logits, ends) == pytest.approx(np.mean(expected))


def test_the_side_with_the_best_validation_score_is_taken_on():
    task = tasks.Regression(0)
    batches = lambda i: task.draw(np.random.default_rng([3, i]), 32)  # noqa: E731
    asked = []

    def score(model):
        asked.append(model)
        return -float(len(asked))  # the first rate is the best

    loss = tasks.balanced(0.1)
    options = {"steps": 10, "rates": (1e-3, 1e-1), "seeds": (0, 1), "score": score}
    found = measure.learned(tasks.mixture(2), loss, batches, **options)
    assert found.rate == 1e-3 and found.rates == {1e-3: -1.0, 1e-1: -2.0}
    assert len(found.models) == 2 and all(isinstance(m, MoE) for m in found.models)
    leaves = [jax.tree.leaves(m) for m in (found.models[0], asked[0])]
    for one, other in zip(*leaves, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", [measure.TOP2, measure.SWITCH])
def test_a_head_behind_frozen_states_is_the_one_on_the_whole_model(name):
    encoder = tiny_encoder(head=None)
    head = measure.DESIGNS[name].make(experts=2, hidden=8)(seed=1)
    tail = minilm.behind(encoder, head)
    tokens = jnp.arange(24).reshape(2, 12)
    valid = jnp.arange(12) < jnp.array([[12], [7]])
    whole = minilm.joined(encoder, head, tail)
    states = encoder.hidden(tokens, valid=valid)
    np.testing.assert_allclose(
        tail(embeddings=states, valid=valid), whole(tokens, valid=valid), atol=1e-5
    )


def test_when_a_claim_holds():
    assert study.is_not_below([0.5, 0.5], [0.5, 0.6]) and not study.is_not_below([0.49], [0.5])
    learned = measure.Learned({}, 3e-3, [])
    good = {0.1: [1.0, 1.01]}, {0.1: [0.26, 0.3]}
    maps = study.Maps([0.2, 0.2], [0.1, 0.15], *good, {"dense": learned})
    assert [claim.holds for claim in study.map_claims(maps, quick=True)] == [True, True]
    worse = maps._replace(switch=[0.1, 0.16], shares={0.1: [0.26, 0.31]})
    assert [claim.holds for claim in study.map_claims(worse, quick=True)] == [False, False]
    uneven = maps._replace(balance={0.1: [1.0, 1.03]})
    assert [claim.holds for claim in study.map_claims(uneven, quick=True)] == [True, False]
    real = {"frozen": {n: [(0.1, f1)] for n, f1 in (("dense", 0.2), ("top-2", 0.3))}}
    real["frozen"]["Switch"] = [(0.0, 0.1)]
    claims = study.real_claims(real)
    assert [claim.holds for claim in claims] == [True, False]
    assert "one seed" in claims[0].evidence
