"""What a compiled program does on each device, read from its text: products, and what it sends.

The compiler's own cost analysis counts the body of a loop once and no bytes of collectives. Here a
body counts as often as it runs, where the compiler knows that (`known_trip_count`). How often a
loop over the tokens of an expert runs depends on the tokens.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

__all__ = ["COLLECTIVES", "Program", "Sent", "read_program"]

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
# `%name (parameters) -> result {` begins a computation, "}" ends it.
BEGIN = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
ENTRY = re.compile(r"^ENTRY %?([\w.\-]+)", re.MULTILINE)
OPERATION = re.compile(r"%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
NAME = re.compile(r"%([\w.\-]+)")
SUMMED = re.compile(r"lhs_contracting_dims=\{([0-9,]*)\}")
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


class Program(NamedTuple):
    """What a device does.

    Attributes:
      multiply_adds: of matrix products outside of loops of unknown length.
      sent: collectives by kind; kinds that do not occur are left out.
      varying: multiply-adds of one turn of each loop of unknown length.
    """

    multiply_adds: int
    sent: dict[str, Sent]
    varying: int = 0

    @property
    def bytes(self) -> int:
        """Of the results of all collectives."""
        return sum(each.bytes for each in self.sent.values())


class Operation(NamedTuple):
    """A line of a computation: `%name = result kind(rest`."""

    name: str
    result: str
    kind: str
    rest: str


def read_program(text: str) -> Program:
    """Reads a program.

    Of a conditional the branch that does most counts, and what is sent in a loop of unknown length
    counts once.

    Args:
      text: `compiled.as_text()`, for one device or several.
    """
    bodies = dict(computations(text))
    entry = ENTRY.search(text)
    return Program(0, {}) if entry is None else of_computation(entry[1], bodies, {})


def computations(text: str) -> Iterator[tuple[str, list[Operation]]]:
    """Name and operations of every computation."""
    name, found = "", []
    for line in map(str.strip, text.splitlines()):
        begun, operation = BEGIN.match(line), OPERATION.search(line)
        if begun:
            name, found = begun[1], []
        elif line == "}":
            yield name, found
        elif operation is not None:
            found.append(Operation(*operation.groups()))


def of_computation(
    name: str, bodies: Mapping[str, Sequence[Operation]], known: dict[str, Program]
) -> Program:
    """What is done when a computation runs, those that it calls included."""
    if name not in known:
        lines = bodies.get(name, ())
        shapes = {line.name: line.result for line in lines}
        known[name] = Program(0, {})
        for line in lines:
            known[name] = added(known[name], of_operation(line, shapes, bodies, known))
    return known[name]


def of_operation(
    line: Operation,
    shapes: Mapping[str, str],
    bodies: Mapping[str, Sequence[Operation]],
    known: dict[str, Program],
) -> Program:
    """What one operation does."""
    kind = line.kind.removesuffix("-start")
    if kind in COLLECTIVES:
        sent = Sent(1, size(line.result, started=kind != line.kind))
        return Program(0, {kind: sent})
    if kind == "dot":
        return Program(products(line, shapes), {})
    branches = [
        each.strip().lstrip("%")
        for several, one in BRANCHES.findall(line.rest)
        for each in (several or one).split(",")
    ]
    if branches:
        each = [of_computation(branch, bodies, known) for branch in branches]
        return max(each, key=lambda found: (found.multiply_adds + found.varying, found.bytes))
    trips = TRIPS.search(line.rest)
    times = int(trips[1]) if trips and kind == "while" else 1
    found = Program(0, {})
    for called in CALLED.findall(line.rest):
        found = added(found, of_computation(called, bodies, known), times)
    if kind == "while" and trips is None:
        return Program(0, found.sent, found.multiply_adds + found.varying)
    return found


def added(one: Program, other: Program, times: int = 1) -> Program:
    """What is done by one, and by the other so many times over."""
    sent = dict(one.sent)
    for kind, more in other.sent.items():
        before = sent.get(kind, Sent(0, 0))
        sent[kind] = Sent(before.count + times * more.count, before.bytes + times * more.bytes)
    multiply_adds = one.multiply_adds + times * other.multiply_adds
    return Program(multiply_adds, sent, one.varying + times * other.varying)


def products(dot: Operation, shapes: Mapping[str, str]) -> int:
    """Multiplications of a product: entries of the result, times what each is a sum of."""
    left = NAME.search(dot.rest)
    summed = SUMMED.search(dot.rest)
    shape = axes(ARRAY.findall(shapes.get(left[1], ""))[0][1]) if left else []
    inner = [shape[int(axis)] for axis in summed[1].split(",") if axis] if summed else []
    return math.prod(axes(ARRAY.findall(dot.result)[0][1])) * math.prod(inner)


def size(result: str, *, started: bool) -> int:
    """Bytes of a result; one that is started has its operands beside it, as many as results.

    >>> size("(f32[4,2]{1,0}, s8[3])", started=False), size("(bf16[4], bf16[8])", started=True)
    (35, 16)
    """
    each = [bits(dtype) * math.prod(axes(shape)) for dtype, shape in ARRAY.findall(result)]
    return sum(each[len(each) // 2 :] if started else each) // 8


def bits(dtype: str) -> int:
    """Of an entry.

    >>> bits("f8e4m3fn"), bits("pred"), bits("bf16"), bits("s4")
    (8, 8, 16, 4)
    """
    found = re.search("[0-9]+", dtype)
    return 8 if found is None else int(found[0])


def axes(shape: str) -> list[int]:
    """An array's axes, from "4,2"; none of a scalar's."""
    return [int(axis) for axis in shape.split(",") if axis]
