"""Tests of ffnlab.bench.structured on small layers; none is timed."""

import jax
import numpy as np
import pytest
import rich
from rich.console import Console

from ffnlab.bench import structured
from ffnlab.errors import ConfigError
from ffnlab.weights import BlockDense, BlockShuffle, LowRank

SMALL = structured.Settings(width=16, tokens=8, rows=(1, 4), turns=2)


def test_all_forms_are_timed_and_told(capsys):
    found = structured.compare(SMALL)
    names = {f"{form} {percent}" for form in structured.FORMS for percent in (63, 32)}
    assert set(found.ratios) == names and set(found.seconds) == names | {"dense"}
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert all(set(each) == {1, 4} for each in found.factors.values())
    assert set(found.crossover.values()) <= {1, 4, None}
    rich.print(found)
    assert "block_shuffle" in capsys.readouterr().out and "8 tokens" in found.about


def test_no_figure_is_cut_in_a_terminal_of_80_columns(capsys):
    over = dict.fromkeys(structured.Settings.rows, 1.25)
    times = {"dense": 1.0} | {f"{form} {p}": 0.5 for form in structured.FORMS for p in (63, 32)}
    factors = dict.fromkeys(structured.FORMS, over)
    found = structured.Structured(
        times, dict.fromkeys(times, 2.0), factors, dict.fromkeys(factors), "float32, cpu"
    )
    Console(width=80).print(found)
    text = capsys.readouterr().out
    assert (
        "\u2026" not in text and "1000.00" in text and text.count("1.25") == 21 and "> 64" in text
    )


def test_the_forms_are_what_they_are_called():
    kinds = (LowRank, BlockDense, BlockShuffle)
    for form, kind in zip(structured.FORMS, kinds, strict=True):
        w = structured.matrix(form, 48)
        assert type(w) is kind and w.shape == (48, 192)
        assert sum(leaf.size for leaf in jax.tree.leaves(w)) <= 0.38 * 48 * 192
        np.testing.assert_allclose(structured.whole(w).dense(), w.dense(), atol=1e-6)


def test_the_crossover_is_where_the_ratio_stays_below_one():
    assert structured.crossover_of({1: 0.9, 2: 0.8}) == 1
    assert structured.crossover_of({1: 0.9, 2: 1.1, 4: 1.0}) == 4
    assert structured.crossover_of({1: 0.9, 2: 1.1}) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"turns": 0}, "turns=0"),
        ({"width": 20}, "width=20 must be divisible by 8"),
        ({"rows": ()}, r"rows=\(\) must be rising"),
        ({"rows": (4, 1)}, r"rows=\(4, 1\) must be rising"),
        ({"rows": (0, 1)}, r"rows=\(0, 1\) must be rising"),
    ],
)
def test_bad_sizes(options, said):
    with pytest.raises(ConfigError, match=said):
        structured.Settings(**options)
