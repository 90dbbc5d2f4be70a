"""Several processes on loopback: the losses of one, and the death of one ends all."""

import re
import signal
import time

import numpy as np
import pytest

from ffnlab import placing
from ffnlab.cli.train import TrainConfig, run
from ffnlab.errors import ConfigError
from ffnlab.parallel import agree, batch_part, joined, parse_mesh, read_config
from ffnlab.parallel.sharding import part_of
from tests.parallel import launch

HEARTBEAT, STEPS = 5, 30


def die_and_go_on(tmp_path, count: int, victim: int) -> None:
    """Kills one of several processes: the others end and name it; restarted, the run is as one."""
    config, out = launch.write_config(tmp_path, steps=STEPS), tmp_path / "out"
    more = ("--heartbeat", str(HEARTBEAT))
    processes = launch.start_all(count, config, out, *more)
    launch.wait_for_step(processes[victim], out, 12)
    processes[victim].kill()
    processes[victim].wait()
    begin = time.monotonic()
    left = [process for i, process in enumerate(processes) if i != victim]
    assert all(process.wait(timeout=launch.PATIENCE) for process in left), "a non-zero status"
    assert time.monotonic() - begin < HEARTBEAT + 2
    logs = "".join(process.log.read_text() for process in left)
    dead = rf"stopped sending heartbeats\):\n{victim}\n|Task {victim} heartbeat timeout"
    name = "leader task" if victim == 0 else dead
    assert re.search(name, logs), logs
    assert len(launch.losses(out)) < STEPS and not (out / "model").exists()

    again = launch.start_all(count, config, out, "--resume", *more)
    assert [process.wait(timeout=launch.PATIENCE) for process in again] == [0] * count, again[
        0
    ].log.read_text()
    alone = run(read_config(config, TrainConfig), tmp_path / "alone")
    found, wanted = launch.losses(out), launch.losses(tmp_path / "alone")
    assert sorted(found) == sorted(wanted)
    np.testing.assert_allclose(
        [found[step] for step in wanted], list(wanted.values()), atol=1e-5, rtol=0
    )
    record = launch.rows(out)[-1]["held_out_bits"]
    assert record == pytest.approx(launch.rows(tmp_path / "alone")[-1]["held_out_bits"], abs=1e-5)
    assert alone["finished"] and "bits per byte" in again[0].log.read_text()
    assert "bits per byte" not in again[1].log.read_text(), "one process writes"


def test_two_processes_are_as_one_and_end_together(tmp_path):
    die_and_go_on(tmp_path, count=2, victim=1)


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 2])
def test_four_processes_are_as_one_and_end_together(tmp_path, victim):
    die_and_go_on(tmp_path, count=4, victim=victim)


@pytest.mark.faults
def test_a_notice_to_one_process_stops_all_after_the_same_step(tmp_path):
    config, out = launch.write_config(tmp_path, steps=4000), tmp_path / "out"
    processes = launch.start_all(2, config, out)
    launch.wait_for_step(processes[1], out, 7)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=launch.PATIENCE) for process in processes] == [0, 0]
    assert "--resume goes on" in processes[0].log.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, None), "all three"),
        (("host:1", 2, None), "all three"),
        (("auto", 2, 0), "'auto' finds them out"),
        ((None, 2, 0), "a process that is alone has none"),
        (("host:1", 2, 2), "must lie between"),
        (("host", 2, 0), "is not HOST:PORT"),
    ],
)
def test_arguments_that_do_not_fit_together(arguments, message):
    with pytest.raises(ConfigError, match=message), joined(*arguments, 100):
        pass
    with pytest.raises(ConfigError, match="heartbeat=0"), joined(None, None, None, 0):
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
