"""A resumed run is the one that its checkpoints are of, whatever happened to its folder."""

import dataclasses
import json
import os
import re
import signal
import socket

import numpy as np
import pytest

from ffnlab.cli.identity import identity_of
from ffnlab.cli.train import TrainConfig, run
from ffnlab.errors import ConfigError, FormatError
from ffnlab.parallel import checkpoints, read_config
from ffnlab.storage import trees
from ffnlab.storage.files import sealed, write_json
from tests.parallel import launch


@pytest.fixture
def settings(tmp_path) -> TrainConfig:
    """A run of ten steps with a checkpoint after each fourth."""
    config = launch.write_config(tmp_path, 10)
    config.write_text(config.read_text().replace("checkpoint_every = 10", "checkpoint_every = 4"))
    return read_config(config, TrainConfig)


def changed(settings: TrainConfig, table: str, **values) -> TrainConfig:
    part = dataclasses.replace(getattr(settings, table), **values)
    return dataclasses.replace(settings, **{table: part})


def to_steps(settings: TrainConfig, steps: int) -> TrainConfig:
    return changed(settings, "run", steps=steps)


def rate_in(file) -> float:
    return json.loads(file.read_text())["config"]["optimizer"]["rate"]


def killed(*args):
    raise KeyboardInterrupt


def test_a_run_killed_in_its_first_save_and_begun_anew_is_the_new_one(
    settings, tmp_path, monkeypatch
):
    out, faster = tmp_path / "run", changed(settings, "optimizer", rate=0.07)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trees, "checksums", killed)  # all but the sidecar has been written
        run(settings, out)
    assert checkpoints.steps(out / "checkpoint") and rate_in(out / "run.json") == 0.05
    run(to_steps(faster, 6), out)
    assert rate_in(out / "run.json") == 0.07
    with pytest.raises(ConfigError, match="started with another config; see .*step-000000006"):
        run(settings, out, resume=True)
    assert run(faster, out, resume=True)["recipe"]["optimizer"]["rate"] == 0.07


@pytest.mark.parametrize("content", [None, "[]", "{}", '{"config": 5}', '{"config": {"run": {}}}'])
def test_a_lost_or_damaged_run_file_changes_nothing(settings, tmp_path, content):
    out = tmp_path / "run"
    run(to_steps(settings, 4), out)
    file = out / "run.json"
    before = json.loads(file.read_text())
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match="started with another config"):
        run(changed(settings, "optimizer", rate=0.07), out, resume=True)
    with pytest.warns(UserWarning, match=r"run\.json.*it is written again from the checkpoint"):
        run(settings, out, resume=True)
    assert json.loads(file.read_text()) == before


def test_the_run_file_of_another_run_is_refused(settings, tmp_path):
    out = tmp_path / "run"
    run(to_steps(settings, 4), out)
    table = json.loads((out / "run.json").read_text())
    table["config"]["optimizer"]["rate"] = 0.07
    write_json(out / "run.json", table)
    for other in (settings, changed(settings, "optimizer", rate=0.07)):
        with pytest.raises(ConfigError, match="started with another config"):
            run(other, out, resume=True)


def test_a_checkpoint_of_another_run_is_refused_also_where_a_newer_one_is_damaged(
    settings, tmp_path
):
    out, other = tmp_path / "run", tmp_path / "other"
    run(to_steps(settings, 8), out)
    run(to_steps(changed(settings, "optimizer", rate=0.07), 4), other)
    four = "step-000000004"
    for item in (out / "checkpoint").iterdir():
        if item.name != "step-000000008":
            item.rename(tmp_path / item.name)
    (other / "checkpoint" / four).rename(out / "checkpoint" / four)
    (out / "checkpoint" / "step-000000008" / "tree.json").write_text("{}")
    with (
        pytest.warns(UserWarning, match="step-000000008"),
        pytest.raises(ConfigError, match=f"another config; see .*{four}"),
    ):
        run(settings, out, resume=True)


def test_checkpoints_that_do_not_say_of_which_run_are_refused(settings, tmp_path):
    out = tmp_path / "run"
    run(to_steps(settings, 4), out)
    (target,) = (out / "checkpoint").iterdir()
    file = target / trees.SIDECAR
    content = trees.read_sidecar(target)
    content["about"]["run"] = None
    write_json(file, sealed(content))
    with pytest.raises(FormatError, match="does not say which run it is of"):
        run(settings, out, resume=True)


