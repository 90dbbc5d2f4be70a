"""Counting the processes of a run before they are connected.

`jax.distributed` ends a process by an abort where another does not come in time, and may crash
where its port is taken. So process 0 listens at the address first, calls the roll, and tells all
who came what is wrong, if anything is; then the port is free for `jax.distributed`.

A caller says `ffnlab INDEX of COUNT`; the answer is `ffnlab:` and what is wrong, or nothing.
"""

import contextlib
import os
import re
import socket
import time

from ffnlab.errors import ConfigError

__all__ = ["roll_call"]

HELLO = re.compile(rb"ffnlab (\d{1,9}) of (\d{1,9})\n")
ANSWER = b"ffnlab:"
LONGEST = 4096  # bytes of a line
PAUSE = 0.5  # seconds between two tries
TURN = 5.0  # seconds that a caller may take to speak

Caller = tuple[int, socket.socket]


def roll_call(coordinator: str, count: int, index: int, seconds: float) -> None:
    """Returns once every process of a run has called this.

    Args:
      coordinator: HOST:PORT of process 0.
      count: of processes.
      index: of this one.
      seconds: to wait for the others.
    Raises:
      ConfigError: the port is taken, process 0 is not found there, not all came, or two are alike;
        in all processes that came.
    """
    host, _, port = coordinator.rpartition(":")
    if index == 0:
        wrong = _call(coordinator, int(port), count, seconds)
    else:
        wrong = _report(coordinator, (host.strip("[]"), int(port)), count, index, seconds)
    if wrong:
        raise ConfigError(wrong)


def _call(coordinator: str, port: int, count: int, seconds: float) -> str:
    """What process 0 does; returns what is wrong, or ""."""
    try:
        server = _listen(port)
    except OSError as error:
        return (
            f"coordinator={coordinator!r}: process 0 cannot listen at port {port}: "
            f"{os.strerror(error.errno)}; end what holds it, or name another port"
        )
    came: list[Caller] = []
    try:
        with server:
            wrong = _gather(server, came, count, seconds)
        if not wrong and len(came) + 1 < count:
            wrong = _who_came({0, *(i for i, _ in came)}, count, coordinator, seconds)
        for _, caller in came:
            with contextlib.suppress(OSError):
                caller.sendall(ANSWER + wrong.encode() + b"\n")
    finally:
        for _, caller in came:
            caller.close()
    return wrong


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _gather(server: socket.socket, came: list[Caller], count: int, seconds: float) -> str:
    """Fills `came` until all are there or time is out; returns what is wrong with a caller."""
    deadline = time.monotonic() + seconds
    while len(came) + 1 < count and (left := deadline - time.monotonic()) > 0:
        server.settimeout(min(left, PAUSE))
        try:
            caller, _ = server.accept()
        except OSError:
            continue
        finally:
            _forget_the_gone(came)
        caller.settimeout(TURN)
        found = HELLO.fullmatch(_line(caller))
        if found is None:  # somebody else
            caller.close()
            continue
        index, wanted = map(int, found.groups())
        known = {0, *(i for i, _ in came)}
        came.append((index, caller))
        if wanted != count:
            return f"num_processes is {count} in process 0 and {wanted} in process {index}"
        if index in known:
            return f"process_id={index} was given to two processes of {count}"
    return ""


def _report(
    coordinator: str, address: tuple[str, int], count: int, index: int, seconds: float
) -> str:
    """What the other processes do; returns what is wrong, or ""."""
    deadline, last = time.monotonic() + seconds, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=left) as connection:
                connection.sendall(f"ffnlab {index} of {count}\n".encode())
                # Process 0 may have come last, and waits for as long as the others do.
                connection.settimeout(seconds + TURN)
                answer = _line(connection)
            if answer.startswith(ANSWER):
                return answer.removeprefix(ANSWER).decode(errors="replace").strip()
            last = "what answers there is not process 0 of a run that begins"
        except OSError as error:
            last = error.strerror or str(error)
        time.sleep(max(0.0, min(PAUSE, deadline - time.monotonic())))
    return (
        f"coordinator={coordinator!r}: process {index} of {count} did not find process 0 there "
        f"in {seconds:g} s: {last}"
    )


def _who_came(came: set[int], count: int, coordinator: str, seconds: float) -> str:
    missing = [str(i) for i in range(count) if i not in came]
    named = ", ".join(missing[:8]) + (", …" if len(missing) > 8 else "")
    return (
        f"coordinator={coordinator!r}: {len(came)} of {count} processes came in {seconds:g} s; "
        f"missing: process_id {named}"
    )


def _line(connection: socket.socket) -> bytes:
    """What the other side says, up to the end of a line; b"" where it fails."""
    try:
        with connection.makefile("rb") as file:
            return file.readline(LONGEST)
    except OSError:
        return b""


def _forget_the_gone(came: list[Caller]) -> None:
    """Takes callers out who have died while they waited."""
    for caller in [caller for caller in came if _has_gone(caller[1])]:
        came.remove(caller)
        caller[1].close()


def _has_gone(connection: socket.socket) -> bool:
    """Whether the other side, which has nothing more to say, has closed a connection."""
    connection.settimeout(0)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(TURN)
