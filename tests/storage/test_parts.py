"""Trees in parts: the same bits back from any parts that hold enough, and a word of those that do
not."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ffnlab.errors import DamagedError, FormatError
from ffnlab.storage import parts
from ffnlab.storage.parts import Piece, begin_part, covers, read_part, restore_parts

DEVICES = np.array(jax.devices()[:8]).reshape(4, 2)
MESH, GRID = Mesh(DEVICES, ("a", "b")), PartitionSpec("a", "b")


class Tree(NamedTuple):
    weights: jax.Array
    key: jax.Array
    host: np.ndarray
    step: int
    rate: float


def tree(spec=GRID, dtype=jnp.float32) -> Tree:
    values = jnp.arange(8 * 6).reshape(8, 6).astype(dtype)
    weights = jax.device_put(values, NamedSharding(MESH, spec))
    key = jax.device_put(jax.random.key(7), NamedSharding(MESH, PartitionSpec()))
    return Tree(weights, key, np.arange(3, dtype=np.int16), 5, 0.1)


def saved(folder, what) -> parts.Part:
    begin_part(folder, what, {"step": 1})()
    return read_part(folder)


def content(what: Tree) -> list[bytes]:
    key = jax.random.key_data(what.key)
    return [np.asarray(x).tobytes() for x in (what.weights, key, what.host)] + [
        what.step,
        what.rate,
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn", "int4", "bool"])
def test_the_same_bits_whatever_the_dtype_and_the_new_place(tmp_path, dtype):
    original = tree(dtype=dtype)
    part = saved(tmp_path, original)
    assert part.about == {"step": 1}
    for spec in (PartitionSpec(), PartitionSpec("a"), PartitionSpec(None, "b"), PartitionSpec("b")):
        like = tree(spec, dtype)
        assert covers([part], like)
        found = restore_parts([part], like)
        assert content(found) == content(original)
        assert found.weights.sharding == like.weights.sharding and found.key.dtype == like.key.dtype
    abstract = jax.eval_shape(lambda: {"w": jnp.zeros((8, 6), dtype)})
    assert covers([saved(tmp_path / "w", {"w": original.weights})], abstract)


@settings(max_examples=25, deadline=None)
@given(rows=st.sampled_from([1, 2, 4]), columns=st.sampled_from([1, 2, 3]), seed=st.integers(0, 99))
def test_pieces_of_any_grid_are_put_together(tmp_path_factory, rows, columns, seed):
    values = np.random.default_rng(seed).integers(0, 100, (4, 6)).astype(np.int32)
    folder = tmp_path_factory.mktemp("grid")
    whole = saved(folder, {"w": values})
    cuts = [
        (Piece((i, j), (4 // rows, 6 // columns), 0))
        for i in range(0, 4, 4 // rows)
        for j in range(0, 6, 6 // columns)
    ]
    each = []
    for n, cut in enumerate(cuts):  # each piece in a part of its own
        own = folder / str(n)
        inside = tuple(slice(s, s + k) for s, k in zip(cut.start, cut.shape, strict=True))
        one = saved(own, {"w": np.ascontiguousarray(values[inside])})
        each.append(one._replace(tree=whole.tree, pieces=[[cut]]))
    np.testing.assert_array_equal(restore_parts(each, {"w": values * 0})["w"], values)
    assert covers(each, {"w": values}) and not covers(each[1:], {"w": values})
    assert covers([*each, *each], {"w": values})  # twice the same adds nothing


def test_a_process_needs_only_what_its_devices_hold(tmp_path):
    original = {"w": tree().weights}
    part = saved(tmp_path, original)
    first = jax.device_put(np.zeros((8, 6), np.float32), NamedSharding(MESH, PartitionSpec("a")))
    upper = [p for p in part.pieces[0] if p.start[0] < 6]
    assert not covers([part._replace(pieces=[upper])], {"w": first})
    one = NamedSharding(Mesh(DEVICES[:1, :1], ("a", "b")), PartitionSpec("a", "b"))
    alone = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=one)
    assert covers([part], {"w": alone}) and not covers(
        [part._replace(pieces=[upper])], {"w": alone}
    )


def test_damage_and_other_trees_are_named(tmp_path):
    original = tree()
    part = saved(tmp_path, original)
    with pytest.raises(FormatError, match="does not hold the tree asked for"):
        restore_parts([part], original._replace(weights=jnp.zeros((8, 7))))
    file = tmp_path / parts.PIECES
    bytes_ = bytearray(file.read_bytes())
    bytes_[17] ^= 1
    file.write_bytes(bytes_)
    with pytest.raises(DamagedError, match=r"pieces\.bin is not the file that was written"):
        restore_parts([part], original)
    file.unlink()
    with pytest.raises(DamagedError, match=r"pieces\.bin cannot be read"):
        restore_parts([part], original)
    sidecar = tmp_path / "tree.json"
    text = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(text | {"pieces": []}))
    with pytest.raises(DamagedError, match="its sum is another"):
        read_part(tmp_path)
    sidecar.unlink()
    with pytest.raises(DamagedError, match="is not a checkpoint"):
        read_part(tmp_path)


def test_a_part_that_was_begun_and_not_ended_is_none(tmp_path):
    write = begin_part(tmp_path / "new", tree(), {})
    assert not (tmp_path / "new").exists()
    write()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["pieces.bin", "tree.json"]


def test_what_was_held_when_it_was_begun_is_what_is_written(tmp_path):
    held = jnp.arange(4.0)
    write = begin_part(tmp_path, {"w": held}, {})
    jax.jit(lambda x: x * 0, donate_argnums=0)(held).block_until_ready()
    write()
    np.testing.assert_array_equal(
        restore_parts([read_part(tmp_path)], {"w": np.zeros(4, np.float32)})["w"], np.arange(4.0)
    )
