"""Our safetensors reader and writer against the `safetensors` package and against hostile files."""

import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from ffnlab.errors import FormatError
from ffnlab.formats import safetensors as st


def tensors():
    rng = np.random.default_rng(0)
    found = {}
    for dtype in st.DTYPES.values():
        values = rng.integers(0, 2, (3, 5)) if dtype == np.bool_ else rng.integers(0, 100, (3, 5))
        found[f"t.{dtype.name}"] = values.astype(dtype)
    found["scalar"] = np.array(1.5, np.float32)
    found["empty"] = np.zeros((0, 4), np.float32)
    return found


def write(file, arrays):
    st.write_file(file, {name: st.entry(array) for name, array in arrays.items()})


def raw_file(file, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    file.write_bytes(length.to_bytes(8, "little") + text + data)
    return file


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_every_dtype_round_trips(tmp_path):
    write(tmp_path / "a.safetensors", tensors())
    read = st.open_file(tmp_path / "a.safetensors")
    assert set(read.tensors) == set(tensors())
    for name, array in tensors().items():
        assert same(read.read(name), array), name


def test_the_official_reader_reads_what_we_write(tmp_path):
    write(tmp_path / "a.safetensors", tensors())
    official = dict(safetensors.deserialize((tmp_path / "a.safetensors").read_bytes()))
    assert {name: bytes(t["data"]) for name, t in official.items()} == {
        name: array.tobytes() for name, array in tensors().items()
    }
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_we_read_what_the_official_writer_writes(tmp_path):
    arrays = {k: v for k, v in tensors().items() if v.dtype.itemsize > 1 and "bfloat" not in k}
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors", {"who": "official"})
    read = st.open_file(tmp_path / "a.safetensors")
    assert all(same(read.read(name), array) for name, array in arrays.items())
    assert st.read_header(tmp_path / "a.safetensors")[1] == {"who": "official"}


def test_rows_are_read_alone(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(6, 4)
    write(tmp_path / "a.safetensors", {"x": array})
    read = st.open_file(tmp_path / "a.safetensors")
    assert np.array_equal(read.read("x", (2, 5)), array[2:5])
    assert read.read("x", (3, 3)).shape == (0, 4)
    with pytest.raises(ValueError, match="rows"):
        read.read("x", (2, 7))
    with pytest.raises(FormatError, match="no tensor 'y'"):
        read.read("y")


def test_shards_and_index_round_trip(tmp_path):
    arrays = {f"x{i}": np.full((4, 4), i, np.float32) for i in range(7)}
    entries = {name: st.entry(array) for name, array in arrays.items()}
    written = st.write_directory(tmp_path, entries, max_shard_bytes=130)
    assert written[-1] == st.INDEX_FILE and len(written) == 5
    read = st.open_directory(tmp_path)
    assert all(same(read.read(name), array) for name, array in arrays.items())
    # A single file written later must not leave shards behind, nor touch other files.
    (tmp_path / "model_notes.safetensors").write_bytes(b"mine")
    assert st.write_directory(tmp_path, entries) == [st.SINGLE_FILE]
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "model_notes.safetensors"]
    # And the other way round: a stale single file would be read instead of the index.
    st.write_directory(tmp_path, entries, max_shard_bytes=1)
    assert not (tmp_path / st.SINGLE_FILE).exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.safetensors"
    write(file, {"x": np.ones(3, np.float32)})
    before = file.read_bytes()
    lying = st.Entry(np.dtype(np.float32), (4,), lambda: np.ones(3, np.float32))
    with pytest.raises(FormatError, match="'x' was announced"):
        st.write_file(file, {"x": lying})
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]
    with pytest.raises(FormatError, match="'c'.*complex64"):
        write(file, {"c": np.zeros(1, np.complex64)})
    with pytest.raises(FormatError, match="int4"):
        write(file, {"c": np.zeros(1, ml_dtypes.int4)})


