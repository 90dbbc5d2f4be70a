"""Options of a transform as a recipe may give them, read off the factory's own signature.

A factory's keyword-only parameters are its options; their annotations say what TOML values are
accepted; None is written "none". What TOML cannot write (arrays, functions) is no option of a
recipe.
"""

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping

__all__ = ["Mismatch", "Option", "convert", "describe", "listed", "nearest", "options_from"]

REQUIRED = inspect.Parameter.empty
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
    """One option: a keyword-only parameter of a factory.

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

    >>> def factory(*, keep: float = 0.5, hook: object = None): ...
    >>> [str(option) for option in options_from(factory).values()]
    ['keep: number (default 0.5)']
    """
    hints = typing.get_type_hints(factory)
    found = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        annotation = hints.get(name, str)
        is_writable = describe(annotation) not in ("", describe(types.NoneType))
        if parameter.kind is parameter.KEYWORD_ONLY and is_writable:
            found[name] = Option(name, annotation, parameter.default)
    return found


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
