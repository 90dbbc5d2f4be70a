"""Where a disk is full, at whatever call, files are as they were, and the error names the file."""

import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models
from ffnlab.formats import Tokenizer
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.parallel import checkpoints
from ffnlab.parallel.events import Events
from ffnlab.parallel.log import MetricsFile
from ffnlab.storage import files, npz
from ffnlab.studies import result
from ffnlab.studies.result import Claim, Result
from tests.full_disk import every_call, filling, small_files
from tests.parallel import launch

CONFIG = DecoderConfig(vocab=16, width=4, hidden=8, layers=1, heads=1, kv_heads=1, head_dim=4)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file and empty folder, hidden and temporary ones too."""
    found = {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}
    return {path.relative_to(folder).as_posix(): content for path, content in found.items()}


@functools.cache
def model_of(seed: int) -> Decoder:
    return Decoder(CONFIG, key=jax.random.key(seed))


def write_model(folder: Path, seed: int) -> None:
    """A model in several files, beside what else is in its folder."""
    models.save(model_of(seed), folder / "there", max_shard_bytes=512)


def write_stats(folder: Path, seed: int) -> None:
    npz.save_stats(folder / "there", {"a": np.arange(10) + seed, "b": (1.5, np.float32(seed))})


def write_folder(folder: Path, seed: int) -> None:
    with files.atomic_dir(folder / "there") as temporary:
        (temporary / "a" / "b").mkdir(parents=True)
        (temporary / "a" / "b" / "c").write_text(str(seed))


def steps_of(folder: Path) -> list[int]:
    """Steps of the whole rows of a folder's `metrics.jsonl`."""
    whole = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line)["step"] for line in whole if line.endswith("\n")]


WRITERS = {
    "json": lambda folder, seed: files.write_json(folder / "there", {"seed": seed}),
    "stats": write_stats,
    "folder": write_folder,
    "model": write_model,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("old", [False, True], ids=["new", "replaced"])
def test_all_or_nothing_is_written(tmp_path, tmp_path_factory, name, old):
    # What is compiled is written too, to jax's cache: before the disk is full.
    WRITERS[name](tmp_path_factory.mktemp("compiled"), 2)
    write, seen = functools.partial(WRITERS[name], tmp_path), []
    if old:
        write(1)
        if (tmp_path / "there").is_dir():
            (tmp_path / "there" / "notes").mkdir()
            (tmp_path / "there" / "notes" / "one.txt").write_text("kept")
    before = contents(tmp_path)
    for disk, error in every_call(lambda: write(2)):
        assert contents(tmp_path) == before, disk.calls
        assert error.filename.startswith(str(tmp_path / "there")), "the file, not a temporary one"
        assert "tmp" not in Path(error.filename).name and "No space" in str(error)
        seen.append(disk.calls[-1] if len(disk.calls) == disk.fails_at else "")
    assert {"open", "write", "replace"} <= set(seen), "it was full at each kind of call"
    after = contents(tmp_path)
    assert after != before
    write(2)
    assert contents(tmp_path) == after and "tmp" not in "".join(after)


@pytest.mark.parametrize("write", ["tokenizer", "study"])
def test_each_of_several_files_is_whole(tmp_path, write, monkeypatch):
    """They appear one after another, the one that says that all are there last."""

    def study(claim: str) -> None:
        monkeypatch.setattr(result, "as_png", lambda draw, dpi: f"png of {claim}".encode())
        claims = [Claim(claim, "-", "ours", True, "seen", seeds=1)]
        settings = {"settings": {}, "seed": 0, "quick": True, "seconds": 1.0, "claims": claims}
        pictures = dict.fromkeys(("a", "b"), print)
        Result(slug="study", title="A study", **settings, pictures=pictures).write(tmp_path)

    acts = {
        "study": (lambda: study("old"), lambda: study("new")),
        "tokenizer": (
            lambda: Tokenizer.bytes().save(tmp_path),
            lambda: Tokenizer.bytes().save(tmp_path),
        ),
    }[write]
    acts[0]()
    old = contents(tmp_path)
    found = [contents(tmp_path) for _ in every_call(acts[1])]
    new = contents(tmp_path)
    assert found and (new != old or write == "tokenizer")
    for state in found:
        assert state.keys() == old.keys()
        assert all(content in (old[name], new[name]) for name, content in state.items())


def test_a_row_of_metrics_that_is_cut_off_is_left_out(tmp_path):
    """The run ends with an error that names the file; the next start drops the half row."""

    def write() -> None:
        with MetricsFile(tmp_path, 1) as file:
            file.write(2, 0.2, {"loss": 1.0})

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 0.1, "loss": 2.0}\n')
    for disk, error in every_call(write):
        assert error.filename == str(tmp_path / "metrics.jsonl")
        assert steps_of(tmp_path) == [1], disk.calls
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert steps_of(tmp_path) == [1, 2]


