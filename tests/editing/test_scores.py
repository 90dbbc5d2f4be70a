"""What an edit did: likelihoods by hand, shares of facts made up, entropies counted."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from edited_models import FACTS, seen_of, small
from ffnlab.editing import (
    EditScores,
    Fact,
    check_questions,
    edit_scores,
    fluency,
    likelihood,
    ngram_entropy,
)
from ffnlab.editing import scores as module
from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer

BYTES = Tokenizer.bytes()


def test_likelihoods_by_hand():
    pairs = [("Al is", " x"), ("B", "c"), ("Now Bo Lee plays the", " harp")] * 30  # two batches
    found = likelihood(small(), BYTES, pairs)
    for i in (0, 1, 89):
        prompt, answer = pairs[i]
        ids = [0, *(prompt + answer).encode()]
        last = slice(len(ids) - 1 - len(answer), len(ids) - 1)
        logs = jax.nn.log_softmax(seen_of(small(), ids).logits[last])
        new = np.array(ids[-len(answer) :])
        nats = -np.asarray(logs)[np.arange(len(answer)), new].mean()
        np.testing.assert_allclose(found.nats[i], nats, rtol=1e-4)
        assert found.said[i] == bool((logs.argmax(-1) == new).all())
        assert found.tokens[i] == len(answer)
    np.testing.assert_allclose(found.probability[0], math.exp(-2 * found.nats[0]), rtol=1e-5)
    likely = chr(int(seen_of(small(), [0, *b"Al is"]).logits[5].argmax()))
    assert likelihood(small(), BYTES, [("Al is", likely)]).said.all()
    with pytest.raises(ConfigError, match="pairs="):
        likelihood(small(), BYTES, [])


def test_shares(monkeypatch):
    """A model that says what a table says."""
    nats = {
        ("a is", "1"): 1.0, ("a is", "2"): 2.0,
        ("b is", "1"): 2.0, ("b is", "2"): 1.0,
        ("not a", "1"): 3.0, ("not a", "2"): 2.0,
        ("of a", "1"): 0.5, ("of a", "2"): 2.0,
        ("z is", "1"): 3.0, ("z is", "2"): 1.0,
        ("y is", "1"): 1.0, ("y is", "2"): 3.0,
        ("x is", "1"): 4.0, ("x is", "2"): 3.0,
        ("c is", "1"): 9.0,
    }  # fmt: skip

    def told(model, tokenizer, pairs):
        found = np.array([nats[pair] for pair in pairs])
        said = np.array([pair == ("c is", "1") for pair in pairs])
        return module.Likelihood(found, np.ones(len(pairs), int), said)

    monkeypatch.setattr(module, "likelihood", told)
    facts = [
        Fact("a", "{} is", "1", "2", ("not {}", "of {}"), ("z is", "y is", "x is")),
        Fact("b", "{} is", "1", "2"),
        Fact("c", "{} is", "1"),
    ]
    found = edit_scores(small(), BYTES, facts)
    assert found.efficacy == pytest.approx(2 / 3) and found.generality == 0.5
    assert found.specificity == pytest.approx(2 / 3) and math.isnan(found.fluency)
    assert found.score == pytest.approx(3 / (1.5 + 2 + 1.5))
    alone = edit_scores(small(), BYTES, facts[1:])
    assert alone.efficacy == 0.5 == alone.score and math.isnan(alone.generality)
    assert EditScores(0.5, 0.0, 1.0).score == 0


def test_fluency_is_of_what_is_said():
    found = edit_scores(small(), BYTES, FACTS[:1], length=8)
    assert 0 <= found.fluency < 10
    assert found == edit_scores(small(), BYTES, FACTS[:1], length=8)
    with pytest.raises(ConfigError, match="length=-1"):
        edit_scores(small(), BYTES, FACTS, length=-1)


def test_questions_are_looked_at_beforehand():
    fact = Fact("Al", "{} is", "x", "y", ("{} was", "So {}"), ("Bo is",))
    check_questions(small(), BYTES, [fact], length=50)
    for change, said in (
        ({"paraphrases": ("{}" + "b" * 70,)}, "a context of 64"),
        ({"neighbours": ("\xe9 is",)}, "token 195"),
        ({"prompt": "{}" + "b" * 60}, "63 tokens and is to go on with 2"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_questions(small(), BYTES, [dataclasses.replace(fact, **change)], length=2)
    with pytest.raises(ConfigError, match="length=-1"):
        check_questions(small(), BYTES, [fact], length=-1)


def test_entropies_are_counted():
    assert ngram_entropy("one two") == 0 and ngram_entropy("") == 0
    # Words and signs: "a , a , a ." has pairs a, ,a a, ,a a. and triples a,a ,a, a,a ,a.
    pairs = -(0.4 * math.log2(0.4) * 2 + 0.2 * math.log2(0.2))
    triples = -(0.5 * math.log2(0.5) + 2 * 0.25 * math.log2(0.25))
    assert ngram_entropy("a, a, a.") == pytest.approx((2 / 3 * pairs + 4 / 3 * triples) / 2)
    assert fluency(["a, a, a.", ""]) == pytest.approx(ngram_entropy("a, a, a.") / 2)
    with pytest.raises(ConfigError, match="texts="):
        fluency([])
