"""The map of a removal order, as text and as a picture."""

import numpy as np
import pytest

from ffnlab.pruning import removal_map
from ffnlab.pruning.finercut_search import start


def example(n=4):
    """Removals 1 to 3 in blocks 3 and 1, block 2 without attention from the start."""
    present = np.ones((n, 2), bool)
    present[2, 0] = False
    step = np.full((n, 2), -1)
    step[3, 0], step[3, 1], step[1, 0] = 0, 1, 2
    return removal_map(start(present)._replace(step=step))


def test_text():
    assert str(example()).splitlines() == [
        "block     0 1 2 3",
        "attention · 3 - 1",
        "ffn       · · · 2",
    ]


def test_long_maps_break_into_bands():
    lines = example(40).text(columns=60).splitlines()
    assert len(lines) == 9 and max(map(len, lines)) <= 60
    assert [line.split()[0] for line in lines] == ["block", "attention", "ffn"] * 3
    assert " ".join(lines[0::3]).replace("block", "").split() == [str(i) for i in range(40)]


@pytest.mark.parametrize("n", [4, 40])
def test_picture_has_every_label(n):
    figure = example(n).draw()
    axes = figure.axes[0]
    labels = sorted(text.get_text() for text in axes.texts)
    assert labels == sorted(["1", "2", "3"] + ["·"] * (2 * n - 4))
    assert len(axes.collections) == 1  # the hatched cell
    assert len(axes.get_xticklabels()) == n
    figure.canvas.draw()


def test_picture_grows_with_the_blocks_and_says_what_is_dark():
    for n, width in ((4, 4.5), (40, 1.8 + 0.36 * 40)):
        figure = example(n).draw()
        assert figure.get_size_inches().tolist() == pytest.approx([width, 2.3])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["attention", "ffn"]
    (image,) = axes.images
    assert image.get_clim() == (0, 2), "from the first removal to the last"
    # Of removals 0, 1 and 2 those before 0.6 * 2 are dark.
    colors = {text.get_text(): text.get_color() for text in axes.texts}
    assert colors == {"1": "white", "2": "white", "3": "black", "·": "black"}
    start_, end = axes.collections[0].get_datalim(axes.transData).get_points()
    assert start_.tolist() == [1.5, -0.5] and end.tolist() == [2.5, 0.5]


def test_text_has_a_block_at_least_however_narrow():
    lines = example().text(columns=1).splitlines()
    assert len(lines) == 12 and lines[6].split() == ["block", "2"]


def test_a_search_that_removed_nothing_draws():
    figure = removal_map(start(np.ones((2, 2), bool))).draw()
    figure.canvas.draw()


def test_draws_on_a_given_figure():
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    assert example().draw(figure) is figure
