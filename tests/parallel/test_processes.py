"""Several processes on loopback: the losses of one, and the death of one ends all."""

import dataclasses
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from ffnlab.cli.train import TrainConfig, run
from ffnlab.errors import ConfigError
from ffnlab.parallel import agree, batch_part, joined, parse_mesh, read_config
from ffnlab.parallel.sharding import part_of
from ffnlab.storage import placing
from ffnlab.storage.files import read_json
from tests.parallel import launch

HEARTBEAT, STEPS = 5, 30


def die_and_go_on(tmp_path, count: int, victim: int) -> None:
    """Kills one of several processes: the others end and name it; restarted, the run is as one."""
    config, alone = launch.write_config(tmp_path, STEPS), tmp_path / "alone"
    arguments = [str(config), str(tmp_path), str(count), str(victim), str(HEARTBEAT)]
    launch.script("losing", *arguments)
    first, second = (
        [(tmp_path / f"{name}-{i}.log").read_text() for i in range(count)]
        for name in ("first", "second")
    )
    found = read_json(tmp_path / "lost.json")
    assert len(found["left"]) == count - 1 and all(found["left"]), "\n".join(first)
    assert found["seconds"] < HEARTBEAT + 2 and found["rows"] < STEPS
    dead = rf"stopped sending heartbeats\):\n{victim}\n|Task {victim} heartbeat timeout"
    assert re.search("leader task" if victim == 0 else dead, "".join(first)), "\n".join(first)
    assert found["again"] == [0] * count, "\n".join(second)
    assert "bits per byte" in second[0] and "bits per byte" not in second[1], "one process writes"

    settings = read_config(config, TrainConfig)
    whole = dataclasses.replace(settings.run, microbatches=1)
    run(dataclasses.replace(settings, run=whole), alone)
    losses, wanted = launch.losses(tmp_path / "run"), launch.losses(alone)
    assert sorted(losses) == sorted(wanted) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(
        [losses[step] for step in wanted], list(wanted.values()), atol=1e-5, rtol=0
    )
    bits = [launch.rows(folder)[-1]["held_out_bits"] for folder in (tmp_path / "run", alone)]
    assert bits[0] == pytest.approx(bits[1], abs=1e-5)


def stopped(
    tmp_path, steps: int, after: int, notified: int = 0, rate: float = 0.05
) -> tuple[Path, Path, list]:
    """Configuration, folder and processes of a run of two that a notice to one has stopped."""
    config, out = launch.write_config(tmp_path, steps, rate), tmp_path / "out"
    processes = launch.start_all(2, config, out)
    launch.wait_for_step(processes[notified], out, after)
    processes[notified].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=launch.PATIENCE) for process in processes] == [0, 0]
    return config, out, processes


@pytest.mark.slow
def test_two_processes_are_as_one_and_end_together(tmp_path):
    die_and_go_on(tmp_path, count=2, victim=1)


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 2])
def test_four_processes_are_as_one_and_end_together(tmp_path, victim):
    die_and_go_on(tmp_path, count=4, victim=victim)


@pytest.mark.faults
def test_a_notice_to_one_process_stops_all_after_the_same_step(tmp_path):
    *_, processes = stopped(tmp_path, steps=4000, after=7, notified=1)
    assert "--resume goes on" in processes[0].log.read_text()


@pytest.mark.faults
def test_a_run_of_two_processes_goes_on_as_one(tmp_path):
    # A rate at which 60 steps do not amplify the rounding of another order of sums.
    config, out, _ = stopped(tmp_path, steps=60, after=7, rate=0.005)
    assert launch.rows(out)[-1]["step"] < 60
    last = launch.start(config, out, "--resume")
    assert last.wait(timeout=launch.PATIENCE) == 0
    run(read_config(config, TrainConfig), tmp_path / "alone")
    losses, wanted = launch.losses(out), launch.losses(tmp_path / "alone")
    assert list(losses) == list(wanted)
    found, alone = (np.array([*rows.values()]) for rows in (losses, wanted))
    assert np.median(np.abs(np.diff(alone))) > 0.02, "the batch of another step would be seen"
    np.testing.assert_allclose(found, alone, atol=1e-5, rtol=0)


@pytest.mark.faults
def test_processes_that_slurm_starts_find_each_other(tmp_path):
    config, out = launch.write_config(tmp_path, STEPS), tmp_path / "out"
    processes = launch.start_slurm(2, config, out)
    ended = [process.wait(timeout=launch.PATIENCE) for process in processes]
    logs = [process.log.read_text() for process in processes]
    assert ended == [0, 0], "\n".join(logs)
    assert read_json(out / "run.json")["processes"] == 2
    assert "bits per byte" in logs[0] and "bits per byte" not in logs[1], "one process writes"


