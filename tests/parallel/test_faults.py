"""Killed at any moment, a run ends in the bits of one that nothing disturbed."""

import signal
from pathlib import Path

import pytest

from ffnlab.storage.files import read_json
from tests.parallel import launch


def killed_again_and_again(
    tmp_path: Path,
    kills: int,
    saving: int,
    steps: int,
    seed: int,
    longest: int,
    more: str = "",
    devices: int = 1,
) -> list[dict]:
    """Runs `tests/parallel/kills.py`, compares its two runs, and returns what it wrote down.

    `more` are further lines of the configuration's [run].
    """
    config = launch.write_config(tmp_path, steps)
    content = config.read_text().replace("checkpoint_every = 10", "checkpoint_every = 20")
    config.write_text(content.replace("layers = 1", "layers = 2") + 'dtype = "float32"\n' + more)
    arguments = [str(config), str(tmp_path), str(kills), str(seed), str(saving), str(longest)]
    launch.script("kills", *arguments, devices=devices)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    same = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, cut)]
    assert same[0] == same[1]
    assert launch.measured(whole) == launch.measured(cut)
    found = read_json(tmp_path / "kills.json")
    assert len(found) >= kills and sum(kill["saving"] for kill in found) >= saving
    behind = [kill["behind"] for kill in found]
    assert sum(step > 0 for step in behind) >= len(found) - 1, "a checkpoint to fall back to"
    assert behind == sorted(behind), "nothing that was whole is lost"
    return found


def test_three_kills(tmp_path):
    killed_again_and_again(tmp_path, kills=3, saving=1, steps=300, seed=3, longest=300)


@pytest.mark.faults
def test_a_pipeline_that_is_killed_goes_on_with_the_same_bits(tmp_path):
    options = {"kills": 4, "saving": 1, "steps": 300, "seed": 5, "longest": 300, "devices": 4}
    killed_again_and_again(tmp_path, **options, more='mesh = "dp=2,pp=2"\n')


@pytest.mark.faults
def test_twenty_kills_eight_of_them_in_a_save(tmp_path, capsys):
    found = killed_again_and_again(tmp_path, kills=20, saving=8, steps=4000, seed=20, longest=2000)
    with capsys.disabled():
        print()
        for kill in found:
            what = f"killed at step {kill['step']}{', saving' if kill['saving'] else ''}"
            print(f"{what}; the newest checkpoint is of step {kill['behind']}")
    assert len({kill["behind"] for kill in found}) >= 10, "kills fall all over the run"
    early, late = found[1]["ready"], max(kill["ready"] for kill in found[-3:])
    assert late < 2 * early + 1, "resuming does not take longer at later steps"


@pytest.mark.faults
def test_ended_before_any_change_of_a_file_a_run_goes_on_as_if_it_had_not(tmp_path):
    launch.script("writes", str(tmp_path), str(tmp_path))
    found, whole = read_json(tmp_path / "writes.json"), tmp_path / "0"
    changes = [what.split()[0] for what, _ in found]
    assert len(changes) > 30 and {"mkdir", "replace", "fsync", "unlink"} <= set(changes)
    assert read_json(tmp_path / "0.json") == [6, {"size": 45.0, "total": 45.0}, [15.0] * 3]
    for number, (what, status) in enumerate(found, 1):
        out = tmp_path / str(number)
        assert status == 0, (what, (tmp_path / f"{number}.log").read_text())
        assert launch.measured(out) == launch.measured(whole), what
        for one, other in ((f"{number}.json", "0.json"), (out / "run.json", whole / "run.json")):
            assert read_json(tmp_path / one) == read_json(tmp_path / other), what
        assert not (out / "run.lock").exists(), what


@pytest.mark.faults
def test_preempted_processes_exit_with_0_and_go_on_with_the_same_bits(tmp_path):
    config = launch.write_config(tmp_path, 400)
    config.write_text(config.read_text() + 'dtype = "float32"\n')
    whole = launch.start(config, tmp_path / "whole")
    assert whole.wait(timeout=launch.PATIENCE) == 0
    step, out = 0, tmp_path / "cut"
    for _ in range(3):
        process = launch.start(config, out, "--resume")
        launch.wait_for_step(process, out, step + 20)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0, "within the grace time"
        assert "--resume goes on" in process.log.read_text()
        step = launch.rows(out)[-1]["step"]
    last = launch.start(config, out, "--resume")
    assert last.wait(timeout=launch.PATIENCE) == 0
    same = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "cut")]
    assert same[0].read_bytes() == same[1].read_bytes()
