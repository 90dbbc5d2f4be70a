"""Tests of ffnlab.bench.sparse on a layer so small that nothing is skipped; none is timed."""

import math

import jax
import numpy as np
import pytest
import rich

from ffnlab.bench import sparse
from ffnlab.bench.sparse import Comparison, Level, Settings
from ffnlab.errors import FFNLabError
from ffnlab.layers import GatedFFN

SMALL = Settings(width=24, hidden=40, sparsities=(0.0, 0.5, 0.9), turns=3)


def comparison(*ratios, sparsities=(0.0, 0.5, 0.9)):
    """A comparison with these ratios."""
    levels = tuple(Level(k, 1e-3, r) for k, r in zip(sparsities, ratios, strict=True))
    return Comparison(levels, {"plain": 2e-3, "fused": 1e-3}, "float32")


def test_both_sides_compute_the_same_and_say_their_dtype(capsys):
    found = sparse.compare(SMALL)
    assert [level.sparsity for level in found.levels] == [0.0, 0.5, 0.9]
    assert len(found.dense) == 6 and all(s > 0 for s in found.dense.values())
    assert all(level.seconds > 0 and level.ratio > 0 for level in found.levels)
    rich.print(found)
    said = capsys.readouterr().out
    assert "float32" in said and "24 x 40" in said and "90%" in said


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_the_sparse_layer_drops_the_fraction_asked_for(sparsity, key):
    layer, x = GatedFFN(24, 40, key=key), jax.random.normal(key, (1, 1, 24))
    gate = sparse.sparse_layer(layer, x, sparsity).activate(x)
    assert float(np.mean(np.asarray(gate) == 0)) == sparsity


def test_other_work_is_refused():
    expected = np.ones(3)
    sparse.agree("right", jax.numpy.ones((1, 3)), expected)
    for wrong in (1.001, math.nan):
        with pytest.raises(FFNLabError, match="wrong: the output is off"):
            sparse.agree("wrong", jax.numpy.full((1, 3), wrong), expected)


def test_crossover_lies_between_the_levels():
    assert comparison(0.9, 1.1, 2.0).crossover == pytest.approx(0.25)
    assert comparison(1.1, 0.8, 1.2).crossover == pytest.approx(0.7)
    assert comparison(1.1, 1.2, 1.3).crossover == 0
    assert math.isnan(comparison(1.1, 1.2, 0.9).crossover)
    assert comparison(1.1, 1.2, 1.3).peer == "fused"


def test_figures_of_the_limits_file(monkeypatch):
    monkeypatch.setattr(
        sparse, "compare", lambda: comparison(0.9, 1.2, 2.1, sparsities=(0.0, 0.7, 0.9))
    )
    assert sparse.ratios() == {"0%": 0.9, "70%": 1.2, "90%": 2.1}
