"""Early stopping inside a state: against the plain loop that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab.errors import ConfigError
from ffnlab.layers import MLP
from ffnlab.learning import backprop, early_stopping, labelled
from ffnlab.learning.stopping import kept, noted, unwatched
from ffnlab.testing import equal

Scores = st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0, np.nan])), max_size=12)


@jax.jit
def after(scores, is_asked):
    """(how long the best is ago, which step is kept, the best) of twelve steps."""

    def step(carry, at):
        watch, best = carry
        i, score, asked = at
        watch, is_best = noted(watch, score, asked)
        return (watch, kept(is_best, i, best)), None

    start = unwatched(), jnp.int32(-1)
    steps = jnp.arange(12), scores, is_asked
    (watch, best), _ = jax.lax.scan(step, start, steps)
    return watch.waited, best, watch.score


@given(Scores)
def test_the_best_is_kept_and_what_came_since_counted(scores):
    """None stands for a step without a score; before the first, the newest step is kept."""
    padded = scores + [None] * (12 - len(scores))
    waited, kept_step, best = 0, -1, -np.inf
    for i, score in enumerate(padded):
        has_none = best == -np.inf
        if score is not None:
            is_higher = score > best
            waited = 0 if is_higher else waited + 1
            best = score if is_higher else best
            has_none |= is_higher
        kept_step = i if has_none else kept_step
    given_scores = jnp.array([0.0 if s is None else s for s in padded], jnp.float32)
    found = after(given_scores, jnp.array([s is not None for s in padded]))
    assert (int(found[0]), int(found[1]), float(found[2])) == (waited, kept_step, best)


def test_a_rule_rests_at_its_best(key):
    """Weights grow while it learns, and are best, as the score has it, when they have some size."""
    random = np.random.default_rng(0)
    x, y = jnp.asarray(random.normal(size=(6, 3)), jnp.float32), jnp.asarray([0, 1, 0, 1, 1, 0])
    size = lambda model: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(model))  # noqa: E731
    model = MLP((3, 8, 2), key=key)
    target = size(model) + 1.0
    inner = backprop(labelled, optax.sgd(0.5))
    score = lambda model, batch: -((size(model) - target) ** 2)  # noqa: E731
    rule = early_stopping(inner, score, every=2, patience=3)
    state, plain = rule.init(model, key), inner.init(model, key)
    scores, models = [], []
    while len(scores) - 1 - int(np.argmax(scores or [0])) < 3:
        for _ in range(2):
            state, metrics = rule.step(state, (x, y))
            plain, _ = inner.step(plain, (x, y))
        scores.append(float(score(plain.model, None)))
        models.append(jax.tree.map(jnp.copy, plain.model))
        assert len(scores) < 60
    best = int(np.argmax(scores))
    assert best > 0 and int(state.taken) == 2 * len(scores) and float(metrics["loss"]) > 0
    at_rest = jax.tree.map(jnp.copy, state)
    state, metrics = rule.step(state, (x, y))
    assert equal(state, at_rest) and float(metrics["loss"]) == 0
    for a, b in zip(jax.tree.leaves(rule.model(state)), jax.tree.leaves(models[best]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert float(metrics["score"]) == pytest.approx(scores[best], rel=1e-3, abs=1e-6)
    np.testing.assert_allclose(rule.predict(state, x), models[best](x), rtol=1e-5, atol=1e-5)


def test_numbers_below_one_are_refused():
    for given_numbers, said in (({"every": 0}, "every=0"), ({"patience": 0}, "patience=0")):
        with pytest.raises(ConfigError, match=said):
            early_stopping(backprop(labelled), lambda model, batch: 0.0, **given_numbers)
