"""TOML tables as frozen dataclasses, checked whole: every unknown key and wrong type at once.

Why no library: msgspec (0.22) ends at the first problem and takes unknown keys of dataclasses;
cattrs (26.2) tells all problems, but takes "7" for a whole number, True for 1.0 and 2.5 for an
optional whole number unless every primitive type gets a hook of one's own, and does not name the
accepted keys.
"""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import TypeVar

from ffnlab.errors import ConfigError

T = TypeVar("T")


def read_config(source: str | Path, kind: type[T]) -> T:
    """Reads a TOML file, or a preset by name, into a dataclass.

    Args:
      source: a path, or the name of a preset in `ffnlab/presets` ("embedded").
      kind: a dataclass type; nested dataclasses are tables, and a field annotated as a Mapping
        is a table of anything, which its dataclass or a later reader checks.
    Returns:
      an instance; keys left out keep their defaults.
    Raises:
      ConfigError: no such file or preset, bad TOML, unknown keys (the accepted ones are listed),
        wrong types, or values the dataclass refuses.
    """
    name, text = _text(source)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not valid TOML: {error}") from None
    return from_table(table, kind, name)


def presets() -> list[str]:
    """Names of the presets that come with the package."""
    folder = resources.files("ffnlab") / "presets"
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def _text(source: str | Path) -> tuple[str, str]:
    if isinstance(source, str) and source in presets():
        return source, (resources.files("ffnlab") / "presets" / f"{source}.toml").read_text("utf-8")
    try:
        return str(source), Path(source).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(
            f"config {str(source)!r} cannot be read ({reason}); presets are {presets()}"
        ) from None


def from_table(table: Mapping[str, object], kind: type[T], name: str = "config") -> T:
    """Builds a dataclass from a nested table.

    Args:
      table: values by field name; a nested dataclass is a nested table.
      kind: the dataclass type.
      name: what the table is called in errors.
    Raises:
      ConfigError: all problems found, each with its dotted key.
    """
    problems = list(_problems(table, kind, ""))
    if problems:
        raise ConfigError(f"{name}: " + "; ".join(problems))
    return _build(table, kind, name)


def to_table(config: object) -> dict[str, object]:
    """The inverse of `from_table`: nested dicts of plain values, without those that are None."""
    pairs = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {
        key: to_table(value)
        if dataclasses.is_dataclass(value)
        else list(value)
        if isinstance(value, tuple)
        else dict(value)
        if isinstance(value, Mapping)
        else value
        for key, value in pairs.items()
        if value is not None
    }


def table_of(hint: object) -> type | None:
    """The dataclass that a table of a file is read into: the hint itself, or beside None.

    >>> table_of(int | None)
    """
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]
    return kinds[0] if kinds else None


def is_free(hint: object) -> bool:
    """Whether a field is a table of anything.

    >>> is_free(Mapping[str, object])
    True
    """
    return typing.get_origin(hint) is Mapping


def _problems(table: object, kind: type, prefix: str) -> Iterator[str]:
    if not isinstance(table, Mapping):
        yield f"{prefix.rstrip('.') or 'it'} must be a table, not {table!r}"
        return
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in table.items():
        if key not in fields:
            yield f"unknown key {prefix + key!r}; accepted: {', '.join(sorted(fields))}"
        elif (inner := table_of(hints[key])) is not None:
            yield from _problems(value, inner, f"{prefix}{key}.")
        elif not _fits(value, hints[key]):
            yield f"{prefix}{key}={value!r} is not of type {_name(hints[key])}"
    for key, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and key not in table:
            yield f"missing key {prefix + key!r}"


def _fits(value: object, hint: object) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(item, args[0]) for item in value)
    if is_free(hint):
        return isinstance(value, Mapping)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(hint, type) and isinstance(value, hint)


def _name(hint: object) -> str:
    if is_free(hint):
        return "table"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _build(table: Mapping, kind: type[T], name: str) -> T:
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in table.items():
        if (inner := table_of(hints[key])) is not None:
            values[key] = _build(value, inner, f"{name}: {key}")
        elif isinstance(value, list):
            values[key] = tuple(value)
        else:
            values[key] = float(value) if hints[key] is float else value
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
