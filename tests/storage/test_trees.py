"""Tests of ffnlab.storage.trees: any tree comes back equal, and never in place of another tree."""

import dataclasses
import os
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from ffnlab import compat
from ffnlab.errors import DamagedError, FormatError
from ffnlab.storage import npz, trees
from ffnlab.storage.files import sealed, verify, write_json

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int4", "int8"]
DTYPES += ["int32", "uint8", "uint32", "bool", "complex64"]


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Packed:
    """Stands for a weight: two arrays and a static group size."""

    codes: jax.Array
    scales: jax.Array
    group: int = 32

    def tree_flatten_with_keys(self):
        keys = [jax.tree_util.GetAttrKey(name) for name in ("codes", "scales")]
        return list(zip(keys, (self.codes, self.scales), strict=True)), self.group

    @classmethod
    def tree_unflatten(cls, group, children):
        return cls(*children, group)


class Net(nnx.Module):
    """A module with a list, an absent part, a static field and a packed weight in a Param."""

    def __init__(self, group=32, width=8, axes=("embed", "mlp"), eps=1e-5):
        codes = jnp.arange(width * 4, dtype=jnp.int8).reshape(width, 4).astype(jnp.int4)
        self.up = nnx.Param(Packed(codes, jnp.ones((1, 4), jnp.bfloat16), group), axes=axes)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2)])
        self.bias = nnx.data(None)
        self.eps = eps


class Stats(NamedTuple):
    """Stands for a transform's statistics."""

    count: jax.Array
    hessian: dict
    key: jax.Array
    note: str


def stats(key):
    hessian = {"up": jnp.ones((3, 3)), "down": np.arange(4, dtype=np.float64) / 3}
    return Stats(jnp.int32(7), hessian, key, "pass 1")


def bits(leaf):
    """A leaf as comparable bytes with its dtype and shape."""
    if not hasattr(leaf, "dtype"):
        return repr(leaf)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return str(array.dtype), array.shape, array.tobytes()


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        assert bits(x) == bits(y)


def saved(folder, tree):
    trees.save(folder, tree)
    return folder


def examples(key):
    sample = np.arange(-3, 3).reshape(2, 3)
    return {
        "module": Net(),
        "stats": stats(key),
        "dtypes": {d: jnp.asarray(sample).astype(d) for d in DTYPES},
        "numpy": [sample.astype(ml_dtypes.int4), sample.astype(np.float64), np.float32(2)],
        "keys": (jax.random.split(key, 3), jax.random.key(1, impl="rbg"), key),
        "scalars": [True, 3, 2.5, float("inf"), 1j, "text", None, 10**30, np.float64(0.1)],
        "empty": {"none": {}, "no rows": jnp.zeros((0, 4), jnp.bfloat16), "no keys": key[None][:0]},
        "nothing": (),
    }


NAMES = list(examples(jax.random.key(0)))


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(tmp_path, key, name):
    tree = examples(key)[name]
    trees.save(tmp_path / "tree", tree)
    assert_same(trees.restore(tmp_path / "tree", tree), tree)


@pytest.mark.parametrize("name", ["module", "dtypes", "keys"])
def test_restore_into_an_abstract_tree(tmp_path, key, name):
    tree = examples(key)[name]
    like = jax.eval_shape(lambda: tree)
    assert_same(trees.restore(saved(tmp_path / "tree", tree), like), tree)


@pytest.mark.parametrize("name", NAMES)
def test_stats_round_trip(tmp_path, key, name):
    tree = examples(key)[name]
    npz.save_stats(tmp_path / "a.npz", tree)
    assert os.listdir(tmp_path) == ["a.npz"]
    assert_same(npz.load_stats(tmp_path / "a.npz", tree), tree)


