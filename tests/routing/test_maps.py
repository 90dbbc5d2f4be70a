"""Maps of routings against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.layers import routers
from ffnlab.report import as_png
from ffnlab.routing import maps

CLASSES = jnp.array([[0, 1, 1], [2, 0, 1]])


def routing():
    """Two layers of two sequences: the first over capacity, the second with padding and a NaN."""
    logits = jax.random.normal(jax.random.key(0), (2, 2, 3, 4)).at[1, 0, 0, 0].set(jnp.nan)
    valid = jnp.ones((2, 2, 3), bool).at[:, 1, 2].set(False)
    return routers.limited(routers.softmax_top_k(logits, 2, valid=valid), 1)


def test_counts_are_those_of_a_loop():
    found = routing()
    got = maps(found, CLASSES)
    kept, dropped, unrouted = np.zeros((2, 3, 4), int), np.zeros((2, 3), int), np.zeros((2, 3), int)
    for n, b, t in np.ndindex(2, 2, 3):
        c = int(CLASSES[b, t])
        if not found.valid[n, b, t]:
            continue
        asked = [int(e) for e in found.chosen[n, b, t] if e < 4]
        unrouted[n, c] += not asked
        for e, stays in zip(asked, found.kept[n, b, t], strict=False):
            if stays:
                kept[n, c, e] += 1
            else:
                dropped[n, c] += 1
    np.testing.assert_array_equal(got.kept, kept)
    np.testing.assert_array_equal(got.dropped, dropped)
    np.testing.assert_array_equal(got.unrouted, unrouted)
    assert dropped.sum() > 0 and unrouted.sum() == 1
    sums = got.shares.sum(-1)
    np.testing.assert_allclose(sums[kept.sum(-1) > 0], 1)
    assert (sums[kept.sum(-1) == 0] == 0).all()
    assert got.figures()["dropped"] == dropped.sum() / (dropped.sum() + kept.sum())
    both = kept.sum(1)
    assert got.figures()["largest share/layer 1"] == both[1].max() / both[1].sum()


def test_it_prints_and_draws():
    got = maps(routing(), CLASSES, names=["text", "image", "sound"], experts=list("abcd"))
    assert len(got.rows()) == 6 and got.rows()[1]["class"] == "image"
    assert "sound" in str(got) and as_png(got.draw)[:4] == b"\x89PNG"
    one = jax.tree.map(lambda x: x[0], routing())
    assert [row["class"] for row in maps(one).rows()] == ["all"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": CLASSES[:1]}, r"classes has shape \(1, 3\), tokens \(2, 3\)"),
        ({"classes": CLASSES, "names": ["a", "b"]}, "classes reach 2; there are 2 names"),
        ({"classes": -CLASSES}, "classes reach 0"),
        ({"experts": ["a"]}, r"experts=\['a'\] for 4 experts"),
    ],
)
def test_bad_classes(options, message):
    with pytest.raises(ConfigError, match=message):
        maps(routing(), **options)
    with pytest.raises(ConfigError, match=r"tokens \(3,\)"):
        maps(routers.fixed(jnp.zeros(3, int), 2))
