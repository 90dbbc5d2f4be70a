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
from ffnlab.options import BY_KIND

T = TypeVar("T")
KIND = "kind"  # the key of a table that chooses


def by_kind(kinds: Mapping[str, type]) -> dict[str, Mapping[str, type]]:
    """Metadata of a field that is one of several tables: the key `kind` says which, or the first.

    Args:
      kinds: name -> dataclass type.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Circle:
    ...     radius: float
    >>> @dataclasses.dataclass(frozen=True)
    ... class Square:
    ...     side: float
    >>> shapes = {"circle": Circle, "square": Square}
    >>> @dataclasses.dataclass(frozen=True)
    ... class Drawing:
    ...     shape: object = dataclasses.field(metadata=by_kind(shapes))
    >>> from_table({"shape": {"kind": "square", "side": 2}}, Drawing)
    Drawing(shape=Square(side=2.0))
    >>> to_table(Drawing(Square(2.0))), to_table(Drawing(Circle(2.0)))
    ({'shape': {'kind': 'square', 'side': 2.0}}, {'shape': {'radius': 2.0}})
    """
    return {BY_KIND: kinds}


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
    name, table = read_table(source)
    return from_table(table, kind, name)


def read_table(source: str | Path) -> tuple[str, dict[str, object]]:
    """(name, content) of a TOML file, or of a preset by name.

    Raises:
      ConfigError: no such file or preset, or bad TOML.
    """
    name, text = _text(source)
    try:
        return name, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not valid TOML: {error}") from None


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
        f.name: kind_table(f, pairs[f.name]) | to_table(pairs[f.name])
        if dataclasses.is_dataclass(pairs[f.name])
        else list(pairs[f.name])
        if isinstance(pairs[f.name], tuple)
        else dict(pairs[f.name])
        if isinstance(pairs[f.name], Mapping)
        else pairs[f.name]
        for f in dataclasses.fields(config)
        if pairs[f.name] is not None
    }


def kind_table(field: dataclasses.Field, value: object) -> dict[str, object]:
    """{"kind": name} of a value in a field of several kinds; nothing of the first, or elsewhere."""
    kinds = field.metadata.get(BY_KIND, {})
    others = (name for name, kind in list(kinds.items())[1:] if kind is type(value))
    name = next(others, None)
    return {} if name is None else {KIND: name}


def chosen(field: dataclasses.Field, hint: object, value: object) -> tuple[type | None, object]:
    """The dataclass that a key's table is read into, and the table without its kind.

    None where it is no table, or of a kind that is not known.
    """
    kinds = field.metadata.get(BY_KIND)
    if kinds is None or not isinstance(value, Mapping):
        return (table_of(hint) if kinds is None else next(iter(kinds.values()))), value
    name = value.get(KIND, next(iter(kinds)))
    found = kinds.get(name) if isinstance(name, str) else None
    return found, {k: v for k, v in value.items() if k != KIND}


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
        elif BY_KIND in fields[key].metadata or table_of(hints[key]) is not None:
            inner, rest = chosen(fields[key], hints[key], value)
            if inner is None:
                known = ", ".join(map(repr, fields[key].metadata[BY_KIND]))
                yield f"{prefix}{key}.{KIND}={value[KIND]!r} is not one of {known}"
            else:
                yield from _problems(rest, inner, f"{prefix}{key}.")
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


def frozen(value: object) -> object:
    """Lists as tuples, those within lists too.

    >>> frozen([[1, 2], [3, 4]])
    ((1, 2), (3, 4))
    """
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def _build(table: Mapping, kind: type[T], name: str) -> T:
    hints, fields = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for key, value in table.items():
        inner, rest = chosen(fields[key], hints[key], value)
        if inner is not None:
            values[key] = _build(rest, inner, f"{name}: {key}")
        elif isinstance(value, list):
            values[key] = frozen(value)
        else:
            values[key] = float(value) if hints[key] is float else value
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
