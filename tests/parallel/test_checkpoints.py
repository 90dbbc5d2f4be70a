"""Checkpoints: the newest two are kept, damaged ones are named and passed over, nothing is lost."""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab.errors import ConfigError, DamagedError, FormatError
from ffnlab.learning import BackpropState, backprop
from ffnlab.parallel import checkpoints, parse_mesh, train
from ffnlab.rule import Rule
from ffnlab.storage import trees
from ffnlab.storage.files import remove, sealed, verify, write_json

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


def replace_by(make):
    def replace(file):
        remove(file)
        make(file)

    return replace


DAMAGES = {
    "cut short": truncate,
    "a bit flipped": flip,
    "emptied": lambda file: file.write_bytes(b""),
    "deleted": remove,
    "a folder": replace_by(os.mkdir),
    "a FIFO": replace_by(os.mkfifo),
    "a link to itself": replace_by(lambda file: file.symlink_to(file)),
    "a device": replace_by(lambda file: file.symlink_to("/dev/zero")),
}


def parts(folder):
    """Every file and folder of the newest checkpoint by its path there, and "." itself."""
    found = sorted(newest(folder).rglob("*"))
    return [".", *(item.relative_to(newest(folder)).as_posix() for item in found)]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_whatever_is_damaged_the_checkpoint_before_is_used(folder, damage, tmp_path_factory):
    backup = tmp_path_factory.mktemp("backup") / "whole"
    shutil.copytree(newest(folder), backup)
    names, in_place = parts(folder), damage in (truncate, flip, DAMAGES["emptied"])
    assert len(names) >= 5 and trees.SIDECAR in names
    for name in names[damage is remove :]:  # a whole checkpoint deleted leaves nothing to name
        item = newest(folder) / name
        if in_place and (item.is_dir() or not item.stat().st_size):
            continue
        damage(item)
        with pytest.warns(UserWarning, match="step-000000008.*the checkpoint before it is tried"):
            assert checkpoints.restore(folder, LIKE)["position"] == 5
        remove(newest(folder))
        shutil.copytree(backup, newest(folder))
    assert checkpoints.restore(folder, LIKE)["position"] == 8


def test_every_byte_of_the_description_is_under_its_sum(folder):
    """Any third byte changed: the same tree comes back, or the file is named."""
    file = newest(folder) / trees.SIDECAR
    content, same = file.read_bytes(), []
    whole = trees.read_sidecar(newest(folder))
    for at in range(0, len(content), 3):
        changed = bytearray(content)
        changed[at] ^= 1 << (at % 8)
        file.write_bytes(changed)
        try:
            assert trees.read_sidecar(newest(folder)) == whole
        except DamagedError as error:
            assert str(file) in str(error)
        else:
            same.append(content[at : at + 1])
    assert all(byte.isspace() for byte in same), "only the layout may change unseen"


@pytest.mark.parametrize(
    "changed",
    [
        lambda text: text.replace('"value": 8', '"value": 8000'),
        lambda text: text.replace('"step": 8', '"step": 9'),
        lambda text: text.replace('"format": 2', '"format": 1', 1),
        lambda text: text.replace('"sha256"', '"sha257"'),
        lambda text: "{}",
        lambda text: "[]",
        lambda text: json.dumps(json.loads(text) | {"tree": {}}),
        lambda text: json.dumps(json.loads(text) | {"files": {}}),
        lambda text: json.dumps(cut_list(json.loads(text))),
    ],
)
def test_a_changed_description_is_never_believed(folder, changed):
    file = newest(folder) / trees.SIDECAR
    before = file.read_text()
    file.write_text(changed(before))
    assert file.read_text() != before
    with pytest.warns(UserWarning, match=r"step-000000008/tree\.json is not the file"):
        assert checkpoints.restore(folder, LIKE)["position"] == 5


def cut_list(description):
    description["tree"]["leaves"].pop()
    return description


