"""Features are computed once for the same model and data, and anew for any other."""

import random
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from ffnlab.data import FeatureCache
from ffnlab.errors import ConfigError, FormatError


class Net(NamedTuple):
    w: jax.Array
    b: jax.Array


MODEL = Net(jnp.arange(6, dtype=jnp.float32).reshape(3, 2), jnp.ones(2))
DATA = np.arange(21, dtype=np.float32).reshape(7, 3)


class Counted:
    """A network that counts the rows that it was run on."""

    def __init__(self):
        self.rows = []

    def __call__(self, model, x):
        jax.debug.callback(lambda shape=x.shape: self.rows.append(shape[0]))
        return x @ model.w + model.b


def run(cache, model=MODEL, data=DATA, name="linear"):
    """The features, and on how many rows at a time the network ran."""
    counted = Counted()
    found = cache(name, counted, model, data)
    jax.effects_barrier()
    return found, counted.rows


def test_the_second_time_nothing_runs(tmp_path):
    cache = FeatureCache(tmp_path / "new", rows=3)
    first, rows = run(cache)
    assert sorted(rows) == [1, 3, 3]
    np.testing.assert_allclose(first, DATA @ np.asarray(MODEL.w) + 1, rtol=1e-6)
    assert isinstance(first, np.ndarray) and first.dtype == np.float32
    for again in (cache, FeatureCache(tmp_path / "new")):  # another process, any number of rows
        second, rows = run(again)
        assert rows == []
        np.testing.assert_array_equal(second, first)
    run(cache, jax.tree.map(np.asarray, MODEL), jnp.asarray(DATA))
    assert len(list((tmp_path / "new").iterdir())) == 1


def changed(array, *place):
    """The same array with another last bit at a place."""
    array = np.array(array)
    array[place] = np.nextafter(array[place], np.inf)
    return array


@pytest.mark.parametrize(
    "other",
    [
        {"model": MODEL._replace(w=changed(MODEL.w, 2, 1))},
        {"model": MODEL._replace(b=changed(MODEL.b, 0))},
        {"data": changed(DATA, 6, 0)},
        {"data": DATA[:6]},
        {"data": DATA[::-1].copy()},
        {"data": DATA.astype(np.int32)},
        {"name": "other"},
    ],
)
def test_another_leaf_row_or_name_is_computed(tmp_path, other):
    cache = FeatureCache(tmp_path)
    run(cache)
    found, rows = run(cache, **other)
    assert sum(rows) == len(other.get("data", DATA)) == len(found)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_order_of_bytes_and_static_fields_are_part_of_the_key(tmp_path):
    path = lambda *trees: FeatureCache(tmp_path).path("n", *trees)  # noqa: E731
    one = np.arange(6.0)
    assert path(one.reshape(2, 3), one) != path(one.reshape(3, 2), one)
    assert path({"a": one}, one) != path({"b": one}, one) != path([one], one)
    assert path(1.0, one) != path(2.0, one) and path([], one) != path(one, one)
    assert path(jax.random.key(0), one) != path(jax.random.key(1), one)
    assert path(np.asfortranarray(one.reshape(2, 3)), one) == path(one.reshape(2, 3), one)
    layers = [nnx.BatchNorm(2, momentum=m, rngs=nnx.Rngs(0)) for m in (0.9, 0.9, 0.5)]
    assert path(layers[0], one) == path(layers[1], one) != path(layers[2], one)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.int8, np.bool_, np.float16])
def test_features_keep_their_type_and_shape(tmp_path, dtype):
    cache = FeatureCache(tmp_path)
    kind = lambda model, x: (x[:, :, None] > 3).astype(dtype)  # noqa: E731
    first, second = (cache("kind", kind, MODEL, DATA) for _ in range(2))
    assert first.dtype == second.dtype == dtype and second.shape == (7, 3, 1)
    np.testing.assert_array_equal(first, second)


def test_a_damaged_file_is_computed_anew_with_a_warning(tmp_path):
    cache, draw = FeatureCache(tmp_path), random.Random(0)
    counted = Counted()  # one function, so that it is compiled once
    wanted = cache("linear", counted, MODEL, DATA)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for _ in range(40):
        content = bytearray(whole[: draw.randrange(len(whole))] if draw.random() < 0.3 else whole)
        if content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = cache("linear", counted, MODEL, DATA)
        np.testing.assert_array_equal(found, wanted)
        # A bit that is not read, as the date of a member, may differ.
        assert (file.read_bytes() == bytes(content)) != bool(told)
        assert all(str(file) in str(w.message) for w in told)
        file.write_bytes(whole)
    file.write_bytes(b"")
    with pytest.warns(UserWarning, match="cannot be read.*computed anew"):
        found, rows = run(cache)
    assert sum(rows) == 7 and run(cache)[1] == []


def test_what_has_no_rows_or_no_bytes_is_refused(tmp_path):
    cache = FeatureCache(tmp_path)
    for data in ((), DATA[:0], np.float32(1), (DATA, DATA[:3])):
        with pytest.raises(ConfigError, match="leading axis"):
            run(cache, data=data)
    with pytest.raises(ConfigError, match=r"compute gave \(3,\) for 7 rows"):
        cache("sum", lambda m, x: x.sum(0), MODEL, DATA)
    with pytest.raises(FormatError, match="object"):
        run(cache, model={"a": object()})
    with pytest.raises(ConfigError, match="rows=0"):
        FeatureCache(tmp_path, rows=0)
    assert not list(tmp_path.iterdir())
