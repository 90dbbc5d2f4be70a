"""The study of PMET: the world that is taught, how its claims are decided, what it measures."""

import importlib
import math

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from ffnlab.editing import EditReport, EditScores, Said
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.studies import pmet_embedded as own
from ffnlab.studies import pmet_measure as measure
from ffnlab.studies.pmet_embedded import Edited
from ffnlab.studies.pmet_measure import Exact, Outcome
from ffnlab.testing import tiny

study = importlib.import_module("ffnlab.studies.pmet")


# The world.


@pytest.fixture(scope="module")
def place():
    return measure.world(3, 200)


def test_everything_is_told_in_two_ways(place):
    assert len(place.triples) == 200 and len({t.subject for t in place.triples}) == 50
    assert len({(t.subject, t.relation) for t in place.triples}) == 200
    text = place.tokenizer.decode(place.stream.tolist())
    texts = text.split(" <s> ")
    assert len(texts) == 200 and text.startswith("<s> ")
    sentences = [s for t in texts for s in t.removeprefix("<s> ").split(" . ")]
    told = {t.prompt(way) + t.answer for t in place.triples for way in (0, 1)}
    assert set(sentences) <= told and len(sentences) > 300
    assert place.stream.min() >= 0 and place.stream.max() < place.tokenizer.size


def test_a_seed_draws_the_world():
    assert measure.world(3, 200).triples == measure.world.__wrapped__(3, 200).triples
    assert measure.world(4, 200).triples != measure.world(3, 200).triples


def test_draws_are_of_different_people(place):
    drawn = measure.draws(place, 0, 4)
    people = [t.subject for each in drawn for t in each.triples]
    assert len(people) == len(set(people)) == 40
    for each in drawn:
        for triple, fact in zip(each.triples, each.facts, strict=True):
            assert fact.text == triple.prompt() and fact.old == triple.answer != fact.new
            assert fact.new in measure.answers_of(triple.relation)
            assert fact.filled(fact.paraphrases[0]) == triple.prompt(1)
        for text in measure.behind(place, each):
            assert not any(t.subject in text for t in each.triples)
    assert {f.new.count(" ") for each in drawn for f in each.facts} == {1, 2}, "of several tokens"


@pytest.mark.slow
def test_ten_facts_are_changed_and_looked_at(place, monkeypatch):
    """An untrained model knows nothing: every second fact is taken for known, before and after."""
    monkeypatch.setattr(
        measure, "knows", lambda model, place, facts: np.arange(len(facts)) % 2 == 0
    )
    config = DecoderConfig(vocab=place.tokenizer.size, max_positions=64, **measure.CONFIG)
    model = Decoder(config, key=jax.random.key(0))
    drawn = measure.draws(place, 0, 2)[1]
    setting = {"layers": (0, 1), "preserve": 3.0, **measure.NUMBERS, "steps": 2}
    found = measure.outcome(model, place, drawn, setting)
    assert len(found.probabilities) == 10 and 0 < found.reach <= 1 + 1e-6  # rounding of norms
    assert 0 <= found.scores.efficacy <= 1
    assert found.scores.specificity == 48 / 95, "every second one of the 95 of 190 that were known"
    (single,) = measure.exact(model, place, drawn, 1)
    assert single.error < 1e-3


# The claims.


def outcome(efficacy=1.0, kept=1.0, p=0.95, generality=1.0, reach=1.0):
    scores = EditScores(efficacy, generality, kept)
    return Outcome(scores, efficacy, kept, [p] * 10, reach)


def way(*outcomes):
    """A way with a seed for each outcome, of one draw."""
    return study.Tuned({"preserve": 3.0, "decay": 0.5}, [({}, 1.0)] * 6, [[o] for o in outcomes])


def test_single_facts_are_judged_by_the_worst():
    held = lambda *of: [c.holds for c in study.exact_claims(of)]  # noqa: E731
    good = Exact(1e-6, True)
    assert held([good, good], [good]) == [True, True]
    assert held([good], [good, Exact(1.1e-4, True)]) == [False, True]
    assert held([good], [Exact(1e-4, False), good]) == [True, False]
    assert "1.0e-06 to 1.1e-04" in study.exact_claims([[good], [Exact(1.1e-4, True)]])[0].ours


def test_the_search_is_judged_by_every_seed():
    held = lambda *of: [c.holds for c in study.search_claims(way(*of), {"decay": 0.5})]  # noqa: E731
    assert held(outcome(), outcome()) == [True, True]
    assert held(outcome(), outcome(p=0.89)) == [False, True]
    assert held(outcome(), outcome(reach=1.001)) == [True, False]
    most = outcome()._replace(probabilities=[0.9] * 19 + [0.1])
    assert held(most) == [True, True]
    assert held(most._replace(probabilities=[0.9] * 18 + [0.1] * 2)) == [False, True]


