"""The map of the deltas of all paths, as text and as a picture."""

import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.pruning import path_map
from ffnlab.pruning.paths.path_search import start

NAMES = ("start", "attn 0", "ffn 0", "attn 1", "ffn 1")


def example():
    """The first attention is left out, the second was not there."""
    search = start(np.array([1, 1, 1, 0, 1], bool))
    search.losses[0] = 1.25, 0.5, 3.0, np.nan, 1.0
    search.whole[0] = 1.0
    step = np.array([-1, 0, -1, -1, -1])
    return search._replace(step=step)


def test_text():
    assert str(path_map(example(), NAMES)).splitlines() == [
        "path    loss without  delta     left out",
        "start         1.2500   +0.2500  ·",
        "attn 0        0.5000   -0.5000  1",
        "ffn 0         3.0000   +2.0000  ·",
        f"attn 1  {'-':>22}  ·",
        "ffn 1         1.0000   +0.0000  ·",
        "all           1.0000",
    ]


def test_picture():
    figure = path_map(example(), NAMES).draw()
    axes = figure.axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == [0.25, -0.5, 2.0, 0.0, 0.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(NAMES)
    faces = [bar.get_facecolor()[:3] for bar in axes.patches]
    assert faces[1] == (1.0, 1.0, 1.0) and faces[2] == faces[4] != faces[0]
    figure.canvas.draw()


def test_what_was_not_measured_is_refused():
    with pytest.raises(ConfigError, match="4 names for 5 paths"):
        path_map(example(), NAMES[:4])
    with pytest.raises(ConfigError, match="nothing was observed"):
        path_map(start(np.ones(5, bool)), NAMES)
