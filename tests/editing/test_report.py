"""What was said before and after: the table, its figures and its picture."""

import math

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from edited_models import FACTS, seen_of, small
from ffnlab.editing import EditReport, EditScores, Said, compare_edit, with_deltas
from ffnlab.editing.report import shown
from ffnlab.formats import Tokenizer

BYTES = Tokenizer.bytes()


@pytest.mark.slow
def test_both_models_are_asked_the_same():
    random = np.random.default_rng(0)
    delta = random.normal(size=(20, 12)).astype(np.float32)
    new = with_deltas(small(), {"layers[1].ffn.down": delta})
    found = compare_edit(small(), new, BYTES, FACTS[:2], bits=(1.0, 1.25))
    assert [s.prompt for s in found.said] == ["Al is", "Now Bo Lee plays"]
    for model, after, p in (
        (small(), found.said[0].before, found.said[0].p_before),
        (new, found.said[0].after, found.said[0].p_after),
    ):
        logits = seen_of(model, [0, *b"Al is"]).logits[5]
        assert after[:1] == chr(int(logits.argmax()))
        np.testing.assert_allclose(p, jax.nn.softmax(logits)[ord("x")], rtol=1e-3)
    assert found.figures()["bits_per_byte/after"] == 1.25 and found.dense == ()
    assert found.figures()["efficacy/before"] == found.before.efficacy
    assert found.after.efficacy == found.figures()["efficacy/after"]


def test_it_prints_what_is_there():
    said = Said("a\x1b[2Jb", " c\n", "\u202ed", "e$x$", 0.25, 0.5)
    report = EditReport((said,) * 30, EditScores(0.0), EditScores(1.0), ("m (Int4)",))
    row = report.rows()[0]
    assert (
        row["prompt"] == "a\\x1b[2Jb" and row["before"] == "\\u202ed" and row["wanted"] == " c\\n"
    )
    figures = report.figures()
    assert figures["score/after"] == 1.0 and figures["dense_now"] == 1.0
    assert "generality/after" not in figures and not any(map(math.isnan, figures.values()))
    assert "\x1b" not in str(report) and shown("\u00e9 \U0001f389") == "\u00e9 \U0001f389"
    figure = Figure()
    report.draw(figure)
    assert len(figure.axes[0].patches) == 2 * 24