def test_a_checkpoint_knows_its_step(folder):
    """Renamed or exchanged, it is not restored as another one."""
    five, eight, aside = folder / "step-000000005", newest(folder), folder / "aside"
    five.rename(folder / "step-000000040")
    with pytest.warns(UserWarning, match="step-000000040 holds the checkpoint of step 5"):
        assert checkpoints.restore(folder, LIKE)["position"] == 8
    (folder / "step-000000040").rename(aside)
    eight.rename(five)
    aside.rename(eight)
    with pytest.warns(UserWarning), pytest.raises(DamagedError, match="holds the .* of step 5"):
        checkpoints.restore(folder, LIKE)
    trees.save(folder / "step-000000041", tree(41))
    with pytest.warns(UserWarning), pytest.raises(DamagedError, match="of step None"):
        checkpoints.restore(folder, LIKE)


def test_what_a_checkpoint_is_saved_with_comes_back(folder):
    checkpoints.save(folder, 9, tree(9), {"run": {"rate": 0.1}, 1: np.float32(0.5)})
    found, about = checkpoints.resume(folder, LIKE)
    assert found["position"] == 9 and about == {"run": {"rate": 0.1}, "1": 0.5, "step": 9}

    asked = []
    checkpoints.resume(folder, LIKE, lambda about, name: asked.append((about["step"], name)))
    assert asked == [(9, str(folder / "step-000000009"))]

    def refuse(about, name):
        raise ConfigError(f"{name} is another run's")

    with pytest.raises(ConfigError, match="step-000000009 is another run's"):
        checkpoints.resume(folder, LIKE, refuse)


def test_a_checkpoint_of_an_earlier_format_is_refused_by_its_number(folder, fixtures):
    for step in (5, 8):  # which that version wrote, of the tree {"position": 8, "w": arange(3.0)}
        old = folder / f"step-{step:09d}" / trees.SIDECAR
        shutil.copy(fixtures / "checkpoints" / "tree-format-1.json", old)
    with pytest.raises(FormatError, match="is of format 1, and this version of ffnlab reads 2"):
        checkpoints.restore(folder, {"position": 0, "w": jnp.zeros(3)})


def test_what_was_passed_over_is_removed_by_the_next_save(folder):
    """A damaged checkpoint must not count as one of the newest two, nor be in the way."""
    flip(newest(folder) / trees.SIDECAR)
    (folder / "step-000000007").mkdir()
    with checkpoints.Saver(folder, 5) as saver:
        saver.save(6, tree(6))
        saver.wait()
        assert checkpoints.steps(folder) == [6, 5]
        saver.save(8, tree(8))
    assert checkpoints.steps(folder) == [8, 6]
    assert checkpoints.restore(folder, LIKE)["position"] == 8


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda p: p.symlink_to(p)])
def test_a_save_clears_its_place(folder, make):
    for place in (folder / "step-000000010", newest(folder) / trees.SIDECAR):
        remove(place)
        make(place)
    checkpoints.save(folder, 8, tree(8))
    checkpoints.save(folder, 10, tree(10))
    assert checkpoints.restore(folder, LIKE)["position"] == 10
    assert trees.restore(newest(folder), LIKE)["position"] == 8


def test_every_flipped_bit_of_the_arrays_is_found(folder):
    """Orbax has no checksum over data: these would be restored silently."""
    data = max(filter(Path.is_file, newest(folder).rglob("*")), key=lambda f: f.stat().st_size)
    content = data.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(content), 12):
        changed = bytearray(content)
        changed[at] ^= 1 << (at % 8)
        data.write_bytes(changed)
        with pytest.raises(DamagedError, match="is not the file that was written"):
            trees.restore(newest(folder), LIKE)
    data.write_bytes(content)
    assert trees.restore(newest(folder), LIKE)["position"] == 8


