"""Step 1: against a loop over single facts without padding; its balls, its masks, its options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from edited_models import FACTS, LENGTH, Row, padded, passed, rows_of, seen_of, small
from ffnlab import tree
from ffnlab.editing import Fact
from ffnlab.editing.requests import Requests, requests
from ffnlab.editing.vectors import Found, Steps, find
from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer
from ffnlab.layers import EnsembleScale
from ffnlab.models.paths import with_ensemble
from ffnlab.testing import counted

BYTES, PREFIXES, LAYER = Tokenizer.bytes(), ("A. ",), 1
# What the model can be made to say, and what it cannot in so few steps.
ASKED = (Fact("Al", "{}", " "), FACTS[1])
LOOSE = Steps(rate=0.3, steps=12, clamp=4.0, kl=0.1, decay=0.02)
FREE = Steps(rate=0.3, steps=12, clamp=4.0, kl=0.0, decay=0.02)
STRICT = Steps(rate=0.1, steps=4, clamp=0.05, kl=2.0, decay=0.1)
norm = lambda v: jnp.sqrt(jnp.sum(v**2) + 1e-30)  # noqa: E731


def parts_of(model, rows, stays, pair):
    """(nll, log-probabilities of the text that stays, said) of a fact with a pair of vectors."""
    losses, said = [], []
    for ids, place, labels in rows:
        logits = passed(model, ids, place, *pair, LAYER).logits
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None] % 128, 1)[:, 0]
        losses.append(-jnp.sum(picked, where=labels >= 0) / jnp.sum(labels >= 0))
        said.append(jnp.all((logits.argmax(-1) == labels) | (labels < 0)))
    ids, place, _ = stays
    now = jax.nn.log_softmax(passed(model, ids, place, *pair, LAYER).logits[place])
    return jnp.stack(losses).mean(), now, jnp.stack(said).all()


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def slopes(pair, weight, kl, decay, model, rows, stays, before, clean):
    """The loss of one fact, and its parts."""
    nll, now, said = parts_of(model, rows, stays, pair)
    divergence = jnp.sum(jnp.exp(now) * (now - before))
    size = sum(norm(v) / norm(b) ** 2 for v, b in zip(pair, clean, strict=True))
    return weight * nll + kl * divergence + decay * size, (nll, divergence, said)


def of(fact, model, options: Steps) -> tuple:
    """The loop of the authors for one fact: (delta_a, delta_m, moves, nll, divergence, said)."""
    rows = rows_of(fact, PREFIXES)
    text = [0, *f"{fact.subject} is a".encode()]
    stays = Row(padded(text), len(fact.subject), np.full(LENGTH, -1))
    first = seen_of(model, rows[0].ids)
    clean = first.attn[LAYER, rows[0].place], first.ffn[LAYER, rows[0].place]
    before = jax.nn.log_softmax(seen_of(model, text).logits[stays.place])
    given = options.kl, options.decay, model, rows, stays, before, clean
    adam, weight, moves = optax.adam(options.rate), 1.0, 0
    pair = tuple(map(jnp.zeros_like, clean))
    state = adam.init(pair)
    for step in range(options.steps):
        (total, (nll, divergence, said)), slope = slopes(pair, weight, *given)
        if total < 0.05 or (said and options.kl * divergence <= 0.01):
            break
        weight = 0.1 if said else 1.0
        if step == options.steps - 1:
            break
        change, state = adam.update(slope, state)
        pair = optax.apply_updates(pair, change)
        limits = [options.clamp * norm(v) for v in clean]
        pair = tuple(v * min(1.0, float(r / norm(v))) for v, r in zip(pair, limits, strict=True))
        moves += 1
    return *pair, moves, nll, divergence, said


@functools.cache
def found_of(options: Steps) -> Found:
    """Step 1 of all facts; one program serves all options."""
    rows = requests(ASKED, BYTES, small(), PREFIXES)
    return find(small(), rows, layer=LAYER, options=options)


@pytest.mark.parametrize("options", [LOOSE, FREE, STRICT], ids=["loose", "free", "strict"])
def test_it_is_the_loop_over_single_facts(options):
    found = found_of(options)
    ours = (*found.vectors, found.steps, found.terms.nll, found.terms.kl, found.terms.said)
    names = ("a", "m", "moves", "nll", "kl", "said")
    for i, fact in enumerate(ASKED):
        for name, mine, theirs in zip(names, ours, of(fact, small(), options), strict=True):
            close = {"rtol": 2e-3, "atol": 2e-4, "err_msg": f"{name} of {fact.new!r}"}
            np.testing.assert_allclose(mine[i], theirs, **close)


def test_each_fact_ends_by_itself():
    found = found_of(FREE)
    assert 0 < found.steps[0] < found.steps[1] == FREE.steps - 1
    assert found.terms.said.tolist() == [True, False]
    longer = found_of(LOOSE)  # it is said, but means something else: on with a tenth of the weight
    assert longer.steps[0] > found.steps[0] and longer.terms.said[0]


def test_vectors_stay_within_their_balls():
    found = found_of(STRICT)
    for vectors, before in zip(found.vectors, found.before, strict=True):
        norms = np.linalg.norm(vectors, axis=1) / np.linalg.norm(before, axis=1)
        assert norms.max() <= STRICT.clamp * (1 + 1e-6) and norms.max() > 0.99 * STRICT.clamp


def test_what_was_there_is_that_of_the_plain_prompt():
    found = found_of(STRICT)
    for i, fact in enumerate(ASKED):
        row, *_ = rows_of(fact, ())
        seen = seen_of(small(), row.ids)
        np.testing.assert_allclose(found.before.ffn[i], seen.ffn[LAYER, row.place], atol=1e-4)
        np.testing.assert_allclose(found.before.attn[i], seen.attn[LAYER, row.place], atol=1e-4)
    np.testing.assert_allclose(found.targets, found.before.ffn + found.vectors.ffn)


def test_one_vector_needs_no_attention():
    bare, options = tree.copy(small()), Steps("ffn", rate=0.1, steps=3)
    bare.layers[0] = bare.layers[0].without("attn")
    rows = requests(ASKED[1:2], BYTES, bare, ())
    found = find(bare, rows, layer=0, options=options)
    assert not np.abs(found.vectors.attn).any() and np.abs(found.vectors.ffn).min() > 0
    assert np.isfinite(found.targets).all() and found.steps.tolist() == [2]


def test_facts_share_nothing():
    rows = requests(ASKED, BYTES, small(), PREFIXES)
    others = Requests(*(x[::-1].copy() for x in rows))
    with counted() as count:
        turned = find(small(), others, layer=LAYER, options=LOOSE)
    assert count.programs == 0, "neither other facts nor other numbers compile anything"
    whole = found_of(LOOSE)
    np.testing.assert_allclose(turned.vectors.ffn[::-1], whole.vectors.ffn, rtol=1e-4, atol=1e-6)
    assert turned.steps.tolist()[::-1] == whole.steps.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("of_head", [np.ones(7), np.array([1, 1, 1, 1, 1, 0, 1])])
def test_a_head_that_reads_paths(of_head):
    """Its ensemble takes the layers below in; where all paths count alike, nothing changes."""
    rows = requests(ASKED[1:], BYTES, small(), ())
    found = [
        find(model, rows, layer=LAYER, options=STRICT)
        for model in (small(), with_ensemble(small(), EnsembleScale(of_head)))
    ]
    same = np.allclose(found[0].vectors.ffn, found[1].vectors.ffn, rtol=1e-3, atol=1e-5)
    assert same == bool(of_head.all())
    np.testing.assert_allclose(found[0].before.ffn, found[1].before.ffn, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "steps=0"),
        ({"rate": float("inf")}, "rate=inf"),
        ({"clamp": float("inf")}, "clamp=inf"),
        ({"kl": float("inf")}, "kl=inf"),
        ({"decay": float("inf")}, "decay=inf"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"clamp": -1.0}, "clamp=-1.0"),
        ({"kl": -0.1}, "kl=-0.1"),
        ({"decay": float("nan")}, "decay=nan"),
    ],
)
def test_bad_options(change, said):
    with pytest.raises(ConfigError, match=said):
        Steps(**change)