def test_batches_are_judged_by_every_seed():
    held = lambda *of: [c.holds for c in study.batch_claims(way(*of))]  # noqa: E731
    assert held(outcome(0.9, 0.9), outcome()) == [True, True]
    assert held(outcome(0.89), outcome()) == [False, True]
    assert held(outcome(), outcome(kept=0.89)) == [True, False]


def test_ways_are_judged_by_their_means():
    def holds(ours, *theirs):
        names = ("one vector", "linear spread")
        others = dict(zip(names, (way(outcome(*t)) for t in theirs), strict=True))
        return study.way_claim({"PMET": way(outcome(*ours)), **others}).holds

    assert holds((0.9, 1.0), (0.9, 1.0), (0.5, 0.5))
    assert holds((0.97, 1.0, 1.0, 1.0), (1.0, 1.0), (0.1, 1.0))
    assert not holds((0.9, 1.0), (0.5, 1.0), (1.0, 1.0))
    assert way(outcome(0.5), outcome(1.0)).scores == [0.75, 1.0]
    assert way(outcome(0.5), outcome(0.0)).means("efficacy") == [0.5, 0.0]


def edit(efficacy=1.0, kept=1.0, bits=(1.2, 1.21)):
    said = Said("import os", " as ", "\n", " as a", 0.1, 0.9)
    report = EditReport((said,), EditScores(0.0), EditScores(efficacy, 1.0, kept), (), bits)
    return Edited(report, 1.0)


def test_the_embedded_model_is_judged():
    held = lambda e: [c.holds for c in study.own_claims(e)]  # noqa: E731
    assert held(edit()) == [True, True]
    assert held(edit(efficacy=0.8)) == [False, True]
    assert held(edit(kept=0.8)) == [False, True]
    assert held(edit(bits=(1.2, 1.221))) == held(edit(bits=(1.2, 1.179))) == [True, False]
    assert math.isnan(edit(bits=None).worse)
    facts = own.facts_of(own.TEST.changed)
    assert {f.new for f in facts} == set(own.NEWS)
    modules = [name for names in (*own.TEST, *own.VALIDATION) for name in names]
    assert len(modules) == len(set(modules)) == 56, "none is in two of the lists"


def test_settings_of_every_way_are_chosen_on_other_modules(monkeypatch):
    """Neither what is changed nor what is to stay in the test decides."""
    asked = []

    def edited(model, tokenizer, text, changed, others, setting, held_out):
        asked.append((tuple(changed), tuple(others), dict(setting), held_out))
        score = setting["preserve"] / 10 if "vectors" in setting else 1 / setting["preserve"]
        return edit(efficacy=min(1.0, score))

    monkeypatch.setattr(own, "edited", edited)
    sizes = study.FULL._replace(own_preserve=(2.0, 8.0), own_decay=(0.5,))
    found = {
        name: study.own_chosen(tiny(), None, None, way, sizes) for name, way in study.WAYS.items()
    }
    assert found["PMET"][0]["preserve"] == found["linear spread"][0]["preserve"] == 2.0
    assert found["one vector"][0]["preserve"] == 8.0 and len(found["PMET"][1]) == 2
    assert {each[:2] for each in asked} == {tuple(map(tuple, own.VALIDATION))}
    assert [each[2].get("spread") for each in asked[-2:]] == ["linear", "linear"]


def test_tables_and_pictures_show_every_way():
    ways = {name: way(outcome(), outcome(0.5)) for name in study.WAYS}
    rows = [*study.rows_of(ways), *study.own_rows({"PMET": edit()})]
    assert [row["way"] for row in rows] == [*study.WAYS, "PMET"] and rows[0]["efficacy"] == 0.75
    assert rows[-1]["bits"] == pytest.approx(0.01)
    for shown in (ways, {name: way(outcome()) for name in study.WAYS}):
        figure = Figure()
        study.columns(figure, shown)
        assert len(figure.axes[0].patches) == 15
        height = figure.axes[0].patches[0].get_height()
        np.testing.assert_allclose(height, np.mean(shown["PMET"].means("efficacy")))
    assert study.grid((1.0,), (2.0, 3.0)) == [
        {"preserve": 1.0, "decay": 2.0},
        {"preserve": 1.0, "decay": 3.0},
    ]
