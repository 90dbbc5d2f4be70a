"""What may stand in a training file and in a recipe: each key with type, default and meaning.

Types and defaults are those of the dataclasses and factories that the files are read into, and the
meaning is what their docstrings say.
"""

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ffnlab.docstrings import entries, prose
from ffnlab.errors import ConfigError
from ffnlab.options import BY_KIND, describe, toml
from ffnlab.outside import Methods
from ffnlab.parallel.config import is_free, table_of
from ffnlab.recipes import METHODS, Calibration, Evaluation, Stage

__all__ = ["Key", "Section", "method_keys", "recipe_keys", "training_keys"]


class Key(typing.NamedTuple):
    """One key of a file.

    Attributes:
      name: of the key.
      kind: what values it takes, in words.
      default: what stands for it where it is left out, as TOML; "required", or "" for nothing.
      meaning: one line.
    """

    name: str
    kind: str
    default: str
    meaning: str


class Section(typing.NamedTuple):
    """One table of a file.

    Attributes:
      head: how it begins in the file; "" for keys before any table.
      meaning: one line.
      keys: that it may have.
    """

    head: str
    meaning: str
    keys: tuple[Key, ...]

    def __rich__(self) -> Group:
        parts = [Text(self.head, "bold"), Padding(Text(self.meaning), (0, 1))]
        if not self.keys:
            return Group(*parts)
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in Key._fields:
            table.add_column(name, overflow="fold", no_wrap=name == "name")
        for key in self.keys:
            table.add_row(*map(Text, key))
        return Group(*parts, table)


def training_keys(kind: type, name: str = "") -> Iterator[Section]:
    """The tables of a TOML file that is read into a dataclass, its own keys first.

    Args:
      kind: a dataclass type; fields that are dataclasses are tables, and so are Mappings, whose
        keys another part of the file decides.
      name: of its table in the file.
    """
    hints, meanings = typing.get_type_hints(kind), entries(kind, "Attributes")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    several = {
        key: field.metadata[BY_KIND] for key, field in fields.items() if BY_KIND in field.metadata
    }
    tables = {key: inner for key in fields if (inner := table_of(hints[key])) is not None}
    tables |= {key: next(iter(kinds.values())) for key, kinds in several.items()}
    keys = tuple(
        Key(key, described(without_none(hints[key])), default_of(field), meanings.get(key, ""))
        for key, field in fields.items()
        if key not in tables and not is_free(hints[key])
    )
    yield Section(f"[{name}]" if name else "", prose(kind)[0], keys)
    for key in fields:
        table = f"{name}.{key}" if name else key
        if is_free(hints[key]):
            yield Section(f"[{table}]", meanings[key], ())
        if key not in tables:
            continue
        first, *rest = training_keys(tables[key], table)
        yield first._replace(meaning=meanings.get(key, first.meaning))
        yield from rest
        for other, inner in list(several.get(key, {}).items())[1:]:
            head = f'[{table}]\nkind = "{other}"'
            first, *rest = training_keys(inner, table)
            yield first._replace(head=head)
            yield from rest


def recipe_keys() -> Iterator[Section]:
    """The tables of a recipe: what it measures on, and the options of every transform."""
    yield from training_keys(Calibration, "calibration")
    yield from training_keys(Evaluation, "evaluation")
    yield from method_keys(METHODS, METHODS.names(), '[[stage]]\ntransform = "{}"')
    meaning = entries(Stage, "Attributes")["calibration"]
    yield Section("[stage.calibration]", f"{meaning} The keys of [calibration], of one stage.", ())


def method_keys(methods: Methods, names: Iterable[str], head: str) -> Iterator[Section]:
    """The options of methods by name; of one that cannot be had, the reason.

    Args:
      methods: of one kind.
      names: of those to list.
      head: of the table, with {} for the name.
    """
    for name in names:
        try:
            make, known = methods.factory(name), methods.options(name).values()
        except ConfigError as error:
            yield Section(head.format(name), str(error), ())
            continue
        meanings = entries(make, "Args")
        keys = tuple(
            Key(
                option.name,
                describe(option.annotation),
                "required" if option.required else toml(option.default),
                meanings.get(option.name, ""),
            )
            for option in known
        )
        yield Section(head.format(name), next(iter(prose(make)), ""), keys)


def described(hint: object) -> str:
    """What values a key takes, in words.

    >>> from collections.abc import Mapping
    >>> described(tuple[int, ...]), described(tuple[Mapping[str, object], ...])
    ('list of integer', 'tables, [[…]] each')
    """
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and is_free(inner[0]):
        return "tables, [[…]] each"
    return describe(hint)


def default_of(field: dataclasses.Field) -> str:
    """The default of a field as TOML, which has no word for None."""
    if field.default is dataclasses.MISSING:
        return "required"
    return "" if field.default is None else toml(field.default)


def without_none(hint: object) -> object:
    """A type without None, which a training file cannot say: the key is left out instead.

    >>> without_none(tuple[int | None, ...] | None)
    tuple[int, ...]
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    kinds = [without_none(kind) for kind in inner if kind is not types.NoneType]
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, kinds)
    return types.GenericAlias(tuple, tuple(kinds)) if origin is tuple else hint
