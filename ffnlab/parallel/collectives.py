"""What a compiled program sends between devices, read from its text.

The compiler's own cost analysis counts the body of a loop once and no bytes of collectives. Here a
body counts as often as it runs, where the compiler knows that (`known_trip_count`).
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

__all__ = ["KINDS", "Sent", "collectives"]

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
# `%name (parameters) -> result {` begins a computation, "}" ends it.
BEGIN = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
OPERATION = re.compile(r"= (\(.*?\)|\S+) ([\w\-]+)\(")
ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
CALLED = re.compile(r"(?:body|to_apply|calls|condition)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"([0-9]+)"\}')


class Sent(NamedTuple):
    """Collectives of one kind.

    Attributes:
      count: how often they run on a device.
      bytes: of their results on it, all together.
    """

    count: int
    bytes: int


Found = dict[str, Sent]


def collectives(text: str) -> Found:
    """The collectives that a device runs, by kind; kinds that do not occur are left out.

    Of a conditional the branch that moves most counts, and a loop of unknown length counts once.

    Args:
      text: `compiled.as_text()` of a program for several devices.
    """
    bodies = dict(computations(text))
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    return {} if entry is None else of_computation(entry[1], bodies, {})


def computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Name and lines of every computation."""
    name, lines = "", []
    for line in text.splitlines():
        begun = BEGIN.match(line.strip())
        if begun:
            name, lines = begun[1], []
        elif line.strip() == "}":
            yield name, lines
        else:
            lines.append(line)


def of_computation(name: str, bodies: Mapping[str, list[str]], known: dict[str, Found]) -> Found:
    """What runs when a computation does, those that it calls included."""
    if name not in known:
        found: Found = {}
        for line in bodies.get(name, ()):
            add(found, of_line(line, bodies, known))
        known[name] = found
    return known[name]


def of_line(line: str, bodies: Mapping[str, list[str]], known: dict[str, Found]) -> Found:
    """What one operation sends."""
    operation = OPERATION.search(line)
    if operation is None:
        return {}
    result, name = operation.groups()
    kind = name.removesuffix("-start")
    if kind in KINDS:
        return {kind: Sent(1, size(result, started=kind != name))}
    branches = [
        each.strip().lstrip("%")
        for several, one in BRANCHES.findall(line)
        for each in (several or one).split(",")
    ]
    if branches:
        each = [of_computation(branch, bodies, known) for branch in branches]
        return max(each, key=lambda found: sum(sent.bytes for sent in found.values()))
    trips = TRIPS.search(line)
    times = int(trips[1]) if trips and name == "while" else 1
    found: Found = {}
    for called in CALLED.findall(line):
        add(found, of_computation(called, bodies, known), times)
    return found


def add(found: Found, more: Mapping[str, Sent], times: int = 1) -> None:
    """Adds what is sent so many times over."""
    for kind, sent in more.items():
        before = found.get(kind, Sent(0, 0))
        found[kind] = Sent(before.count + times * sent.count, before.bytes + times * sent.bytes)


def size(result: str, *, started: bool) -> int:
    """Bytes of a result; one that is started has its operands beside it, as many as results.

    >>> size("(f32[4,2]{1,0}, s8[3])", started=False), size("(bf16[4], bf16[8])", started=True)
    (35, 16)
    """
    each = [bits(dtype) * entries(shape) for dtype, shape in ARRAY.findall(result)]
    return sum(each[len(each) // 2 :] if started else each) // 8


def bits(dtype: str) -> int:
    """Of an entry.

    >>> bits("f8e4m3fn"), bits("pred"), bits("bf16"), bits("s4")
    (8, 8, 16, 4)
    """
    found = re.search("[0-9]+", dtype)
    return 8 if found is None else int(found[0])


def entries(shape: str) -> int:
    """Of an array, by its shape "4,2"; 1 of a scalar."""
    total = 1
    for axis in shape.split(",") if shape else ():
        total *= int(axis)
    return total
