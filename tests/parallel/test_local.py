"""The local tier of checkpoints: what is near is used where it is whole, and only then."""

import json
import shutil
import warnings

import jax
import numpy as np
import pytest

from ffnlab.errors import ConfigError, FormatError
from ffnlab.parallel import LoopOptions, checkpoints, local, parse_mesh, train
from ffnlab.parallel.clock import TIMES
from ffnlab.parallel.local import Saving, agreed, newest, savings
from tests.parallel import launch as runs
from tests.parallel.test_launch import begun, kill
from tests.parallel.test_loop import MODEL, bits, counting, numbers


def options(folder, every: int = 2, shared: int = 0) -> LoopOptions:
    return LoopOptions(
        log_every=1,
        checkpoint_every=shared,
        checkpoint_local=str(folder),
        checkpoint_local_every=every,
        progress=False,
    )


class Died(Exception):
    pass


def dying(at: int):
    """Batches of a run that dies when it asks for one."""

    def batches(position):
        if position == at:
            raise Died
        return numbers(position)

    return batches


def died(key, tmp_path, at: int, **how) -> LoopOptions:
    """A run that has died before its batch `at`; its options."""
    chosen = options(tmp_path / "near", **how)
    common = {"key": key, "folder": tmp_path / "run", "options": chosen}
    with pytest.raises(Died):
        train(counting(), MODEL, dying(at), 12, **common)
    return chosen


def resumed(key, tmp_path, chosen: LoopOptions, steps: int = 12):
    """(outcome of going on, position that it went on from)."""
    found = train(
        counting(), MODEL, numbers, steps, key=key, folder=tmp_path / "run", resume=True,
        options=chosen,
    )  # fmt: skip
    rows = [json.loads(r) for r in (tmp_path / "run" / TIMES).read_text().split("\n") if r]
    last = rows[-1]["began"]
    return found, next(row["step"] for row in rows if row["began"] == last)


def same_as_undisturbed(key, outcome) -> bool:
    return bits(outcome.state) == bits(train(counting(), MODEL, numbers, 12, key=key).state)


@pytest.mark.parametrize(("shared", "begins"), [(0, 6), (5, 6), (7, 7)])
def test_a_run_goes_on_from_the_newest_of_both_tiers(key, tmp_path, shared, begins):
    chosen = died(
        key, tmp_path, 8 if shared == 7 else 7, shared=shared, every=2 if shared != 7 else 3
    )
    found, position = resumed(key, tmp_path, chosen)
    assert position == begins and same_as_undisturbed(key, found)
    assert [row["step"] for row in runs.rows(tmp_path / "run")] == list(range(1, 13))


def test_two_are_kept_and_the_end_is_saved_for_all_only(key, tmp_path):
    chosen = options(tmp_path / "near")
    train(counting(), MODEL, numbers, 8, key=key, folder=tmp_path / "run", options=chosen)
    assert checkpoints.steps(tmp_path / "near" / "part-00000") == [6, 4]
    assert checkpoints.steps(tmp_path / "run" / "checkpoint") == [8]


def test_damaged_and_unfinished_ones_are_passed_over(key, tmp_path):
    chosen = died(key, tmp_path, 8, shared=3)
    own = tmp_path / "near" / "part-00000"
    assert checkpoints.steps(own) == [8, 4]  # 6 was saved for all
    (own / "step-000000010").mkdir()
    file = own / "step-000000008" / "pieces.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(UserWarning, match=r"pieces\.bin is not the file that was written"):
        found, position = resumed(key, tmp_path, chosen)
    assert position == 6 and same_as_undisturbed(key, found)


def test_without_any_that_serves_a_run_begins_anew(key, tmp_path):
    chosen = died(key, tmp_path, 3)
    (tmp_path / "near" / "part-00000" / "step-000000002" / "tree.json").unlink()
    found, position = resumed(key, tmp_path, chosen)
    assert position == 0 and same_as_undisturbed(key, found)


