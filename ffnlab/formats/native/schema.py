"""What may stand in a native file: the listed types, and static values as JSON.

A type is listed by being exported: modules, Variables and weights of `ffnlab.layers`,
`ffnlab.weights` and `ffnlab.models`, and their frozen dataclasses of plain fields (configurations).
A static value is None, a boolean, a number, a string, a tuple or such a dataclass; a JSON list is
always a tuple, because a static list could not be hashed.
"""

import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Mapping

import numpy as np
from flax import nnx

from ffnlab import layers, models, weights
from ffnlab.errors import FormatError
from ffnlab.formats.untrusted import quoted
from ffnlab.storage.structure import JSONValue, told
from ffnlab.weights import Weight

__all__ = ["CONTAINERS", "fits", "from_json", "is_config", "listed", "name_of", "to_json"]

CONTAINERS: Mapping[str, type] = types.MappingProxyType(
    {"dict": dict, "list": list, "tuple": tuple}
)
STATIC_DEPTH = 16  # of tuples and dataclasses within each other
INFINITE = {"inf": math.inf, "-inf": -math.inf}
PLAIN = (bool, int, float, str, types.NoneType)


@functools.cache
def listed() -> Mapping[str, type]:
    """The types that a file may name, by name."""
    found: dict[str, type] = {"List": nnx.List, "Param": nnx.Param}
    for package in (layers, weights, models):
        above = getattr(package, "ABOVE", ())  # names of higher floors, which hold no models
        exports = (getattr(package, name) for name in package.__all__ if name not in above)
        for kind in exports:
            if inspect.isclass(kind) and is_listed(kind):
                if found.setdefault(kind.__name__, kind) is not kind:
                    raise TypeError(f"two listed types are called {kind.__name__}")
    return types.MappingProxyType(found)


def is_listed(kind: type) -> bool:
    """Whether an export is a part of models, or a configuration of one."""
    is_part = issubclass(kind, nnx.Module | nnx.Variable)
    is_weight = issubclass(kind, Weight) and not inspect.isabstract(kind)
    return is_part or is_weight or is_config(kind)


def is_config(kind: object) -> bool:
    """Whether a type is a frozen dataclass whose fields are plain values or such dataclasses.

    >>> is_config(layers.Rope), is_config(layers.Context), is_config(models.Cache)
    (True, False, False)
    """
    if not (inspect.isclass(kind) and dataclasses.is_dataclass(kind)):
        return False
    is_frozen = kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    return is_frozen and not issubclass(kind, Weight) and all(map(is_plain, hints(kind).values()))


def is_plain(hint: object) -> bool:
    """Whether a JSON value can be what an annotation asks for."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType, tuple):
        return all(is_plain(kind) for kind in inner if kind is not Ellipsis)
    return origin is typing.Literal or hint in PLAIN or is_config(hint)


@functools.cache
def hints(kind: type) -> Mapping[str, object]:
    """The annotation of each field of a dataclass."""
    found = typing.get_type_hints(kind)
    return {field.name: found[field.name] for field in dataclasses.fields(kind)}


def fits(value: object, hint: object) -> bool:
    """Whether a static value is of an annotated type; an integer may stand for a float.

    >>> fits((1, None), tuple[int | None, ...]), fits(True, int), fits(1, float)
    (True, False, True)
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, kind) for kind in inner)
    if origin is typing.Literal:
        return any(value == kind and type(value) is type(kind) for kind in inner)
    if origin is tuple:
        if type(value) is not tuple:
            return False
        kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
        return len(kinds) == len(value) and all(map(fits, value, kinds))
    return type(value) is hint or (hint is float and type(value) is int)


def name_of(node: object, where: str) -> str:
    """The name that a file has for the type of a node.

    Raises:
      FormatError: the type is not listed.
    """
    kind = type(node)
    known = listed().get(kind.__name__) or CONTAINERS.get(kind.__name__)
    if known is not kind:
        raise FormatError(
            f"{where} is a {kind.__name__}, which the native format does not know; it knows the "
            "modules, weights and configurations of ffnlab.layers, ffnlab.weights, ffnlab.models"
        )
    return kind.__name__


