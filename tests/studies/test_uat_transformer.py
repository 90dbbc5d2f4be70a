"""The study of universal approximation: how its claims are decided, by figures made by hand."""

import importlib

import pytest

from ffnlab.analysis.universal import Errors

study = importlib.import_module("ffnlab.studies.uat_transformer")


def seeds(*largest):
    """Errors of seeds; the root mean square is a tenth of the largest."""
    return [Errors(each, each / 10) for each in largest]


GOOD = dict(
    zip(
        study.WIDTHS,
        (seeds(0.9, 0.8), seeds(0.5, 0.4), seeds(0.2, 0.15), seeds(0.08, 0.09)),
        strict=True,
    )
)


def test_widths_are_judged_by_every_seed():
    held = lambda two, three: [c.holds for c in study.width_claims(two, three, 2)]  # noqa: E731
    assert held(GOOD, GOOD) == [True, True]
    assert held(GOOD | {1024: seeds(0.08, 0.11)}, GOOD) == [False, True]
    assert held(GOOD | {64: seeds(0.5, 0.3)}, GOOD) == [False, True]  # 3.3 times
    assert held(GOOD | {256: seeds(0.2, 0.41)}, GOOD) == [False, True]
    assert held(GOOD, GOOD | {256: seeds(0.51, 0.15)}) == [True, False]


def test_what_is_gathered_is_judged_at_every_beta():
    gaps = [(0.5, 1.0)] * 5 + [(1e-17, 1e-17)]
    assert study.gather_claim(gaps).holds
    assert not study.gather_claim([(1.1, 1.0), *gaps[1:]]).holds
    assert not study.gather_claim([*gaps[:-1], (1e-11, 1e-11)]).holds


def learned(waves=(0.1, 0.1), apart=(0.9, 0.9), first=(0.04, 0.04), alike=(0.6, 0.6)):
    return study.Learned(*(seeds(*each) for each in (waves, apart, first, alike)))


def test_parts_are_judged_made_and_learned_by_every_seed():
    attention = lambda without, found: study.attention_claim(GOOD, without, found, 2).holds  # noqa: E731
    assert attention(seeds(1.0, 1.0), learned())
    assert not attention(seeds(1.0, 0.2), learned())
    assert not attention(seeds(1.0, 1.0), learned(apart=(0.9, 0.29)))
    position = lambda told, alike, found: study.position_claim(told, alike, found, 2).holds  # noqa: E731
    assert position(seeds(0.01, 0.05), seeds(0.5, 1.0), learned())
    assert not position(seeds(0.01, 0.06), seeds(0.5, 1.0), learned())
    assert not position(seeds(0.01, 0.05), seeds(0.5, 0.49), learned())
    assert not position(seeds(0.01, 0.05), seeds(0.5, 1.0), learned(first=(0.04, 0.06)))
    assert not position(seeds(0.01, 0.05), seeds(0.5, 1.0), learned(alike=(0.6, 0.4)))
    assert study.learned_claim(seeds(0.5, 0.5), 2).holds
    assert not study.learned_claim(seeds(0.5, 0.51), 2).holds


def test_attention_is_measured_in_float64():
    gap, bound = study.gathered(2.0)
    assert 0.1 * bound < gap <= bound
    assert study.gathered(40.0)[0] < 1e-15


@pytest.mark.slow
def test_members_learn_the_map_and_not_without_attention():
    found = study.learn("waves", (0, 1), 300, heads=2)
    apart = study.learn("waves", (0, 1), 300, heads=0)
    assert max(e.rms for e in found) < 0.12 < 0.4 < min(e.rms for e in apart)
    assert found[0] != found[1]
