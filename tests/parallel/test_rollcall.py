"""The roll call: all come, one never does, and whatever else may be found at a port."""

import contextlib
import socket
import threading
import time

import pytest

from ffnlab.errors import ConfigError
from ffnlab.parallel import rollcall
from ffnlab.parallel.rollcall import roll_call
from tests.parallel import launch

SECONDS = 2.0


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Tries again soon, and gives strangers little time."""
    monkeypatch.setattr(rollcall, "PAUSE", 0.02)
    monkeypatch.setattr(rollcall, "TURN", 0.2)


def call(indices, count=3, seconds=SECONDS, port=None, delay=0.0, counts=()) -> list[str]:
    """What each of these processes was told, "" where all came; they start `delay` apart."""
    port = launch.free_port() if port is None else port
    told = ["still waiting"] * len(indices)

    def one(place: int) -> None:
        wanted = dict(counts).get(indices[place], count)
        try:
            roll_call(f"127.0.0.1:{port}", wanted, indices[place], seconds)
            told[place] = ""
        except ConfigError as error:
            told[place] = str(error)

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(indices))]
    for thread in threads:
        thread.start()
        time.sleep(delay)
    for thread in threads:
        thread.join(4 * SECONDS)
    return told


@pytest.mark.parametrize("indices", [[0, 1, 2], [2, 1, 0]])
def test_all_come_in_any_order_and_the_port_is_free_again(indices):
    port = launch.free_port()
    for _ in range(2):
        assert call(indices, port=port, delay=0.1) == ["", "", ""]


def test_one_alone_needs_nobody():
    assert call([0], count=1) == [""]


def test_all_that_came_are_told_who_did_not():
    began = time.monotonic()
    told = call([0, 1, 3], count=5, seconds=1.0)
    assert time.monotonic() - began < 1.0 + SECONDS
    assert len(set(told)) == 1
    assert told[0].endswith("3 of 5 processes came in 1 s; missing: process_id 2, 4")


def connected(port: int) -> socket.socket:
    """A connection to a process 0 that may not have begun to listen."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("others", [[], [2]])
def test_one_that_came_and_died_is_missing(others):
    port, told = launch.free_port(), []
    first = threading.Thread(target=lambda: told.extend(call([0], seconds=1.0, port=port)))
    first.start()
    with connected(port) as dying:
        dying.sendall(b"ffnlab 1 of 3\n")
        time.sleep(0.2)
    told += call(others, seconds=1.0, port=port)
    first.join(4 * SECONDS)
    assert len(told) == 1 + len(others)
    missing = "process_id 1" if others else "process_id 1, 2"
    assert all(said.endswith(f"came in 1 s; missing: {missing}") for said in told)


def test_two_with_one_number_are_told():
    told = call([0, 1, 1], count=4)
    assert told == ["process_id=1 was given to two processes of 4"] * 3


def test_a_number_too_high_and_another_count_are_told():
    told = call([0, 1], counts={1: 2}.items())
    assert told == ["num_processes is 3 in process 0 and 2 in process 1"] * 2


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (told,) = call([0], port=port)
    assert told.startswith(
        f"coordinator='127.0.0.1:{port}': process 0 cannot listen at port {port}"
    )
    assert "in use" in told


@pytest.mark.parametrize(
    ("host", "reason"), [("127.0.0.1", "refused"), ("no-such-host.invalid", "")]
)
def test_where_nobody_answers_is_named(host, reason):
    port = launch.free_port()
    with pytest.raises(ConfigError, match=f"process 1 of 2 did not find process 0 .*: .*{reason}"):
        roll_call(f"{host}:{port}", 2, 1, 0.3)


def test_a_stranger_at_the_port_is_no_process_0():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(SECONDS)
        port = server.getsockname()[1]

        def chat() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with server.accept()[0] as caller:
                        caller.sendall(b"HTTP/1.1 400 Bad Request\r\n")

        threading.Thread(target=chat, daemon=True).start()
        with pytest.raises(ConfigError, match="is not process 0 of a run that begins"):
            roll_call(f"127.0.0.1:{port}", 2, 1, 0.5)


def test_strangers_that_call_are_passed_over():
    port, told = launch.free_port(), []
    waiting = threading.Thread(target=lambda: told.extend(call([0, 1, 2], port=port, delay=0.3)))
    waiting.start()
    with contextlib.ExitStack() as strangers:
        for content in (b"GET / HTTP/1.1\r\n\r\n", b"", b"x" * 10_000, b"ffnlab 1 of 3"):
            strangers.enter_context(connected(port)).sendall(content)
        waiting.join(8 * SECONDS)
    assert told == ["", "", ""]
