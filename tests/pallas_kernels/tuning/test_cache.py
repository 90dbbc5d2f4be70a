"""Tuned configurations: which file and entry a call takes, and what becomes of a bad one."""

import json
import threading
import warnings

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import backend
from pallas_kernels.aot import topology
from pallas_kernels.sparse import blocks
from pallas_kernels.tuning import cache
from pallas_kernels.w4a8 import plan

CALL = plan.Call("matmul", "sm90", 16, 4096, 4096)
BEST = {"tile_m": 32, "columns": 64, "stages": 8, "k_tiles": 1, "split_k": 1, "cluster": 1}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The user's and the shipped file, neither there yet; nothing is remembered before or after."""
    user, shipped = tmp_path / "cache" / "user.json", tmp_path / "shipped.json"
    monkeypatch.setenv(cache.VARIABLE, str(user))
    monkeypatch.setattr(cache, "SHIPPED", shipped)
    cache.reload()
    yield user, shipped
    cache.reload()


def entry(m=16, config=BEST, call=CALL, us=1.0, **change):
    """An `Entry` of a call on this device."""
    named = cache.key(f"w4a8.{call.op}", m, call.facts)._replace(**change)
    return cache.Entry(named, config, us, 2.0, "2026-11-24")


def picked(call=CALL, m=16):
    """The `Config` a call of m tokens takes."""
    return plan.pick(plan.dataclasses.replace(call, m=m), 100)


def test_without_files_the_heuristic_is_taken_and_nothing_is_said(files):
    assert picked() == plan.choose(16, 4096, 4096, cores=100)
    assert cache.load() == {} and not files[0].exists()


def test_an_entry_is_taken_by_its_bucket_and_by_near_ones(files):
    user, _ = files
    cache.record(entry(), user)
    cache.record(entry(64, BEST | {"tile_m": 64}), user)
    cache.reload()
    tuned = plan.Config(32, 64, 2, 8, 1, 1, 1, 100)
    assert picked() == picked(m=9) == picked(m=4) == tuned
    assert picked(m=17).tile_m == 64  # 32 lies between: the larger of two as near
    assert picked(m=256).tile_m == 64
    assert picked(m=3) == tuned  # 4 is two buckets below
    assert picked(m=2) == plan.choose(2, 4096, 4096, cores=100)  # and 2 is three
    assert picked(m=257) == plan.choose(257, 4096, 4096, cores=100)


@pytest.mark.parametrize(
    "change",
    [{"n": 8192}, {"k": 2048}, {"encoding": "tc"}, {"scales": "float32"}, {"out": "float32"}],
)
def test_another_call_takes_no_entry(files, change):
    cache.record(entry(), files[0])
    cache.reload()
    other = plan.dataclasses.replace(CALL, **change)
    assert picked(other) == plan.heuristic(other, 100)


@pytest.mark.parametrize(
    "change",
    [{"device": "NVIDIA H200"}, {"jax": "0.9"}, {"op": "w4a8.glu"}, {"sources": "0" * 16}],
)
def test_another_device_jax_or_kernel_takes_no_entry(files, change):
    cache.record(entry(**change), files[0])
    cache.reload()
    assert picked() == plan.heuristic(CALL, 100)


def test_the_digest_is_of_the_kernels_own_sources(monkeypatch, tmp_path):
    for path in ("_compat.py", "w4a8/sm90.py", "sparse/mosaic.py", "tuning/cache.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("1\n")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "tuning" / "cache.py"))

    def digests():
        cache.sources.cache_clear()
        return cache.sources("w4a8"), cache.sources("sparse")

    first = digests()
    (tmp_path / "w4a8" / "sm90.py").write_text("2\n")
    second = digests()
    assert second[0] != first[0] and second[1] == first[1] != first[0]
    (tmp_path / "_compat.py").write_text("2\n")
    third = digests()
    assert third[0] != second[0] and third[1] != second[1] and digests() == third
    monkeypatch.undo()
    cache.sources.cache_clear()


def test_the_device_is_the_one_that_is_traced_for(files):
    cache.record(entry(device="NVIDIA H200"), files[0])
    cache.reload()
    with topology.abstract_mesh("h200", 1, "x"):
        assert backend.device_kind() == "NVIDIA H200"
        assert picked().stages == 8
    assert backend.device_kind() == jax.devices()[0].device_kind


def test_the_users_file_wins_and_the_shipped_one_serves_where_it_is_bad(files):
    user, shipped = files
    cache.record(entry(config=BEST | {"stages": 4}), shipped)
    cache.reload()
    assert picked().stages == 4
    cache.record(entry(), user)
    assert picked().stages == 4  # files are read once
    cache.reload()
    assert picked().stages == 8
    cache.record(entry(config=BEST | {"k_tiles": 3}), user)
    cache.reload()
    with pytest.warns(UserWarning, match="user.json, entry 0: k_tiles"):
        assert picked().stages == 4
    assert picked().stages == 4  # said once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_m": 256}, "tile_m=256; accepted: 8, 16, 32, 64, 128 up to 128"),
        ({"columns": 96}, "columns=96; accepted: 64, 128"),
        ({"tile_m": 128, "columns": 128}, "spills registers"),
        ({"k_tiles": 3}, "must divide the 32 tiles of k"),
        ({"stages": 0}, "must divide the 32 tiles of k"),
        ({"split_k": 10**30}, "split_k=1000.*; a step for each piece, there are 32"),
        ({"tile_m": 128, "k_tiles": 4, "stages": 6}, "bytes of shared memory, 230400 are there"),
        ({"split_k": 2}, "stages=8 with float32 sums to write spills registers"),
        ({"cluster": 2}, "cluster=2 with stages=8 spills registers"),
        ({"cluster": 3}, "cluster=3; accepted: 1, and 2"),
        ({"cluster": 2, "split_k": 2}, "cluster=2; accepted: 1, and 2 for whole 16-bit results"),
        ({"cores": 2}, "config must hold tile_m, columns"),
    ],
)
def test_a_configuration_that_does_not_fit_is_left_out_with_a_warning(files, change, message):
    cache.record(entry(config=BEST | change), files[0])
    cache.reload()
    with pytest.warns(UserWarning, match=message):
        assert picked() == plan.heuristic(CALL, 100)