OK = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_HEADERS = {
    "not json": (b"{nonsense", b""),
    "an array": (b"[1, 2]", b""),
    "leading space": (b" {}", b""),
    "not utf-8": (b'{"\xff": 1}', b""),
    "duplicate keys": (b'{"x": 1, "x": 2}', b""),
    "NaN": (b'{"x": NaN}', b""),
    "infinite": (b'{"x": 1e999}', b""),
    "endless digits": (b'{"x": ' + b"9" * 5000 + b"}", b""),
    "deep nesting": (b'{"x": ' + b"[" * 200_000, b""),
    "metadata not strings": ({"__metadata__": {"a": 1}}, b""),
    "metadata not a map": ({"__metadata__": []}, b""),
    "entry not a map": ({"x": 3}, b""),
    "missing field": ({"x": {"dtype": "F32", "shape": [2]}}, b""),
    "extra field": ({"x": OK | {"more": 1}}, bytes(8)),
    "unknown dtype": ({"x": OK | {"dtype": "F128"}}, bytes(8)),
    "dtype not a string": ({"x": OK | {"dtype": ["F32"]}}, bytes(8)),
    "negative side": ({"x": OK | {"shape": [-2]}}, bytes(8)),
    "side true": ({"x": OK | {"shape": [True, 2]}}, bytes(8)),
    "side float": ({"x": OK | {"shape": [2.0]}}, bytes(8)),
    "shape a number": ({"x": OK | {"shape": 2}}, bytes(8)),
    "rank": ({"x": OK | {"shape": [1] * 40 + [2]}}, bytes(8)),
    "overflow": ({"x": OK | {"shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}, b""),
    "one offset": ({"x": OK | {"data_offsets": [0]}}, bytes(8)),
    "swapped offsets": ({"x": OK | {"data_offsets": [8, 0]}}, bytes(8)),
    "negative offset": ({"x": OK | {"data_offsets": [-8, 0]}}, bytes(8)),
    "wrong size": ({"x": OK | {"data_offsets": [0, 4]}}, bytes(4)),
    "past the end": ({"x": OK | {"shape": [2**40], "data_offsets": [0, 2**42]}}, bytes(8)),
    "gap at the start": ({"x": OK | {"data_offsets": [4, 12]}}, bytes(12)),
    "overlap": ({"x": OK, "y": OK | {"data_offsets": [4, 12]}}, bytes(12)),
    "same place": ({"x": OK, "y": OK}, bytes(8)),
    "trailing bytes": ({"x": OK}, bytes(9)),
    "truncated": ({"x": OK}, bytes(7)),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_name_the_file_and_the_tensor(tmp_path, case):
    header, data = BAD_HEADERS[case]
    file = raw_file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(FormatError, match=r"bad\.safetensors") as error:
        st.open_file(file)
    if isinstance(header, dict) and "x" in header and case != "trailing bytes":
        assert "'x'" in str(error.value) or "'y'" in str(error.value)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_lying_lengths_allocate_nothing(tmp_path, length):
    file = raw_file(tmp_path / "bad.safetensors", {"x": OK}, bytes(8), length)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"bad\.safetensors"):
            st.open_file(file)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_short_and_odd_files(tmp_path):
    file = tmp_path / "bad.safetensors"
    for content in (b"", b"1234567"):
        file.write_bytes(content)
        with pytest.raises(FormatError, match="at least 8"):
            st.open_file(file)
    with pytest.raises(FormatError, match="not a regular file"):
        st.open_file(tmp_path)
    with pytest.raises(FormatError, match="cannot be read"):
        st.open_file(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="not a regular file"):
        st.open_file(tmp_path / "pipe")


def test_a_file_that_shrinks_after_the_check(tmp_path):
    file = tmp_path / "a.safetensors"
    write(file, {"x": np.ones(100, np.float32)})
    read = st.open_file(file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(FormatError, match="'x' ends early"):
        read.read("x")


def index(directory, weight_map):
    (directory / st.INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "c:\\x", "a\0b"]
)
def test_index_entries_stay_in_the_directory(tmp_path, name):
    inner = tmp_path / "model"
    inner.mkdir()
    write(tmp_path / "a.safetensors", {"x": np.ones(2, np.float32)})
    index(inner, {"x": name})
    with pytest.raises(FormatError, match="not a plain file name"):
        st.open_directory(inner)


def test_links_stay_in_the_directory(tmp_path):
    inner = tmp_path / "model"
    inner.mkdir()
    write(tmp_path / "a.safetensors", {"x": np.ones(2, np.float32)})
    (inner / "b.safetensors").symlink_to(tmp_path / "a.safetensors")
    index(inner, {"x": "b.safetensors"})
    with pytest.raises(FormatError, match="leaves the directory"):
        st.open_directory(inner)
    (inner / "model.safetensors").symlink_to("loop.safetensors")
    (inner / "loop.safetensors").symlink_to("model.safetensors")
    with pytest.raises(FormatError):
        st.open_directory(inner)


def test_the_hub_cache_is_a_directory_of_links(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "0a1b", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write(blobs / "ff00", {"x": np.ones(2, np.float32)})
    (snapshot / "model.safetensors").symlink_to("../../blobs/ff00")
    assert st.open_directory(snapshot).read("x").tolist() == [1, 1]


def test_index_and_shards_must_agree(tmp_path):
    write(tmp_path / "a.safetensors", {"x": np.ones(2, np.float32), "y": np.ones(1, np.float32)})
    index(tmp_path, {"x": "a.safetensors"})
    with pytest.raises(FormatError, match="'y': the index does not list it"):
        st.open_directory(tmp_path)
    index(tmp_path, dict.fromkeys("xyz", "a.safetensors"))
    with pytest.raises(FormatError, match="'z': the index lists it"):
        st.open_directory(tmp_path)
    index(tmp_path, {"x": "gone.safetensors"})
    with pytest.raises(FormatError, match=r"gone\.safetensors"):
        st.open_directory(tmp_path)
    for bad in ({"x": 1}, ["x"], None):
        index(tmp_path, bad)
        with pytest.raises(FormatError, match="weight_map"):
            st.open_directory(tmp_path)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(FormatError, match="neither"):
        st.open_directory(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FormatError, match="never read"):
        st.open_directory(tmp_path)