@pytest.mark.parametrize("abstract", [False, True])
def test_sharding_is_that_of_like(tmp_path, abstract):
    mesh = compat.make_mesh((8,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    folder = saved(tmp_path / "a", {"w": jnp.arange(16.0)})
    like = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding)
    if not abstract:
        like = jax.device_put(jnp.zeros(16), sharding)
    restored = trees.restore(folder, {"w": like})["w"]
    assert restored.sharding == sharding
    assert (restored == jnp.arange(16.0)).all()
    # And back to one device, from a sharded save.
    again = trees.restore(saved(tmp_path / "b", {"w": restored}), {"w": jnp.zeros(16)})["w"]
    assert len(again.devices()) == 1 and not again.committed


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (lambda: Net(group=99), r"up\.value\.group is 32 in the file and 99 in `like`"),
        (lambda: Net(width=16), r"up\.value\.codes\.shape is \[8, 4\] in the file and \[16, 4\]"),
        (lambda: Net(axes=("embed", "heads")), r"up\.axes is \['embed', 'mlp'\] in the file"),
        (lambda: Net(eps=1e-6), r"the root\.eps is 1e-05 in the file and 1e-06"),
        (lambda: {"a": 1}, r"the root\.type is 'Net' in the file and 'dict'"),
    ],
    ids=["static field", "shape", "axis names", "module field", "type"],
)
def test_another_tree_is_refused(tmp_path, like, message):
    folder = saved(tmp_path / "net", Net())
    with pytest.raises(FormatError, match=message):
        trees.restore(folder, like())


def test_another_dtype_is_refused(tmp_path):
    folder = saved(tmp_path / "a", {"w": jnp.ones(2, jnp.int8)})
    with pytest.raises(FormatError, match=r"\['w'\]\.dtype is 'int8' in the file and 'int4'"):
        trees.restore(folder, {"w": jnp.ones(2, jnp.int4)})
    with pytest.raises(FormatError, match=r"\['w'\]\.python"):
        trees.restore(folder, {"w": 3})


def test_missing_and_extra_leaves_are_listed_together(tmp_path):
    folder = saved(tmp_path / "a", {"w": jnp.ones(2), "old": jnp.ones(2)})
    with pytest.raises(FormatError) as caught:
        trees.restore(folder, {"w": jnp.ones(2), "new": jnp.ones(2)})
    assert "['old'] is in the file and not in `like`" in str(caught.value)
    assert "['new'] is in `like` and not in the file" in str(caught.value)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jnp.ones(2, jnp.uint4), r"\['bad'\] is uint4"),
        (object(), r"\['bad'\]: cannot store a leaf of type object"),
        (np.array([object()]), r"\['bad'\]: cannot store an array of Python objects"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), r"\['bad'\] is abstract"),
    ],
    ids=["uint4", "object", "object array", "abstract"],
)
def test_what_cannot_be_stored_is_named(tmp_path, leaf, message):
    with pytest.raises(FormatError, match=message):
        trees.save(tmp_path / "a", {"bad": leaf})
    assert not (tmp_path / "a").exists()


def test_interrupted_save_keeps_the_earlier_tree(tmp_path, monkeypatch):
    folder = saved(tmp_path / "a", {"w": jnp.ones(2)})

    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trees, "write_json", fail)
        trees.save(folder, {"w": jnp.zeros(2)})
    assert (trees.restore(folder, {"w": jnp.ones(2)})["w"] == 1).all()
    trees.save(folder, {"w": jnp.full(2, 5.0)})
    assert (trees.restore(folder, {"w": jnp.ones(2)})["w"] == 5).all()
    assert sorted(os.listdir(folder)) == ["arrays-3", "tree.json"]


def test_arrays_of_another_format_are_not_written_over(tmp_path, monkeypatch):
    """They belong to a tree that another version can restore, until the new one is whole."""
    folder = saved(tmp_path / "a", {"w": jnp.ones(2)})
    sidecar = trees.read_sidecar(folder) | {"format": 99}
    write_json(folder / "tree.json", sealed(sidecar))
    trees.begin_save(folder, {"w": jnp.zeros(2)})
    verify(folder / "arrays-1", sidecar["files"])


def test_no_checkpoint(tmp_path):
    with pytest.raises(FormatError, match=r"is not a checkpoint: it has no tree\.json"):
        trees.restore(tmp_path, {"w": jnp.ones(2)})


def lie(folder, **change):
    """Changes a sidecar and its sum, as damage does not."""
    write_json(folder / "tree.json", sealed(trees.read_sidecar(folder) | change))


