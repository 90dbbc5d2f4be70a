"""Tests of ffnlab.bench.columns on small columns; none is timed."""

import pytest
from matplotlib.figure import Figure

from ffnlab.bench import columns
from ffnlab.errors import ConfigError
from ffnlab.report import printed

SMALL = columns.Settings((2, 3), 1, 8, (2, 3), turns=1, forms=("plain", "rebuilt"))


@pytest.mark.slow  # compiles four programs of many convolutions
def test_every_form_and_number_has_memory_and_the_last_is_timed():
    found = columns.compare(SMALL)
    assert {form: set(each) for form, each in found.temporary.items()} == {
        "plain": {2, 3},
        "rebuilt": {2, 3},
    }
    assert found.ratios["plain"] == 1.0 and found.seconds.keys() == {"plain", "rebuilt"}
    assert "reversible columns" in printed(found)
    figure = Figure()
    columns.draw(figure, found)
    assert len(figure.axes) == 2


def test_figures_are_what_is_kept():
    temporary = {"plain": {4: 100, 32: 900}, "rebuilt": {4: 90, 32: 99}}
    found = columns.Comparison(temporary, {}, {}, "here")
    assert found.growth("plain") == 9.0 and found.growth("rebuilt") == 1.1
    assert "here" in printed(found)


def test_forms_keep_what_they_say():
    model = columns.RevCol(SMALL.config(3), key=columns.jax.random.key(0))
    kept = {form: columns.of_form(model, form) for form in columns.FORMS}
    saved = {form: (each.config.save_every, each.remat) for form, each in kept.items()}
    assert saved == {
        "plain": (0, None),
        "checkpointed": (0, "nothing"),
        "local": (1, None),
        "rebuilt": (3, None),
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"columns": (8, 4)}, r"columns=\[8, 4\] must rise"),
        ({"columns": ()}, "columns=0 must be at least 2"),
        ({"turns": -1}, "turns=-1"),
        ({"forms": ("rebuilt",)}, r"forms=\['rebuilt'\]: some of"),
        ({"side": 12}, r"image=\[12, 12\].*multiples of 8"),
    ],
)
def test_settings_out_of_range(options, said):
    with pytest.raises(ConfigError, match=said):
        columns.Settings(**options)
