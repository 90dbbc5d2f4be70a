"""Tests of ffnlab.bench.folding on small layers; none is timed."""

import numpy as np
import pytest
import rich

from ffnlab.bench import folding
from ffnlab.errors import ConfigError

SMALL = folding.Settings(widths=(8, 16), images=2, tokens=3, turns=2)


def test_all_forms_are_timed_and_told(capsys):
    found = folding.compare(SMALL)
    assert all(t > 0 for times in found.seconds.values() for t in times.values())
    assert set(found.ratios) == {8, 16} and all(r > 0 for r in found.ratios[8].values())
    rich.print(found)
    assert "/ unfolded" in capsys.readouterr().out and "2 x 3 tokens" in found.about


def test_the_fold_does_what_the_form_before_it_does():
    calls = folding.forms(SMALL, 8)
    before, after, plain = (np.asarray(calls[n]()) for n in ("unfolded", "folded", "plain"))
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert np.abs(plain - before).max() > 1e-3


def test_bad_sizes():
    for options, said in (({"turns": 0}, "turns=0"), ({"widths": ()}, "widths=0")):
        with pytest.raises(ConfigError, match=said):
            folding.Settings(**options)