def test_steps_beyond_where_a_run_goes_on_are_removed(key, tmp_path):
    chosen = died(key, tmp_path, 7)
    own = tmp_path / "near" / "part-00000"
    shutil.copytree(own / "step-000000006", own / "step-000000099")  # says that it is 6
    assert [saving.step for saving in savings(tmp_path / "near")] == [6, 4]
    with pytest.raises(Died):
        train(
            counting(), MODEL, dying(9), 12, key=key, folder=tmp_path / "run", resume=True,
            options=chosen,
        )  # fmt: skip
    assert checkpoints.steps(own) == [8, 6]


def test_another_runs_parts_are_refused_and_nothing_is_lost(key, tmp_path):
    chosen = died(key, tmp_path, 7)
    with pytest.raises(ConfigError, match="near holds a run already; resume it or name another"):
        train(counting(), MODEL, numbers, 12, key=key, folder=tmp_path / "new", options=chosen)
    with pytest.raises(FormatError, match="does not hold the tree asked for"):
        train(
            counting(), np.zeros(11, np.int32), numbers, 12, key=key, folder=tmp_path / "new",
            options=chosen, resume=True,
        )  # fmt: skip
    found, position = resumed(key, tmp_path, chosen)
    assert position == 6 and same_as_undisturbed(key, found)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is not a folder"):
        train(
            counting(), MODEL, numbers, 2, key=key, folder=tmp_path / "more",
            options=options(tmp_path / "file"),
        )  # fmt: skip


def test_a_disk_that_fails_ends_the_local_tier_and_not_the_run(key, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "near")

    monkeypatch.setattr(local, "begin_part", lambda *_: full)
    chosen = options(tmp_path / "near")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = train(
            counting(), MODEL, numbers, 12, key=key, folder=tmp_path / "run", options=chosen
        )
    mine = [str(each.message) for each in said if "checkpoint_local" in str(each.message)]
    assert len(mine) == 1 and "No space left" in mine[0] and "saves no more" in mine[0]
    assert found.finished and same_as_undisturbed(key, found)


def test_a_cut_state_is_put_together_on_another_mesh(tmp_path):
    eight, four = parse_mesh("fsdp=8"), parse_mesh("fsdp=2,tp=2")
    place = lambda mesh, *spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))  # noqa: E731
    state = {
        "w": jax.device_put(np.arange(64.0, dtype=np.float32).reshape(8, 8), place(eight, "fsdp"))
    }
    with local.LocalSaver(tmp_path, 0) as saver:
        saver.save(3, state)
    like = {"w": jax.device_put(np.zeros((8, 8), np.float32), place(four, "tp", "fsdp"))}
    found, about = newest(tmp_path, like, None, 0)
    np.testing.assert_array_equal(found["w"], state["w"])
    assert found["w"].sharding == like["w"].sharding and about["step"] == 3
    assert newest(tmp_path, like, None, 4) is None


def test_only_what_all_processes_can_use_is_used(monkeypatch):
    others = np.array([[[8, 1], [6, 1], [-1, -1]], [[6, 1], [4, 1], [8, 2]]])
    filled = np.concatenate([others, np.full((2, local.TRIED - 3, 2), -1)], axis=1)
    seen = []
    monkeypatch.setattr(local, "gathered", lambda mine: (seen.append(mine), filled)[1])
    usable = [Saving(8 - i, 1) for i in range(local.TRIED + 3)]
    assert list(agreed(usable)) == [Saving(6, 1)]  # step 8 is of another run of the loop
    assert seen[0].tolist() == [list(saving) for saving in usable[: local.TRIED]]


def test_folder_and_interval_go_together():
    with pytest.raises(ConfigError, match="checkpoint_local='' and checkpoint_local_every=3 go"):
        LoopOptions(checkpoint_local_every=3)
    with pytest.raises(ConfigError, match="checkpoint_local='x' and checkpoint_local_every=0 go"):
        LoopOptions(checkpoint_local="x")
    with pytest.raises(ConfigError, match="checkpoint_local_every=-1 must not be negative"):
        LoopOptions(checkpoint_local="x", checkpoint_local_every=-1)