def to_json(value: object, where: str) -> JSONValue:
    """A static value as it stands in a file.

    Args:
      value: of a static field.
      where: its path, for messages.
    Raises:
      FormatError: it is not a static value of the format: a function, an array, a list, NaN.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and type(value) is float and not math.isfinite(value):
        if math.isnan(value):
            raise FormatError(f"{where} is NaN, which no static field can be: it is unlike itself")
        return {"float": repr(value)}
    if type(value) in PLAIN:
        return value  # type: ignore[return-value]
    if type(value) is tuple:
        return [to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if is_config(type(value)):
        fields = {f.name: to_json(getattr(value, f.name), f"{where}.{f.name}") for f in told(value)}
        return {"type": name_of(value, where), "fields": fields}
    what = f"the {type(value).__name__} {getattr(value, '__qualname__', '')}".rstrip()
    raise FormatError(
        f"{where} is {what}; a static field is None, a boolean, a number, a string, a tuple of "
        "such, or a configuration (functions by their name, lists as tuples)"
    )


def from_json(value: object, where: str, depth: int = 0) -> object:
    """The static value that stands in a file; the inverse of `to_json`.

    Args:
      value: what was read, untrusted.
      where: its place, for messages.
      depth: of tuples and dataclasses around it.
    Raises:
      FormatError: it is none, or a configuration refuses its fields.
    """
    if depth > STATIC_DEPTH:
        raise FormatError(f"{where}: static values are nested more than {STATIC_DEPTH} deep")
    if type(value) in PLAIN:
        return value
    if isinstance(value, list):
        return tuple([from_json(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)])
    if isinstance(value, dict) and value.keys() == {"float"} and is_infinite(value["float"]):
        return INFINITE[value["float"]]
    if not isinstance(value, dict) or value.keys() != {"type", "fields"}:
        raise FormatError(f"{where}: {quoted(value)} is no static value")
    kind = listed().get(value["type"]) if isinstance(value["type"], str) else None
    if kind is None or not is_config(kind):
        raise FormatError(f"{where}: {quoted(value['type'])} is no listed configuration")
    fields = checked_fields(value["fields"], hints(kind), kind, where, depth + 1)
    try:
        return kind(**fields)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise FormatError(f"{where}: {error}") from None


def is_infinite(text: object) -> bool:
    """Whether a text stands for an infinity."""
    return isinstance(text, str) and text in INFINITE


def checked_fields(
    table: object, wanted: Mapping[str, object], kind: type, where: str, depth: int = 0
) -> dict[str, typing.Any]:
    """Static fields of a dataclass as a file gives them.

    Args:
      table: what was read, untrusted.
      wanted: annotations of the fields it may give.
      kind: the dataclass; fields with a default may be left out, and have it then.
      where: the place, for messages.
      depth: see `from_json`.
    Raises:
      FormatError: fields are unknown, missing or of another type.
    """
    if not isinstance(table, dict):
        raise FormatError(f"{where}: fields {quoted(table)} are no object")
    unknown = sorted(table.keys() - wanted.keys())
    if unknown:
        raise FormatError(f"{where}: {kind.__name__} has no field {quoted(unknown[0])}")
    values = {name: from_json(v, f"{where}.{name}", depth) for name, v in table.items()}
    for name, value in values.items():
        if not fits(value, wanted[name]):
            hint = getattr(wanted[name], "__name__", str(wanted[name]))
            raise FormatError(f"{where}.{name}: {quoted(value)} is not of type {hint}")
    for field in dataclasses.fields(kind):
        if field.name in wanted and field.name not in values:
            if field.default is dataclasses.MISSING:
                raise FormatError(f"{where}: {kind.__name__} lacks its field {field.name!r}")
            values[field.name] = field.default
    return values