def test_lying_checkpoint(tmp_path):
    like = {"w": jnp.ones(2)}
    folder = saved(tmp_path / "a", like)
    for arrays in ("../a", "arrays-1/..", 3, None):
        lie(folder, arrays=arrays)
        with pytest.raises(FormatError, match="not the name of an arrays folder"):
            trees.restore(folder, like)
    lie(folder, arrays="arrays-1", about=[])
    with pytest.raises(FormatError, match="'about' is list, not an object"):
        trees.restore(folder, like)
    lie(folder, about={}, format=99)
    with pytest.raises(FormatError, match="is of format 99, and this version of ffnlab reads 2"):
        trees.restore(folder, like)


def test_missing_arrays(tmp_path):
    folder = saved(tmp_path / "a", {"w": jnp.ones(2)})
    shutil.rmtree(folder / "arrays-1")
    with pytest.raises(DamagedError, match=r"arrays-1/\S+ is missing"):
        trees.restore(folder, {"w": jnp.ones(2)})


@pytest.mark.parametrize(
    "change",
    [
        {"leaves": 3},
        {"leaves": [3]},
        {"leaves": [{"path": "['w']"}] * 2},
        {"nodes": None},
        {"leaves": []},
        {"format": 99},
    ],
)
def test_lying_description(tmp_path, change):
    folder = saved(tmp_path / "a", {"w": jnp.ones(2)})
    lie(folder, tree=trees.read_sidecar(folder)["tree"] | change)
    with pytest.raises(FormatError) as found:
        trees.restore(folder, {"w": jnp.ones(2)})
    assert not isinstance(found.value, DamagedError), "its sum is right"
    lie(folder, tree=None)
    with pytest.raises(FormatError, match="format 'NoneType' is not 1"):
        trees.restore(folder, {"w": jnp.ones(2)})


def test_what_a_tree_is_saved_with_is_that_of_the_moment(tmp_path):
    about = {"a": [1.5]}
    end = trees.begin_save(tmp_path, {"w": jnp.ones(2)}, about)
    about["a"].append(2)
    end()
    found, told = trees.restore_about(tmp_path, {"w": jnp.zeros(2)})
    assert told == {"a": [1.5]} and (found["w"] == 1).all()
    with pytest.raises(ValueError, match="not JSON compliant"):
        trees.begin_save(tmp_path, {"w": jnp.ones(2)}, {"a": float("nan")})


def test_arguments_are_untouched(tmp_path, key):
    tree = stats(key)
    before = [bits(leaf) for leaf in jax.tree.leaves(tree)]
    trees.restore(saved(tmp_path / "a", tree), tree)
    assert before == [bits(leaf) for leaf in jax.tree.leaves(tree)]


def test_stats_of_another_shape_are_refused(tmp_path):
    npz.save_stats(tmp_path / "a.npz", {"n": jnp.ones(3)})
    with pytest.raises(FormatError, match=r"\['n'\]\.shape is \[3\] in the file and \[4\]"):
        npz.load_stats(tmp_path / "a.npz", {"n": jnp.ones(4)})


def test_stats_header_that_lies_about_its_size(tmp_path):
    good = {"n": np.ones(3)}
    npz.save_stats(tmp_path / "a.npz", good)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        tree = archive["tree"]
    np.savez(tmp_path / "b.npz", **{"tree": tree, "0": np.ones(4)})
    with pytest.raises(FormatError, match=r"0\.npy has float64\[4\], not float64\(3,\)"):
        npz.load_stats(tmp_path / "b.npz", good)


def test_missing_stats(tmp_path):
    with pytest.raises(FileNotFoundError):
        npz.load_stats(tmp_path / "a.npz", ())


@given(data=st.data())
def test_mutated_stats_load_or_raise_format_error(tmp_path_factory, data):
    like = {"a": np.arange(6, dtype=np.float32), "b": 3}
    path = tmp_path_factory.getbasetemp() / "fuzz.npz"
    npz.save_stats(path, like)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        loaded = npz.load_stats(path, like)
    except FormatError:
        return
    assert loaded["a"].shape == (6,) and type(loaded["b"]) is int
