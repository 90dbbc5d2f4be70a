"""Options of a method as a TOML file may give them, read off the factory's own signature.

The parameters that can be given by name are a factory's options; their annotations say what TOML
values are accepted, their defaults where there is no annotation; None is written "none". What TOML
cannot write (arrays, functions) is no option of a file.
"""

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping

__all__ = [
    "BY_KIND",
    "Mismatch",
    "Option",
    "checked",
    "convert",
    "describe",
    "listed",
    "nearest",
    "options_from",
    "toml",
]

REQUIRED = inspect.Parameter.empty
# Metadata of a field of a dataclass that is one of several, by name: a table says its `kind`.
BY_KIND = "ffnlab.kinds"
NONE = "none"  # how a recipe writes None, which TOML has no word for
PLAIN = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "string",
    types.NoneType: repr(NONE),
}
UNION = (typing.Union, types.UnionType)


class Mismatch(Exception):
    """A TOML value that an annotation does not admit; its text says what was expected."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One option: a parameter of a factory.

    Attributes:
      name: of the parameter.
      annotation: its type, resolved.
      default: its default; `Option.required` tells whether there is none.
    """

    name: str
    annotation: object
    default: object

    @property
    def required(self) -> bool:
        """Whether the factory has no default for it."""
        return self.default is REQUIRED

    def __str__(self) -> str:
        default = "required" if self.required else f"default {toml(self.default)}"
        return f"{self.name}: {describe(self.annotation)} ({default})"


def options_from(factory: Callable) -> dict[str, Option]:
    """The options of a factory by name, in its order.

    Raises:
      ValueError, TypeError: it has no signature, as some functions written in C.

    >>> def factory(*, keep: float = 0.5, hook: object = None): ...
    >>> [str(option) for option in options_from(factory).values()]
    ['keep: number (default 0.5)']
    """
    found = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        annotation = annotation_of(factory, parameter)
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        is_writable = describe(annotation) not in ("", describe(types.NoneType))
        if is_named and is_writable:
            found[name] = Option(name, annotation, parameter.default)
    return found


def annotation_of(factory: Callable, parameter: inspect.Parameter) -> object:
    """What a parameter is annotated as; the type of its default where it is not.

    None, which no value fits, where the annotation names what is not there: other packages import
    some names for type checkers only.
    """
    if parameter.annotation is parameter.empty:
        return type(parameter.default)
    names = getattr(inspect.unwrap(factory), "__globals__", {})
    holder = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    try:
        hint = typing.get_type_hints(holder, names)[parameter.name]
        hash(hint)
    except Exception:  # noqa: BLE001 - an annotation from outside is any expression
        return None
    return hint


def describe(annotation: object) -> str:
    """What TOML values an annotation admits, in words; empty when there are none.

    >>> describe(int | typing.Literal["all"] | None)
    "integer or 'all' or 'none'"
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in PLAIN:
        return PLAIN[annotation]
    if origin in UNION:
        return " or ".join(dict.fromkeys(filter(None, map(describe, arguments))))
    if origin is typing.Literal:
        return " or ".join(map(toml, arguments))
    items = item_types(annotation)
    return f"list of {describe(items)}" if items and describe(items) else ""


def convert(value: object, annotation: object) -> object:
    """A TOML value as the annotated type: a list becomes a tuple, an integer a float where needed.

    Raises:
      Mismatch: the annotation does not admit the value.

    >>> convert([1, 2], tuple[float, ...])
    (1.0, 2.0)
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in UNION:
        return convert_to_any(value, arguments)
    if origin is typing.Literal:
        if any(value == a and type(value) is type(a) for a in arguments):
            return value
    elif annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif annotation is types.NoneType:
        if value == NONE:
            return None
    elif annotation in (bool, int, str):
        if type(value) is annotation:
            return value
    elif isinstance(value, list) and (items := item_types(annotation)):
        return tuple(convert(item, items) for item in value)
    raise Mismatch(describe(annotation))


def convert_to_any(value: object, annotations: Iterable[object]) -> object:
    """The value as the first of several types that admits it; an integer stays one if it may."""
    annotations = sorted(annotations, key=lambda a: a is float)
    for annotation in annotations:
        try:
            return convert(value, annotation)
        except Mismatch:
            continue
    raise Mismatch(" or ".join(filter(None, map(describe, annotations))))


def item_types(annotation: object) -> object:
    """The item type of `tuple[X, ...]`, `list[X]` and `Sequence[X]`, else None."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    is_sequence = isinstance(origin, type) and issubclass(origin, typing.Sequence)
    if not is_sequence or not arguments or arguments[1:] not in ((), (...,)):
        return None
    return arguments[0]


def toml(value: object) -> str:
    """A default as one would write it in a recipe."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return repr(NONE)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml, value))}]"
    return repr(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name most like this one, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def listed(options: Mapping[str, Option]) -> str:
    """The accepted options with their defaults, one per line, for an error message."""
    return "\n".join(f"      {option}" for option in options.values()) or "      (none)"


def checked(
    given: Mapping[str, object], known: Mapping[str, Option], where: str, problems: list[str]
) -> dict[str, object]:
    """The entries of a table as their options take them.

    Args:
      given: the table.
      known: the options.
      where: it stands, for messages.
      problems: one is appended for each entry that is unknown or of another type.
    Returns:
      the entries that are neither.
    """
    found = {}
    unknown = [name for name in given if name not in known]
    for name, value in given.items():
        if name in unknown:
            continue
        try:
            found[name] = convert(value, known[name].annotation)
        except Mismatch:
            expected = describe(known[name].annotation)
            problems.append(f"{where}: {name} = {toml(value)}; expected {expected}")
    if unknown:
        names = ", ".join(f"{name!r}{nearest(name, known)}" for name in unknown)
        problems.append(f"{where}: unknown option {names}; it takes\n{listed(known)}")
    return found
