"""Mutated safetensors files: a correct load or FormatError, never anything else.

"Correct" is decided by the official parser: what we accept, it accepts with the same tensors.
"""

import json
import os

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hs

from ffnlab.errors import FormatError
from ffnlab.formats import safetensors as st

SETTINGS = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
}
VALID = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
    "c": {"dtype": "F8_E4M3", "shape": [2, 1], "data_offsets": [34, 36]},
    "d": {"dtype": "I64", "shape": [], "data_offsets": [36, 44]},
    "e": {"dtype": "BOOL", "shape": [0, 7], "data_offsets": [44, 44]},
    "__metadata__": {"format": "pt"},
}
DATA = bytes(range(1, 45))
HUGE = hs.sampled_from([2**31, 2**32, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30])
COUNTS = hs.one_of(hs.integers(-3, 60), HUGE)
JUNK = hs.one_of(
    hs.none(),
    hs.booleans(),
    COUNTS,
    hs.text(max_size=4),
    hs.floats(),
    hs.builds(list),
    hs.builds(dict),
)
VALUES = {
    "dtype": hs.one_of(hs.sampled_from([*st.DTYPES, "F4", "f32", ""]), JUNK),
    "shape": hs.one_of(hs.lists(COUNTS, max_size=5), hs.lists(JUNK, max_size=3), JUNK),
    "data_offsets": hs.one_of(hs.lists(COUNTS, min_size=2, max_size=2), JUNK),
}
# Text that the header's own JSON writer would never produce, put in the place of a value.
RAW_VALUES = ["NaN", "Infinity", "-0", "1e400", "0x10", "9" * 5000, "[" * 5000, '{"a":1,"a":2}', ""]


def encode(header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + data


@hs.composite
def lying_header(draw):
    header = {name: dict(entry) for name, entry in VALID.items()}
    for _ in range(draw(hs.integers(1, 3))):
        name = draw(hs.sampled_from(list(VALID)))
        if draw(hs.booleans()) and isinstance(header.get(name), dict):
            field = draw(hs.sampled_from(list(VALUES)))
            header[name][field] = draw(VALUES[field])
        else:
            header[draw(hs.one_of(hs.just(name), hs.text(max_size=3)))] = draw(
                hs.one_of(JUNK, hs.builds(lambda: dict(VALID["a"])))
            )
    return encode(header, DATA)


@hs.composite
def odd_json(draw):
    text = json.dumps(VALID)
    spots = [i for i, c in enumerate(text) if c in "0123456789[{"]
    spot = draw(hs.sampled_from(spots))
    text = text[:spot] + draw(hs.sampled_from(RAW_VALUES)) + text[spot + 1 :]
    return encode(text.encode(), DATA)


@hs.composite
def duplicate_keys(draw):
    text = json.dumps(VALID)[:-1]
    name = draw(hs.sampled_from([*VALID, "f"]))
    value = json.dumps(draw(hs.sampled_from(list(VALID.values()))))
    return encode(f'{text}, "{name}": {value}}}'.encode(), DATA)


@hs.composite
def damaged_bytes(draw):
    content = bytearray(encode(VALID, DATA))
    for _ in range(draw(hs.integers(1, 4))):
        kind = draw(hs.sampled_from(["flip", "cut", "grow", "set", "length"]))
        spot = draw(hs.integers(0, max(len(content) - 1, 0)))
        if kind == "flip" and content:
            content[spot] ^= 1 << draw(hs.integers(0, 7))
        elif kind == "set" and content:
            content[spot] = draw(hs.integers(0, 255))
        elif kind == "cut":
            del content[spot:]
        elif kind == "grow":
            content += draw(hs.binary(max_size=40))
        elif kind == "length":
            content[:8] = draw(hs.integers(0, 2**64 - 1)).to_bytes(8, "little")
    return bytes(content)


OTHER_DATA = hs.binary(min_size=len(DATA), max_size=len(DATA))
HOSTILE = hs.one_of(
    damaged_bytes(),
    lying_header(),
    odd_json(),
    duplicate_keys(),
    hs.binary(max_size=64),
    OTHER_DATA.map(lambda data: encode(VALID, data)),  # these load
)


def check(file, content):
    """Returns whether the file loaded."""
    file.write_bytes(content)
    try:
        read = st.open_file(file)
        arrays = {name: read.read(name) for name in read.tensors}
    except FormatError as error:
        assert file.name in str(error)
        return False
    try:
        official = dict(safetensors.deserialize(content))
    except safetensors.SafetensorError:
        assert b"-0" in content  # JSON for zero, but not a count to the official parser
        return True
    assert arrays.keys() == official.keys()
    for name, array in arrays.items():
        assert list(array.shape) == official[name]["shape"]
        if array.dtype == np.bool_:
            array = np.frombuffer(bytes(official[name]["data"]), np.uint8) != 0
            assert np.array_equal(array, read.read(name).reshape(-1))
        else:
            assert array.tobytes() == bytes(official[name]["data"])
    return True


def run(tmp_path, count):
    file, seen = tmp_path / "fuzz.safetensors", {True: 0, False: 0}

    @settings(max_examples=count, **SETTINGS)
    @given(HOSTILE)
    def mutate(content):
        seen[check(file, content)] += 1

    mutate()
    assert sum(seen.values()) >= count
    # Both outcomes must occur, or the mutations test nothing.
    assert min(seen.values()) > count // 100, seen


def test_2500_mutated_files(tmp_path):
    assert check(tmp_path / "valid.safetensors", encode(VALID, DATA))
    run(tmp_path, 2500)


@pytest.mark.fuzz
def test_many_mutated_files(tmp_path):
    run(tmp_path, int(os.environ.get("FFNLAB_FUZZ", "50000")))


WEIGHT_MAP = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
NAMES = hs.one_of(
    hs.sampled_from(
        ["../out.safetensors", "/etc/passwd", ".", "..", "", "link.safetensors", "gone", "a\0"]
    ),
    hs.sampled_from(list(WEIGHT_MAP.values())),
    hs.text(max_size=8),
    JUNK,
)


@settings(max_examples=400, **SETTINGS)
@given(
    hs.one_of(
        hs.dictionaries(hs.sampled_from(["x", "y", "z"]), NAMES, max_size=3).map(
            lambda found: json.dumps({"weight_map": WEIGHT_MAP | found}).encode()
        ),
        hs.tuples(hs.integers(0, 90), hs.integers(0, 255)).map(
            lambda spot: bytes(
                spot[1] if i == spot[0] else byte
                for i, byte in enumerate(json.dumps({"weight_map": WEIGHT_MAP}).encode())
            )
        ),
        JUNK.map(lambda junk: json.dumps(junk).encode()),
    )
)
def test_mutated_indices(tmp_path_factory, content):
    directory = tmp_path_factory.getbasetemp() / "index"
    if not directory.exists():
        directory.mkdir()
        for value, (name, file) in enumerate(WEIGHT_MAP.items()):
            st.write_file(directory / file, {name: st.entry(np.full(2, value, np.float32))})
        outside = directory.parent / "out.safetensors"
        st.write_file(outside, {"z": st.entry(np.zeros(1, np.float32))})
        (directory / "link.safetensors").symlink_to(outside)
    (directory / st.INDEX_FILE).write_bytes(content)
    try:
        read = st.open_directory(directory)
    except FormatError as error:
        assert "index" in str(error)
    else:
        assert all(info.file.parent == directory for info in read.tensors.values())
        assert all(read.read(name).shape == (2,) for name in read.tensors)
