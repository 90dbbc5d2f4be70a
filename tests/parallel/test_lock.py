"""One run at a time in a folder, also where processes are killed, fork, or race."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.parallel import lock, train
from ffnlab.parallel.lock import NAME, locked
from ffnlab.rule import Rule
from tests.holding import holder

FORK = """
    child = os.fork()
    if not child:
        try:
            with locked(Path(sys.argv[1])):
                say("child in")
        except ValueError as error:
            say("child out")
        time.sleep(600)
    say(child)
"""


def refused(folder) -> str:
    with pytest.raises(ConfigError) as found, locked(folder):
        pass
    return str(found.value)


def test_the_second_is_told_who_the_first_is_and_takes_over_when_it_is_killed(tmp_path):
    folder = tmp_path / "run"
    with holder(folder) as (process, _):
        message = refused(folder)
        assert f"in use by process {process.pid} on {socket.gethostname()} since 2" in message
    assert (folder / NAME).exists(), "a killed process leaves its file"
    with locked(folder):
        assert json.loads((folder / NAME).read_text())["pid"] == os.getpid()
    assert not list(folder.iterdir()), "nothing is left"


def test_a_fork_neither_has_nor_gives_back_nor_keeps_the_lock(tmp_path):
    with holder(tmp_path, FORK, lines=3) as (process, (child, out, _)):
        assert out == "child out"
        os.kill(int(child), signal.SIGTERM)
        assert f"process {process.pid}" in refused(tmp_path), "its parent still has it"
    with holder(tmp_path, FORK, lines=3) as (process, (child, *_)):
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with locked(tmp_path):
            os.kill(int(child), signal.SIGKILL)


def test_one_of_many_that_race_gets_it(tmp_path):
    barrier, found = threading.Barrier(8), []

    def race():
        barrier.wait()
        try:
            with locked(tmp_path):
                found.append("in")
                time.sleep(0.5)
        except ConfigError as error:
            found.append(str(os.getpid()) in str(error))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found, key=str) == [True] * 7 + ["in"]


def test_the_same_thread_enters_again_and_only_the_outermost_ends_it(tmp_path):
    with locked(tmp_path), locked(None):
        with locked(tmp_path / "." / "more" / ".."):
            pass
        thread = threading.Thread(target=lambda: found.append(refused(tmp_path)))
        found = []
        thread.start()
        thread.join()
        assert "in use by process" in found[0]
    with locked(tmp_path):
        pass


def test_a_lock_removed_while_it_was_opened_is_taken_anew(tmp_path, monkeypatch):
    real, calls = lock.lock_file, []

    def removing(descriptor, path):
        if not calls:
            path.unlink()
        calls.append(path)
        return real(descriptor, path)

    monkeypatch.setattr(lock, "lock_file", removing)
    with locked(tmp_path):
        assert len(calls) == 2 and (tmp_path / NAME).exists()


@pytest.fixture
def without_locks(monkeypatch):
    """A file system without locks."""

    def refuse(descriptor, operation):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "PAUSE", 0.01)


def dead_process() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.usefixtures("without_locks")
def test_without_system_locks_the_file_is_the_lock_of_a_living_process(tmp_path):
    mine = lock.myself()
    away = mine | {"host": "elsewhere"}
    taken = {
        "dead": mine | {"pid": dead_process()},
        "number used again": mine | {"started": "1"},
        "half-written": None,
        "not a number": mine | {"pid": "x"},
        "nobody": mine | {"pid": 0},
    }
    for name, owner in taken.items():
        (tmp_path / NAME).write_text(json.dumps(owner)[:-1] if owner is None else json.dumps(owner))
        with locked(tmp_path):
            assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid(), name
        assert not (tmp_path / NAME).exists()
    for owner in (mine, away):
        (tmp_path / NAME).write_text(json.dumps(owner))
        message = refused(tmp_path)
        assert f"process {os.getpid()} on {owner['host']}" in message
        assert f"if that process is gone, remove {tmp_path / NAME}" in message


@pytest.mark.usefixtures("without_locks")
def test_without_system_locks_the_last_to_write_has_it(tmp_path, monkeypatch):
    other = lock.myself() | {"pid": 1}

    def overtaken(seconds):
        (tmp_path / NAME).write_text(json.dumps(other))

    monkeypatch.setattr(lock.time, "sleep", overtaken)
    assert "in use by process 1 on" in refused(tmp_path)
    assert json.loads((tmp_path / NAME).read_text()) == other, "the other's file is left"


def test_a_zombie_is_gone():
    process = subprocess.Popen([sys.executable, "-c", ""])
    owner = lock.myself() | {"pid": process.pid, "started": lock.started(process.pid)}
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet collected
    assert lock.is_gone(owner)
    process.wait()


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), os.mkfifo])
def test_what_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / NAME)
    assert NAME in refused(tmp_path)


def test_what_a_link_leads_to_is_not_written(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / NAME).symlink_to(tmp_path / "mine")
    assert NAME in refused(tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be used for a run" in refused(tmp_path / "file" / "run")
    assert "cannot be used for a run" in refused(tmp_path / "file")


def test_a_run_takes_the_lock_of_its_folder(tmp_path, key):
    inside = []

    def step(state, batch):
        inside.append((tmp_path / "run" / NAME).exists())
        return state, {"size": jnp.float32(0)}

    rule = Rule("still", lambda model, key: model, step, lambda state, inputs: state)
    with holder(tmp_path / "run") as (process, _):
        with pytest.raises(ConfigError, match=f"process {process.pid} on"):
            train(rule, np.zeros(2), np.asarray, 2, key=key, folder=tmp_path / "run")
        assert [item.name for item in (tmp_path / "run").iterdir()] == [NAME] and not inside
    train(rule, np.zeros(2), np.asarray, 2, key=key, folder=tmp_path / "run")
    assert inside == [True, True] and not (tmp_path / "run" / NAME).exists()