# Real runs of several processes; SIGKILL, and then something happens to a disk.


def lose_the_disk(near, _):
    shutil.rmtree(near / "part-00001")


def cut_the_newest_off(near, _):
    newest_one = checkpoints.steps(near / "part-00001")[0]
    (near / "part-00001" / f"step-{newest_one:09d}" / "tree.json").unlink()


def lose_all(near, _):
    shutil.rmtree(near)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("mesh", "happens", "serves"),
    [
        ("dp=-1", None, True),
        ("dp=-1", lose_the_disk, True),  # the other one holds the same
        ("fsdp=-1", cut_the_newest_off, True),  # an earlier step is whole on both
        ("fsdp=-1", lose_the_disk, False),
        ("dp=-1", lose_all, False),
    ],
)
def test_killed_processes_go_on_from_what_is_whole_on_all(tmp_path, mesh, happens, serves):
    near, out = tmp_path / "near", tmp_path / "run"
    config = runs.write_config(tmp_path, 160, rate=0.005)
    more = f'mesh = "{mesh}"\ndtype = "float32"\n'
    more += f'checkpoint_local = "{near}"\ncheckpoint_local_every = 3\n'
    text = config.read_text().replace("packed = true", "")
    config.write_text(text.replace("checkpoint_every = 10", "checkpoint_every = 60") + more)
    both = runs.start_all(2, config, out)
    runs.wait_for_step(both[0], out, 90)
    for process in both:
        process.kill()
        process.wait()
    if happens is not None:
        happens(near, out)
    again = runs.start_all(2, config, out, "--resume")
    for process in again:
        assert process.wait(timeout=runs.PATIENCE) == 0, process.log.read_text()
    rows = [json.loads(r) for r in (out / TIMES).read_text().split("\n") if r]
    begins = next(row["step"] for row in rows if row["began"] == rows[-1]["began"])
    assert (begins > 60 and begins % 3 == 0) if serves else begins == 60
    alone = runs.start(config, tmp_path / "alone", PYTHONWARNINGS="ignore")
    assert alone.wait(timeout=runs.PATIENCE) != 0  # its checkpoints would be another run's
    shutil.rmtree(near, ignore_errors=True)
    alone = runs.start(config, tmp_path / "alone")
    assert alone.wait(timeout=runs.PATIENCE) == 0, alone.log.read_text()
    lost, whole = runs.losses(out), runs.losses(tmp_path / "alone")
    assert list(lost) == list(whole) == list(range(1, 161))
    assert max(abs(lost[step] - whole[step]) for step in whole) < 1e-5


@pytest.mark.faults
def test_the_survivors_of_a_lost_machine_go_on_from_their_own_disks(tmp_path):
    near, out = tmp_path / "near", tmp_path / "run"
    config = runs.write_config(tmp_path, 200, rate=0.005)
    more = 'mesh = "dp=-1"\ndtype = "float32"\n'
    more += f'checkpoint_local = "{near}"\ncheckpoint_local_every = 3\n'
    text = config.read_text().replace("packed = true", "")
    config.write_text(text.replace("checkpoint_every = 10", "checkpoint_every = 0") + more)
    process = begun(config, out, 2, 1)
    runs.wait_for_step(process, out, 40)
    shutil.rmtree(near / "part-00001")
    kill(1, out)
    assert process.wait(timeout=runs.PATIENCE) == 0, process.log.read_text()
    rows = [json.loads(r) for r in (out / TIMES).read_text().split("\n") if r]
    begins = next(row["step"] for row in rows if row["began"] == rows[-1]["began"])
    assert begins >= 36 and begins % 3 == 0
    assert list(runs.losses(out)) == list(range(1, 201))
