"""Mutated native directories: a tree that can be saved again, or FormatError, nothing else."""

import copy
import json
import os

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs

from ffnlab import layers, weights
from ffnlab.errors import FormatError
from ffnlab.formats import safetensors as st
from ffnlab.formats.directory import NATIVE_FILE
from ffnlab.formats.native import schema
from ffnlab.formats.native.read import load
from ffnlab.formats.native.write import save
from ffnlab.storage import structure
from ffnlab.testing import tiny
from tests.contracts import WEIGHTS
from tests.formats.test_fuzz_safetensors import COUNTS, JUNK, SETTINGS

NAMES = hs.sampled_from(
    [*schema.listed(), *schema.CONTAINERS, "type", "static", "children", "fields", "same", "dtype"]
)
VALUES = hs.one_of(
    JUNK, COUNTS, NAMES, hs.sampled_from(["_pytree__nodes", "__class__", "w.value.w", "stored"])
)


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """A directory with attention, packed weights, tied arrays and containers in it."""
    folder = tmp_path_factory.mktemp("valid")
    norm = layers.RMSNorm(2)
    key = jax.random.key(0)
    model = {
        "attn": tiny().layers[0].attn,
        "tied": [norm, (norm,)],
        "packed": layers.Linear(24, 16, key=key, axes=("embed", "mlp")).replace(
            WEIGHTS["Int4"](key)
        ),
        "lora": weights.LoRA.init(WEIGHTS["Masked"](key), 2, key),
        "mlp": layers.MLP((3, 2), key=key),
        "int4": np.zeros(3, "int4"),
    }
    save(model, folder)
    return folder


def places(value, where=()):
    """Every place in a JSON value, as a tuple of keys."""
    yield where
    held = dict(enumerate(value)) if isinstance(value, list) else value
    for key, inner in held.items() if isinstance(held, dict) else ():
        yield from places(inner, (*where, key))


def at(value, where):
    """What is at a place."""
    for key in where:
        value = value[key]
    return value


@hs.composite
def lies(draw, content, paths):
    """The JSON with some of its values exchanged, dropped, renamed, or moved elsewhere."""
    content = copy.deepcopy(content)
    for _ in range(draw(hs.integers(1, 3))):
        where = draw(hs.sampled_from(paths))
        kind = draw(hs.sampled_from(["set", "drop", "move", "rename", "add"]))
        try:
            holder = at(content, where[:-1]) if where else content
            if kind == "set" and where:
                holder[where[-1]] = draw(VALUES)
            elif kind == "drop" and where:
                del holder[where[-1]]
            elif kind == "move" and where:
                holder[where[-1]] = copy.deepcopy(at(content, draw(hs.sampled_from(paths))))
            elif kind == "rename" and where and isinstance(holder, dict):
                holder[str(draw(VALUES))] = holder.pop(where[-1])
            elif isinstance(holder, dict):
                holder[str(draw(VALUES))] = draw(VALUES)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change has taken the place away
    return json.dumps(content).encode()


@hs.composite
def damaged(draw, content):
    """Bytes with some of them flipped, set, cut off or added."""
    content = bytearray(content)
    for _ in range(draw(hs.integers(1, 3))):
        spot = draw(hs.integers(0, max(len(content) - 1, 0)))
        kind = draw(hs.sampled_from(["flip", "set", "cut", "grow"]))
        if kind == "flip" and content:
            content[spot] ^= 1 << draw(hs.integers(0, 7))
        elif kind == "set" and content:
            content[spot] = draw(hs.sampled_from(list(b'0129-"[]{},:')))
        elif kind == "cut" and draw(hs.booleans()):
            del content[spot:]
        elif kind == "grow":
            content[spot:spot] = draw(hs.sampled_from([b"[", b"null,", b"9" * 5000, b"{" * 3000]))
    return bytes(content)


def check(folder, again):
    """Returns whether the directory loaded; what did is a tree that can be saved and loaded."""
    try:
        found = load(folder)
    except FormatError as error:
        assert str(folder.name) in str(error)
        return False
    save(found, again)
    assert structure.describe(load(again)) == structure.describe(found)
    assert jax.tree.structure(load(again)) == jax.tree.structure(found)
    return True


def run(valid, tmp_path, count):
    """Loads as many mutated directories."""
    text, tensors = ((valid / name).read_bytes() for name in (NATIVE_FILE, st.SINGLE_FILE))
    content = json.loads(text)
    folder, again = tmp_path / "mutated", tmp_path / "again"
    folder.mkdir()
    seen = {True: 0, False: 0}
    files = hs.one_of(
        hs.tuples(lies(content, list(places(content))), hs.just(tensors)),
        hs.tuples(damaged(json.dumps(content).encode()), hs.just(tensors)),
        hs.tuples(hs.just(text), damaged(tensors)),
    )

    @settings(max_examples=count, **SETTINGS)
    @given(files)
    def mutate(pair):
        for name, written in zip((NATIVE_FILE, st.SINGLE_FILE), pair, strict=True):
            (folder / name).write_bytes(written)
        seen[check(folder, again)] += 1

    mutate()
    assert sum(seen.values()) >= count
    # Both outcomes must occur, or the mutations test nothing.
    assert min(seen.values()) > count // 100, seen


def test_the_directory_loads_unless_it_is_mutated(valid, tmp_path):
    assert check(valid, tmp_path / "again")


def test_50_mutated_directories(valid, tmp_path):
    run(valid, tmp_path, 50)


@pytest.mark.fuzz
def test_many_mutated_directories(valid, tmp_path):
    run(valid, tmp_path, int(os.environ.get("FFNLAB_FUZZ", "2000")))
