"""The study of reversible columns: how its claims are decided, and its quick form."""

import dataclasses
import importlib

import jax
import pytest
from matplotlib.figure import Figure

from ffnlab.bench.columns import Comparison
from tuned import assert_tuned, cases, with_scores

study = importlib.import_module("ffnlab.studies.revcol")
GOOD = Comparison(
    {"plain": {4: 100, 32: 800}, "rebuilt": {4: 80, 32: 84}},
    {"plain": 1.0, "rebuilt": 1.4},
    {"plain": 1.0, "rebuilt": 1.4},
    "here",
)
ERRORS = {
    (0.5, 4): [2e-6, 3e-6],
    (0.5, 16): [1e-2, 2e-2],
    (1.0, 4): [0.0, 0.0],
    (1.0, 16): [1e-6, 2e-6],
}


def test_memory_and_time_are_of_the_bench():
    claim = study.memory_claim(GOOD)
    assert claim.holds and "rebuilt x 1.05" in claim.ours and "9.5 times" in claim.ours
    grown = dataclasses.replace(GOOD, temporary=GOOD.temporary | {"rebuilt": {4: 80, 32: 89}})
    assert not study.memory_claim(grown).holds
    assert study.time_claim(GOOD).holds and study.time_claim(GOOD).timed
    slow = dataclasses.replace(GOOD, ratios={"plain": 1.0, "rebuilt": 1.7})
    assert not study.time_claim(slow).holds


def test_errors_are_judged_by_the_worst_seed():
    assert study.exact_claim(ERRORS).holds and study.spoiled_claim(ERRORS).holds
    assert not study.exact_claim(ERRORS | {(0.5, 4): [2e-6, 2e-4]}).holds
    assert not study.exact_claim(ERRORS | {(1.0, 16): [2e-4, 0.0]}).holds
    assert not study.spoiled_claim(ERRORS | {(0.5, 16): [1e-5, 1e-2]}).holds
    figure = Figure()
    study.lines(figure, ERRORS)
    assert len(figure.axes[0].lines) == 3


def test_curves_are_judged_at_every_moment():
    plain = [3.0, 2.0, 1.0]
    assert study.alike_claim({"plain": plain, "rebuilt": [3.0, 2.0005, 1.0]}).holds
    assert not study.alike_claim({"plain": plain, "rebuilt": [3.0, 2.002, 1.0]}).holds
    assert not study.alike_claim({"plain": plain[::-1], "rebuilt": plain[::-1]}).holds


def sides(alone, supervised, more):
    names = (study.ALONE, study.SUPERVISED, study.MORE)
    return {n: [s, s] for n, s in zip(names, (alone, supervised, more), strict=True)}


def test_accuracies_are_judged_by_their_sides():
    found = cases(digits=sides(0.90, 0.90, 0.92))
    on_the_way, more = study.learned_claims(found)
    assert on_the_way.holds and more.holds
    assert_tuned(on_the_way, study.ALONE, study.SUPERVISED)
    assert_tuned(more, study.ALONE, study.MORE)
    worse = study.learned_claims(with_scores(found, "digits", study.SUPERVISED, [0.90, 0.87]))
    assert [claim.holds for claim in worse] == [False, True]
    fewer = study.learned_claims(with_scores(found, "digits", study.MORE, [0.90, 0.88]))
    assert [claim.holds for claim in fewer] == [True, False]
    assert study.learned_claims({}) == []


def test_counts_are_those_of_the_paper():
    claim = study.counted_claim()
    assert claim.holds and "base 138,615,328" in claim.ours


def test_sides_differ_in_columns_and_supervision_alone():
    sizes = study.Sizes((0,), (1e-2,), 3, None)
    made = {side.name: jax.eval_shape(lambda s=side: s.model(0)) for side in study.sides(sizes)}
    config = made[study.ALONE].config
    assert made[study.SUPERVISED].config == dataclasses.replace(config, supervision=True)
    assert made[study.MORE].config == dataclasses.replace(config, columns=8)


@pytest.mark.slow
def test_the_quick_form(tmp_path):
    result = study.run(out=tmp_path, quick=True)
    assert len(result.claims) == 5 and (tmp_path / "memory.png").is_file()
