"""Checkpoints: the newest two are kept, damaged ones are named and passed over, nothing is lost."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import io
from ffnlab.errors import DamagedError, FormatError
from ffnlab.files import verify
from ffnlab.parallel import checkpoints

LIKE = {"position": 0, "w": jnp.zeros(1000)}


def tree(step):
    return {"position": step, "w": jnp.arange(1000.0) + step}


@pytest.fixture
def folder(tmp_path):
    for step in (3, 5, 8):
        checkpoints.save(tmp_path, step, tree(step))
    return tmp_path


def newest(folder):
    return folder / "step-000000008"


def test_the_newest_two_are_kept(folder):
    assert checkpoints.steps(folder) == [8, 5] and checkpoints.exists(folder)
    found = checkpoints.restore(folder, LIKE)
    assert found["position"] == 8
    np.testing.assert_array_equal(found["w"], tree(8)["w"])


def truncate(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def files(folder):
    """Every file of the newest checkpoint, by its path there."""
    found = [f for f in newest(folder).rglob("*") if f.is_file()]
    return {f.relative_to(newest(folder)).as_posix(): f for f in found}


@pytest.mark.parametrize("damage", [truncate, flip, lambda file: file.unlink()])
def test_any_damaged_file_is_found_and_the_checkpoint_before_used(folder, damage, tmp_path_factory):
    names = [name for name, file in files(folder).items() if file.stat().st_size]
    assert len(names) >= 3 and io.SIDECAR in names
    backup = tmp_path_factory.mktemp("backup") / "whole"
    shutil.copytree(newest(folder), backup)
    for name in names:
        if name == io.SIDECAR and damage is flip:
            continue  # a bit of JSON may still be right; what it says of files is checked below
        damage(files(folder)[name])
        with pytest.warns(UserWarning, match="step-000000008.*the checkpoint before it is tried"):
            assert checkpoints.restore(folder, LIKE)["position"] == 5
        shutil.rmtree(newest(folder))
        shutil.copytree(backup, newest(folder))
    assert checkpoints.restore(folder, LIKE)["position"] == 8


def test_every_flipped_bit_of_the_arrays_is_found(folder):
    """Orbax has no checksum over data: these would be restored silently."""
    data = max((f for f in files(folder).values()), key=lambda f: f.stat().st_size)
    content = data.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(content), 12):
        changed = bytearray(content)
        changed[at] ^= 1 << (at % 8)
        data.write_bytes(changed)
        with pytest.raises(DamagedError, match="is not the file that was written"):
            io.restore(newest(folder), LIKE)
    data.write_bytes(content)
    assert io.restore(newest(folder), LIKE)["position"] == 8


def test_an_added_file_and_a_description_without_sums_are_refused(folder):
    arrays = next(newest(folder).glob("arrays-*"))
    (arrays / "more").write_text("x")
    with pytest.raises(DamagedError, match="more is not the file"):
        io.restore(newest(folder), LIKE)
    (arrays / "more").unlink()
    description = json.loads((newest(folder) / io.SIDECAR).read_text())
    del description["files"]
    (newest(folder) / io.SIDECAR).write_text(json.dumps(description))
    with pytest.raises(DamagedError, match="has no checksums"):
        io.restore(newest(folder), LIKE)


def test_a_part_reads_its_files_and_misses_none(folder):
    arrays = next(newest(folder).glob("arrays-*"))
    sums = json.loads((newest(folder) / io.SIDECAR).read_text())["files"]
    victim = arrays / sorted(sums)[1]
    victim.write_bytes(victim.read_bytes() + b"x")
    verify(arrays, sums, (0, 2))
    with pytest.raises(DamagedError, match="is not the file that was written"):
        verify(arrays, sums, (1, 2))
    victim.unlink()
    for index in range(2):
        with pytest.raises(DamagedError, match="is missing"):
            verify(arrays, sums, (index, 2))


def test_an_unfinished_checkpoint_is_passed_over(folder):
    (newest(folder) / io.SIDECAR).unlink()
    with pytest.warns(UserWarning, match=r"it has no tree\.json"):
        assert checkpoints.restore(folder, LIKE)["position"] == 5
    checkpoints.save(folder, 8, tree(8))  # and written again
    assert checkpoints.restore(folder, LIKE)["position"] == 8


def test_all_damaged_is_an_error_and_another_tree_is_not_passed_over(folder):
    with pytest.raises(FormatError, match=r"shape is \[1000\] in the file and \[7\]"):
        checkpoints.restore(folder, {"position": 0, "w": jnp.zeros(7)})
    for step in (5, 8):
        (folder / f"step-00000000{step}" / io.SIDECAR).unlink()
    assert not checkpoints.exists(folder)
    with pytest.warns(UserWarning), pytest.raises(DamagedError, match="step-000000008"):
        checkpoints.restore(folder, LIKE)
    with pytest.raises(DamagedError, match="holds no checkpoint"):
        checkpoints.restore(folder / "absent", LIKE)


def test_a_full_disk_leaves_the_last_checkpoint(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io, "write_json", full)
    with pytest.raises(
        OSError, match=r"step 9 could not be saved: .*No space.*of step 8 is intact"
    ):
        checkpoints.save(folder, 9, tree(9))
    assert checkpoints.steps(folder) == [8, 5]
    assert checkpoints.restore(folder, LIKE)["position"] == 8


def test_a_save_goes_on_behind_steps_that_overwrite_the_state(tmp_path):
    """On a CPU the host's copy is the array itself: donation must spare it."""
    add = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    state = {str(i): jnp.full((300, 1000), float(i)) for i in range(8)}
    like = jax.tree.map(jnp.zeros_like, state)
    with checkpoints.Saver(tmp_path) as saver:
        for step in (1, 2, 3):
            saver.save(step, state)
            for _ in range(3):
                state = add(state)
    assert checkpoints.steps(tmp_path) == [3, 2]
    for step in (3, 2):
        found = io.restore(tmp_path / f"step-00000000{step}", like)
        for name, leaf in found.items():
            np.testing.assert_array_equal(leaf, float(name) + 3 * (step - 1))


def test_what_a_save_behind_the_run_raises_is_raised_by_the_next_or_the_last(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    message = "step 9 could not be saved: .*No space.*of step 8 is intact"
    monkeypatch.setattr(io, "write_json", full)
    with pytest.raises(OSError, match=message), checkpoints.Saver(folder) as saver:
        saver.save(9, tree(9))
    with pytest.raises(OSError, match=message), checkpoints.Saver(folder) as saver:
        saver.save(9, tree(9))
        saver.save(10, tree(10))
    with pytest.raises(ZeroDivisionError) as found, checkpoints.Saver(folder) as saver:
        saver.save(9, tree(9))
        raise ZeroDivisionError
    assert "No space" in found.value.__notes__[0], "the run's own error comes first"
    assert checkpoints.steps(folder) == [8, 5]


def test_what_kills_left_unfinished_takes_no_place(folder):
    (folder / "step-000000009").mkdir()
    (folder / "step-000000011").mkdir()
    checkpoints.save(folder, 10, tree(10))
    assert checkpoints.steps(folder) == [11, 10, 8]


def test_a_saver_without_a_folder_saves_nothing():
    with checkpoints.Saver(None) as saver:
        saver.save(1, tree(1))