def test_a_full_disk_of_events_is_an_error_and_no_wait(tmp_path):
    def write() -> None:
        events = Events(tmp_path / "events", 0)
        for step in range(15):  # more than the queue of a writer in another thread takes
            events.write(step, {"loss": 1.0})

    named = {error.filename for _, error in every_call(write)}
    assert named and all(name.startswith(str(tmp_path / "events")) for name in named)


LIKE = {"position": 0, "w": jnp.zeros(4000)}


def tree(step: int) -> dict:
    return {"position": step, "w": jnp.arange(4000.0) + step}


def last_checkpoint_is_whole(folder: Path, error: OSError) -> None:
    assert "the checkpoint of step 9 could not be saved" in str(error)
    assert str(error).endswith("the checkpoint of step 8 is intact") and "\n" not in str(error)
    # Threads of orbax may still write when it has raised; what they leave is no checkpoint.
    finished = [s for s in checkpoints.steps(folder) if checkpoints.is_finished(folder, s)]
    assert finished == [8, 5]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*step-000000009 is not a checkpoint")
        assert checkpoints.restore(folder, LIKE)["position"] == 8


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints of steps 5 and 8."""
    for step in (5, 8):
        checkpoints.save(tmp_path, step, tree(step))
    return tmp_path


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of those threads
def test_a_checkpoint_on_a_disk_that_fills_up_at_any_call(saved):
    def save() -> None:
        with checkpoints.Saver(saved) as saver:
            saver.save(9, tree(9))

    count = 0
    for _, error in every_call(save):
        last_checkpoint_is_whole(saved, error)
        count += 1
    assert count > 5
    assert checkpoints.restore(saved, LIKE)["position"] == 9


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of those threads
@pytest.mark.parametrize("limit", [0, 100, 1000, 3000])
def test_a_checkpoint_that_no_file_has_room_for(saved, limit):
    """Also where C++ writes."""
    with pytest.raises(OSError, match="could not be saved") as found, small_files(limit):
        checkpoints.save(saved, 9, tree(9))
    last_checkpoint_is_whole(saved, found.value)
    checkpoints.save(saved, 9, tree(9))
    assert checkpoints.restore(saved, LIKE)["position"] == 9


def test_the_disk_of_these_tests_fails_when_it_says(tmp_path):
    path = tmp_path / "a"
    with filling(0) as disk:
        files.write_json(path, [1])
    assert disk.calls == ["mkdir", "open", "write", "flush", "fsync", "replace"]
    with pytest.raises(OSError), filling(2) as disk, open(path, "w") as file:
        file.write("1234")
    assert path.read_text() == "12" and disk.calls == ["open", "write"]


@pytest.mark.faults
@pytest.mark.parametrize("size", [32, 160, 224])  # KiB: in the first save, the second, the export
def test_a_run_on_a_small_disk_ends_in_a_line_and_goes_on_with_more_room(tmp_path, size):
    place, config = tmp_path / "disk", launch.write_config(tmp_path, 30)
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        command = [sys.executable, "-m", "ffnlab", "train", "--config", str(config), "--resume"]
        command += ["--out", str(place / "run")]
        environment = os.environ | {"XLA_FLAGS": launch.FLAGS}
        run = functools.partial(
            subprocess.run, command, env=environment, capture_output=True, text=True, check=False
        )
        done = run()
        assert done.returncode == 2, done.stderr
        lines = [line for line in done.stderr.splitlines() if "Warning" not in line]
        assert len(lines) == 1 and lines[0].startswith("ffnlab train: error: "), done.stderr
        assert "No space left on device" in lines[0], "and what could not be written:"
        assert "the checkpoint of step" in lines[0] or str(place) in lines[0]
        assert not list(place.rglob("*.tmp"))
        mount[4] = "remount,size=64m"
        subprocess.run(mount, check=True)
        done = run()
        assert done.returncode == 0 and "bits per byte" in done.stdout, done.stderr
        steps = [row["step"] for row in launch.rows(place / "run") if "loss" in row]
        assert steps == list(range(1, 31))
    finally:
        subprocess.run(["umount", str(place)], check=True)