def test_an_added_file_and_a_description_without_sums_are_refused(folder):
    arrays = next(newest(folder).glob("arrays-*"))
    (arrays / "more").write_text("x")
    with pytest.raises(DamagedError, match="more is not the file"):
        trees.restore(newest(folder), LIKE)
    (arrays / "more").unlink()
    description = trees.read_sidecar(newest(folder))
    del description["files"]
    write_json(newest(folder) / trees.SIDECAR, sealed(description))
    with pytest.raises(DamagedError, match="has no checksums"):
        trees.restore(newest(folder), LIKE)


def test_a_part_reads_its_files_and_misses_none(folder):
    arrays = next(newest(folder).glob("arrays-*"))
    sums = json.loads((newest(folder) / trees.SIDECAR).read_text())["files"]
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
    (newest(folder) / trees.SIDECAR).unlink()
    with pytest.warns(UserWarning, match=r"it has no tree\.json"):
        assert checkpoints.restore(folder, LIKE)["position"] == 5
    checkpoints.save(folder, 8, tree(8))  # and written again
    assert checkpoints.restore(folder, LIKE)["position"] == 8


def test_all_damaged_is_an_error_and_another_tree_is_not_passed_over(folder):
    with pytest.raises(FormatError, match=r"shape is \[1000\] in the file and \[7\]"):
        checkpoints.restore(folder, {"position": 0, "w": jnp.zeros(7)})
    for step in (5, 8):
        (folder / f"step-00000000{step}" / trees.SIDECAR).unlink()
    assert not checkpoints.exists(folder)
    with pytest.warns(UserWarning), pytest.raises(DamagedError, match="step-000000008"):
        checkpoints.restore(folder, LIKE)
    with pytest.raises(DamagedError, match="holds no checkpoint"):
        checkpoints.restore(folder / "absent", LIKE)


def test_a_full_disk_leaves_the_last_checkpoint(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trees, "write_json", full)
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
        found = trees.restore(tmp_path / f"step-00000000{step}", like)
        for name, leaf in found.items():
            np.testing.assert_array_equal(leaf, float(name) + 3 * (step - 1))


def test_what_a_save_behind_the_run_raises_is_raised_by_the_next_or_the_last(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    message = "step 9 could not be saved: .*No space.*of step 8 is intact"
    monkeypatch.setattr(trees, "write_json", full)
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


class Before(NamedTuple):
    """A state of backpropagation as it was before it held the key of its run."""

    model: object
    optimizer: object
    step: object


Before.__qualname__ = "BackpropState"


@pytest.mark.parametrize("mesh", [None, "dp=2"])
def test_a_state_from_before_there_was_a_key_gets_that_of_its_run(key, tmp_path, mesh):
    rule = backprop(lambda model, x: (jnp.mean((model["w"] * x) ** 2), {}), optax.adamw(0.1))

    def step(state, batch):
        after, metrics = rule.step(BackpropState(*state, jnp.copy(key)), batch)
        return Before(*after[:3]), metrics

    earlier = Rule("backprop", lambda m, k: Before(*rule.init(m, k)[:3]), step, rule.predict)
    mesh = None if mesh is None else parse_mesh(mesh)
    common = {"key": key, "mesh": mesh, "resume": True}
    batches = lambda position: np.full(4, position + 1, np.float32)  # noqa: E731
    model = {"w": jnp.float32(2)}
    train(earlier, model, batches, 2, folder=tmp_path / "cut", **common)
    went_on = train(rule, model, batches, 4, folder=tmp_path / "cut", **common)
    whole = train(rule, model, batches, 4, folder=tmp_path / "whole", **common)
    assert went_on.state.key == key == whole.state.key
    for a, b in zip(jax.tree.leaves(went_on.state), jax.tree.leaves(whole.state), strict=True):
        assert (a == b).all() and a.sharding == b.sharding
    with pytest.raises(FormatError, match="'state'.*is in `like` and not in the file"):
        checkpoints.save(tmp_path / "other", 1, {"position": 1, "state": {"w": jnp.ones(2)}})
        like = {"position": 1, "state": {"w": jnp.ones(2), "key": key, "more": jnp.ones(2)}}
        checkpoints.resume(tmp_path / "other", like, absent={"['state']['key']": key})