@pytest.mark.faults
def test_several_processes_pass_over_a_damaged_checkpoint_together(tmp_path):
    config, out, _ = stopped(tmp_path, steps=60, after=25)
    newest = max((out / "checkpoint").iterdir())
    files = read_json(newest / "tree.json")
    names = sorted(files["files"])
    damaged = newest / files["arrays"] / names[1]  # process 1 reads it, process 0 does not
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    again = launch.start_all(2, config, out, "--resume")
    assert [process.wait(timeout=launch.PATIENCE) for process in again] == [0, 0]
    words = ("process 1 found a damaged file", f"{damaged} is not the file that was written")
    for process, what in zip(again, words, strict=True):
        assert what in process.log.read_text()
        assert "the checkpoint before it is tried" in process.log.read_text()
    assert list(launch.losses(out)) == list(range(1, 61))


@pytest.mark.faults
def test_processes_of_a_second_run_in_the_folder_are_all_told(tmp_path):
    config, out = launch.write_config(tmp_path, 4000), tmp_path / "out"
    first = launch.start_all(2, config, out)
    launch.wait_for_step(first[0], out, 7)
    second = launch.start_all(2, config, out, "--resume")
    ended = [process.wait(timeout=launch.PATIENCE) for process in second]
    for status, process in zip(ended, second, strict=True):
        said = process.log.read_text()
        assert status != 0 and f"is in use by process {first[0].pid} on" in said
        assert "Traceback" not in said
    assert [process.poll() for process in first] == [None, None]
    first[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=launch.PATIENCE) for process in first] == [0, 0]
    steps = [row["step"] for row in launch.rows(out)]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.faults
def test_a_process_that_never_comes_ends_the_others(tmp_path):
    config, port = launch.write_config(tmp_path, STEPS), launch.free_port()
    where = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "3", "--join", "20"]
    came = [
        launch.start(config, tmp_path / f"out-{i}", *where, "--process-id", str(i)) for i in (0, 2)
    ]
    assert [process.wait(timeout=launch.PATIENCE) for process in came] == [2, 2]
    said = f"coordinator='127.0.0.1:{port}': 2 of 3 processes came in 20 s; missing: process_id 1\n"
    assert [process.log.read_text() for process in came] == [f"ffnlab train: error: {said}"] * 2
    assert not list(tmp_path.glob("out-*/*")), "nothing was begun"


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_every_signal_to_one_process_stops_all(tmp_path, number):
    config, out = launch.write_config(tmp_path, 4000), tmp_path / "out"
    processes = launch.start_all(2, config, out)
    launch.wait_for_step(processes[0], out, 7)
    for _ in range(2):  # as a wrapper passes it on
        processes[1].send_signal(number)
    assert [process.wait(timeout=launch.PATIENCE) for process in processes] == [0, 0]
    assert "--resume goes on" in processes[0].log.read_text()


@pytest.mark.faults
def test_an_interruption_before_the_first_step_ends_all(tmp_path):
    config, out = launch.write_config(tmp_path, 4000), tmp_path / "out"
    processes = launch.start_all(2, config, out, "--heartbeat", str(HEARTBEAT))
    while not (out / "run.json").exists():
        assert all(process.poll() is None for process in processes)
    processes[1].send_signal(signal.SIGINT)
    assert processes[1].wait(timeout=launch.PATIENCE) in (0, 130), "0: the loop had begun"
    if processes[1].returncode:
        assert "process 1 of 2: interrupted" in processes[1].log.read_text()
        assert processes[0].wait(timeout=HEARTBEAT + 10) != 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, None), "all three"),
        (("host:1", 2, None), "all three"),
        (("auto", 2, 0), "'auto' finds them out"),
        ((None, 2, 0), "a process that is alone has none"),
        (("host:1", 2, 2), "must lie between"),
        (("host", 2, 0), "is not HOST:PORT"),
        ((":1234", 2, 0), "is not HOST:PORT"),
        (("host:99999", 2, 0), "is not HOST:PORT"),
        (("host:0", 2, 0), "is not HOST:PORT"),
    ],
)
def test_arguments_that_do_not_fit_together(arguments, message):
    with pytest.raises(ConfigError, match=message), joined(*arguments, 100):
        pass
    with pytest.raises(ConfigError, match="heartbeat=0"), joined(None, None, None, 0):
        pass
    with pytest.raises(ConfigError, match="join=0"), joined(None, None, None, 100, 0):
        pass


def test_alone_nothing_is_joined(monkeypatch):
    with joined(None, None, None, 100):
        agree({"a": 1}, "the configuration")
    tree = {"a": np.ones(3)}
    assert placing.gather(tree) is tree


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([[0, 1], [2, 3]], (1, 2)),
        ([[0, 1, 2, 3], [0, 1, 2, 3]], (0, 1)),
        ([[0, 1], [2, 3], [0, 1], [2, 3]], (1, 2)),
        ([[0, 2], [1, 3]], (0, 1)),
        ([[0], [1, 2, 3]], (0, 1)),
    ],
)
def test_the_rows_of_a_process(held, expected):
    rows = {process: set(part) for process, part in enumerate(held)}
    assert part_of(rows, 1, 4) == expected


def test_alone_all_rows_are_read():
    assert batch_part(parse_mesh("dp=8")) == (0, 1)
    assert batch_part(parse_mesh("tp=4,dp=2")) == (0, 1)