GOOD = {
    **entry().key._asdict(),
    "facts": CALL.facts,
    "config": BEST,
    "us": 1.0,
    "heuristic_us": 2,
    "date": "2026-11-24",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 3}, "must hold op, device"),
        ({"op": 3}, "op=3 is not a string"),
        ({"m": 24}, "m=24 is not a power of two"),
        ({"m": 2**40}, "is not a power of two up to"),
        ({"m": True}, "m=True is not a power of two"),
        ({"us": "fast"}, "us='fast' is not a time"),
        ({"us": float("nan")}, "us=nan is not a time"),
        ({"heuristic_us": 0}, "heuristic_us=0 is not a time"),
        ({"facts": {"n": 1.5}}, "facts must be whole numbers and strings"),
        ({"facts": []}, "facts must be whole numbers and strings"),
        ({"config": {}}, "config must be whole numbers"),
        ({"config": {"stages": True}}, "config must be whole numbers"),
    ],
)
def test_a_malformed_entry_is_left_out_and_the_others_stay(files, change, message):
    user, _ = files
    user.parent.mkdir()
    user.write_text(json.dumps({"version": 2, "entries": [GOOD | change, GOOD]}))
    with pytest.warns(UserWarning, match=f"user.json, entry 0: .*{message}"):
        assert picked().stages == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        (json.dumps({"version": 2, "entries": [GOOD]})[:-40], "Unterminated string"),
        ('{"version": ' + "1" * 5000 + "}", "digits"),
        ("[" * 100_000, "recursion|nested|Expecting"),
        ("[]", "must hold 'version' and 'entries'"),
        ('{"version": 1, "entries": []}', "version=1, accepted: 2"),
        ('{"version": 2, "entries": {}}', "accepted: 2 with a list"),
        ("\udcff", "utf-8|decode|Expecting"),
    ],
)
def test_a_broken_file_is_named_once_and_nothing_fails(files, text, message):
    user, _ = files
    user.parent.mkdir()
    user.write_text(text, errors="surrogateescape")
    with pytest.warns(UserWarning, match=f"user.json: .*({message})") as said:
        assert picked() == plan.heuristic(CALL, 100)
    assert len(said) == 1
    assert picked() == plan.heuristic(CALL, 100)
    with pytest.raises(ValueError, match="user.json"):  # what holds something else is not replaced
        cache.record(entry(), user)
    assert user.read_text(errors="surrogateescape") == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(max_examples=100)
@given(st.sampled_from(cache.FIELDS), JSON)
def test_whatever_a_field_holds_the_entry_is_taken_or_refused(name, value):
    try:
        parsed = cache.parse(GOOD | {name: value}, "here")
    except ValueError:
        return
    assert parsed.where == "here" and hash(parsed.key) is not None


def test_many_bad_entries_are_one_warning(files):
    user, _ = files
    user.parent.mkdir()
    user.write_text(json.dumps({"version": 2, "entries": [GOOD | {"m": 3}] * 5}))
    with pytest.warns(UserWarning, match=r"entry 0.*entry 2.*\(and 2 more\)") as said:
        picked()
    assert len(said) == 1


def test_recording_replaces_the_same_key_and_leaves_no_other_file(files):
    user, _ = files
    for us in (3.0, 1.5):
        cache.record(entry(us=us), user)
    cache.record(entry(64), user)
    entries, problems = cache.read(user)
    assert [(e.key.m, e.us) for e in entries] == [(16, 1.5), (64, 1.0)] and problems == []
    assert [path.name for path in user.parent.iterdir()] == ["user.json"]
    assert entries[0]._replace(where="") == entry(us=1.5)


def test_the_users_file_lies_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.user_file() == tmp_path / "pallas_kernels" / "tuning.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.user_file() == tmp_path / ".cache" / "pallas_kernels" / "tuning.json"


def test_the_shipped_file_is_whole():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.read(cache.SHIPPED) == ([], [])  # nothing has been measured


def test_sparse_products_take_what_was_measured_for_their_rows_of_x(files):
    w = jax.ShapeDtypeStruct((4096, 2048), "bfloat16")
    named = cache.key("sparse.matvec", 1, blocks.facts(1, w))
    config = {"blocks": 512, "unroll": 16, "unroll_pairs": 2}
    cache.record(cache.Entry(named, config, 1.0, 2.0, "2026-11-24"), files[0])
    cache.reload()
    assert blocks.pick("matvec", 1, w) == blocks.GpuConfig(512, 16)
    assert blocks.pick("matvec", 2, w) == blocks.pick("rows", 1, w) == blocks.GpuConfig()


def test_reading_from_threads(files):
    cache.record(entry(), files[0])
    cache.reload()
    found = []
    threads = [threading.Thread(target=lambda: found.append(picked().stages)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [8] * 8
