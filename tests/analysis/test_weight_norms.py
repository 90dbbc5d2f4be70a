"""Norms of weights, against NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, transform
from ffnlab.analysis import weight_norms
from ffnlab.errors import NumericalError, SelectionError
from ffnlab.layers import MLP
from ffnlab.quantization import nearest
from ffnlab.testing import batches, tiny


def test_norms_are_those_of_numpy(key):
    model = MLP((3, 4, 2), key=key)
    model.maps[0].b[...] = jnp.array([0, -3, 0, 4.0])
    found = weight_norms()(model)
    w = np.asarray(model.maps[0].weight.dense())
    assert [row["weight"] for row in found.rows()] == [
        *("maps[0].b", "maps[0].w", "maps[1].b", "maps[1].w")
    ]
    bias, first = found.rows()[:2]
    assert bias == {"weight": "maps[0].b", "shape": "4", "norm": 5, "rms": 2.5, "largest": 4}
    assert first["shape"] == "3 x 4" and first["largest"] == np.abs(w).max()
    assert first["norm"] == pytest.approx(np.linalg.norm(w), rel=1e-6)
    assert first["rms"] == pytest.approx(np.sqrt((w**2).mean()), rel=1e-6)
    figures = found.figures()
    assert figures["norm/maps[0].b"] == 5 and figures["norm/maps[1].b"] == 0
    whole = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(model)])
    assert figures["norm"] == pytest.approx(np.linalg.norm(whole), rel=1e-6)


def test_small_and_large_numbers_have_norms(key):
    """Their squares are beyond float32."""
    for size in (1e-30, 1e30):
        model = jax.tree.map(lambda leaf, s=size: jnp.full_like(leaf, s), MLP((4, 4), key=key))
        assert weight_norms()(model).figures()["norm/maps[0].w"] == pytest.approx(4 * size)


def test_a_quantized_weight_is_measured_as_its_matrix():
    small, _ = transform.apply(nearest(format="int4", group=8), tiny(), batches())
    path = "layers[1].ffn.up.w"
    (row,) = weight_norms(select=path)(small).rows()
    dense = np.asarray(small.layers[1].ffn.up.weight.dense())
    assert row["weight"] == path and row["shape"] == "16 x 32"
    assert row["norm"] == pytest.approx(np.linalg.norm(dense), rel=1e-6)


@pytest.mark.parametrize("select", ["layers[1].ffn", "layers[1].ffn.*", "layers[1].ffn.*.w"])
def test_what_a_pattern_selects_is_measured_with_all_in_it(select):
    found = [row["weight"] for row in weight_norms(select=select)(tiny()).rows()]
    assert found == [f"layers[1].ffn.{name}.w" for name in ("down", "gate", "up")]


def test_patterns_are_of_the_list_form():
    flat, stacked = (weight_norms(select="layers[2]")(m) for m in (tiny(), models.stack(tiny())))
    assert flat.rows() == stacked.rows() and len(flat.rows()) > 5


@pytest.mark.parametrize("select", ["layers[9]", "layers[0].attn.q.b"])
def test_what_matches_nothing_is_an_error(select):
    with pytest.raises(SelectionError, match="matches nothing"):
        weight_norms(select=select)(tiny())


def test_any_tree_of_arrays_is_measured():
    found = weight_norms()({"a": [jnp.ones((2, 2))], "n": jnp.arange(3), "b": jnp.zeros(())})
    assert found.figures() == {"norm": 2, "norm/['a'][0]": 2, "norm/['b']": 0}


def test_a_weight_that_is_not_finite_is_named(key):
    model = MLP((3, 2), key=key)
    model.maps[0].b[...] = jnp.array([0, jnp.inf])
    with pytest.raises(NumericalError, match=r"weight_norms.*'norm(/maps\[0\].b)?' is (inf|nan)"):
        weight_norms()(model)


def test_bars_are_drawn_for_each_weight():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    found = weight_norms(select="layers[0].ffn")(tiny())
    found.draw(figure)
    (axes,) = figure.axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [row["rms"] for row in found.rows()]
    assert [label.get_text() for label in axes.get_yticklabels()][0] == "layers[0].ffn.down.w"
