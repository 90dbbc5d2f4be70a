"""Deltas: applied, withdrawn bit for bit, kept in files; other leaves stay."""

import jax
import numpy as np
import pytest

from edited_models import small
from ffnlab import models, transform, tree
from ffnlab.editing import load_deltas, originals, save_deltas, with_deltas, without_deltas
from ffnlab.editing.deltas import converted
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats import safetensors
from ffnlab.quantization import nearest
from ffnlab.testing import equal
from ffnlab.weights import Dense, Int8

PATHS = ("layers[0].ffn.down", "layers[2].ffn.down")


def drawn(seed=0):
    random = np.random.default_rng(seed)
    return {path: random.normal(size=(20, 12)).astype(np.float32) for path in PATHS}


@pytest.fixture(scope="module")
def packed():
    """The model with all its matrices in eight bits."""
    return transform.apply(nearest(format="int8", group=4), small())[0]


@pytest.mark.parametrize("form", [tree.copy, models.stack], ids=["list", "stack"])
def test_what_is_applied_is_taken_back_bit_for_bit(form):
    model, deltas = form(small()), drawn()
    kept = originals(model, PATHS)
    new = with_deltas(model, deltas)
    assert type(new.layers) is type(model.layers)
    assert equal(without_deltas(new, deltas, kept), model)
    before, after = (jax.tree_util.tree_leaves_with_path(models.unstack(m)) for m in (model, new))
    changed = {
        jax.tree_util.keystr(path).removeprefix(".")
        for (path, old), (_, leaf) in zip(before, after, strict=True)
        if not np.array_equal(old, leaf)
    }
    assert {name.partition(".w")[0] for name in changed} == set(PATHS) and len(changed) == 2
    for path in PATHS:
        was, now = (models.unstack(m).layers[int(path[7])].ffn.down for m in (model, new))
        np.testing.assert_array_equal(now.weight.dense(), was.weight.dense() + deltas[path])
    near = without_deltas(new, deltas)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-5), near, model))


def test_quantized_matrices_become_dense_where_they_change(packed):
    deltas = drawn()
    assert converted(packed, PATHS) == [f"{path} (Int8)" for path in PATHS]
    new = with_deltas(packed, deltas)
    for i, kind in enumerate((Dense, Int8, Dense)):
        assert isinstance(new.layers[i].ffn.down.weight, kind)
        assert isinstance(new.layers[i].ffn.up.weight, Int8)
    was = packed.layers[0].ffn.down.weight.dense()
    np.testing.assert_array_equal(new.layers[0].ffn.down.weight.w, was + deltas[PATHS[0]])
    assert equal(without_deltas(new, deltas, originals(packed, PATHS)), packed)
    assert converted(new, PATHS) == []


def test_a_later_change_is_not_undone():
    deltas, kept = drawn(), originals(small(), PATHS)
    twice = with_deltas(with_deltas(small(), deltas), drawn(1))
    with pytest.raises(ConfigError, match=r"layers\[0\].* is not its original and the delta"):
        without_deltas(twice, deltas, kept)
    between = originals(with_deltas(small(), deltas), PATHS)
    once = without_deltas(twice, drawn(1), between)
    assert equal(without_deltas(once, deltas, kept), small())
    with pytest.raises(ConfigError, match="originals lack"):
        without_deltas(with_deltas(small(), deltas), deltas, {})


def test_files(tmp_path):
    deltas, file = drawn(), tmp_path / "deltas.safetensors"
    save_deltas(file, deltas)
    back = load_deltas(file, models.stack(small()))
    assert equal(dict(sorted(back.items())), dict(sorted(deltas.items())))
    save_deltas(file, {"layers[9].ffn.down": deltas[PATHS[0]]})
    with pytest.raises(ConfigError, match=r"'layers\[9\]\.ffn\.down', which is no linear map"):
        load_deltas(file, small())
    save_deltas(file, {PATHS[0]: deltas[PATHS[0]].T})
    with pytest.raises(ConfigError, match=r"is \(12, 20\); the matrix there is \(20, 12\)"):
        load_deltas(file, small())
    save_deltas(file, {PATHS[0]: deltas[PATHS[0]] * np.nan})
    with pytest.raises(FormatError, match="NaN or infinity"):
        load_deltas(file, small())
    safetensors.write_file(file, {PATHS[0]: safetensors.entry(np.zeros(3, np.float32))})
    with pytest.raises(FormatError, match="no float32 matrix"):
        load_deltas(file, small())
    file.write_bytes(b"x" * 20)
    with pytest.raises(FormatError, match="header"):
        load_deltas(file, small())


def test_bad_deltas():
    with pytest.raises(ConfigError, match=r"no linear map.*layers\[0\]\.ffn\.down"):
        with_deltas(small(), {"layers[0].ffn": np.zeros((20, 12), np.float32)})
    with pytest.raises(ConfigError, match="the matrix there is"):
        with_deltas(small(), {PATHS[0]: np.zeros((20, 11), np.float32)})