def test_another_place_is_warned_of_and_an_older_version_goes_on(settings, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run(to_steps(settings, 4), out)
    monkeypatch.setattr(os, "cpu_count", lambda: 77)
    other = changed(settings, "run", steps=6, on_bad="skip", log_every=3)
    with pytest.warns(UserWarning, match=r"step-000000004 was written with threads \d+, not 77:"):
        assert run(other, out, resume=True)["steps"] == 6
    table = json.loads((out / "run.json").read_text())
    del table["config"]["run"]["remat"], table["versions"]  # as they were not yet known
    identity = identity_of(settings, table["text"])
    assert [line.split(" was ")[0] for line in identity.check(table, "it", 4)] == ["it"]


def test_fewer_steps_than_were_taken_are_refused_and_the_record_stays(settings, tmp_path):
    out = tmp_path / "run"
    record = run(settings, out)
    tokens = settings.data.batch * settings.data.length
    assert record["steps"] == 10 and record["tokens"] == 10 * tokens
    with pytest.raises(ConfigError, match=r"steps=5, but .* has taken 10 already"):
        run(to_steps(settings, 5), out, resume=True)
    assert json.loads((out / "model" / "training.json").read_text()) == record
    longer = run(to_steps(settings, 12), out, resume=True)
    assert longer["steps"] == 12 and longer["tokens"] == 12 * tokens


def test_tokens_of_a_run_that_stopped_early_are_those_it_learned_from(settings, tmp_path):
    early = changed(settings, "run", evaluate_every=1, patience=1)
    early = changed(early, "optimizer", rate=1e4, warmup=0)  # the first step makes it worse
    record = run(early, tmp_path / "run")
    assert record["steps"] < 10
    assert record["tokens"] == record["steps"] * settings.data.batch * settings.data.length


def test_an_extension_that_has_begun_is_not_moved(settings, tmp_path):
    out = tmp_path / "run"
    whole = changed(settings, "extension", steps=3, batch=2, length=32)
    size = settings.data.batch * settings.data.length
    record = run(to_steps(whole, 4), out)
    assert record["steps"] == 7 and record["tokens"] == 4 * size + 3 * 2 * 32
    for steps in (5, 40):
        with pytest.raises(ConfigError, match=f"steps={steps}, but .* begins after step 4"):
            run(to_steps(whole, steps), out, resume=True)
    with pytest.raises(ConfigError, match="steps=3, but"):
        run(to_steps(whole, 3), out, resume=True)
    assert json.loads((out / "model" / "training.json").read_text()) == record
    # Before it has begun it may be.
    identity = identity_of(to_steps(whole, 9), {})
    table = identity_of(to_steps(whole, 6), {}).table
    assert identity.check(table, "it", 6) == []
    with pytest.raises(ConfigError, match="begins after step 6"):
        identity.check(table, "it", 7)


@pytest.mark.faults
def test_two_runs_in_one_folder(tmp_path):
    """Of real processes: the second is told, the first is left alone, killed it is taken over."""
    config, out = launch.write_config(tmp_path, 3000), tmp_path / "out"
    first = launch.start(config, out)
    launch.wait_for_step(first, out, 25)
    second = launch.start(config, out, "--resume")
    assert second.wait(timeout=launch.PATIENCE) not in (0, None)
    said = second.log.read_text()
    who = f"{out} is in use by process {first.pid} on {socket.gethostname()} since"
    assert who in said and "Traceback" not in said
    assert first.poll() is None, first.log.read_text()
    first.send_signal(signal.SIGKILL)
    first.wait()
    stood = checkpoints.steps(out / "checkpoint")[0]
    third = launch.start(config, out, "--resume", "--steps", str(stood + 20))
    assert third.wait(timeout=launch.PATIENCE) == 0, third.log.read_text()
    steps = [row["step"] for row in launch.rows(out)]
    assert steps == list(range(1, stood + 21))
    assert re.search(r"bits per byte", third.log.read_text())
    assert not (out / "run.lock").exists()
    assert np.isfinite(list(launch.losses(out).values())).all()
