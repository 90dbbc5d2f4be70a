"""The arguments of a command as tyro shows them: types without None, help from the docstring."""

import inspect
import shutil
import textwrap
import types
import typing
from collections.abc import Callable

from ffnlab.docstrings import entries, prose
from ffnlab.errors import require

__all__ = ["described", "description_of"]

SHORT = {"processes": "-n"}
WORDS = {"Path": "PATH", "str": "STR", "int": "INT", "float": "FLOAT"}


def described(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """A command with annotations that tell tyro what to print of each argument.

    Left alone, tyro writes `{None}|PATH` and "(default: None)" where an argument may be left out,
    and breaks its help where the docstring's lines end.
    """
    help_of, hints = entries(function, "Args"), typing.get_type_hints(function)
    signature = inspect.signature(function)

    # Not functools.wraps, nor what a type checker would wrap: tyro looks through that.
    command = lambda *arguments, **options: function(*arguments, **options)  # noqa: E731
    parameters = {
        name: parameter.replace(annotation=annotated(parameter, hints[name], help_of.get(name)))
        for name, parameter in signature.parameters.items()
    }
    command.__name__ = function.__name__
    command.__signature__ = signature.replace(parameters=list(parameters.values()))
    command.__annotations__ = {name: p.annotation for name, p in parameters.items()}
    return command


def annotated(parameter: inspect.Parameter, hint: typing.Any, text: str | None) -> object:
    """The type of one parameter with what is to be printed of it."""
    tyro = require("tyro", extra="run")
    is_optional = parameter.default is not parameter.empty
    says_nothing = any(parameter.default is nothing for nothing in (None, (), False, ""))
    says_nothing = says_nothing or (not is_optional and typing.get_origin(hint) is tuple)
    name = metavar(hint)
    if name and is_optional and parameter.kind is parameter.POSITIONAL_ONLY:
        name = f"[{name.strip('[]')}]"
    hidden = {"help_behavior_hint": ""} if says_nothing else {}
    short = {"aliases": [SHORT[parameter.name]]} if parameter.name in SHORT else {}
    return typing.Annotated[hint, tyro.conf.arg(metavar=name, help=text, **hidden, **short)]


def metavar(hint: object) -> str | None:
    """What stands for a value: `PATH`, `[PATH …]`, `{a,b}`; None leaves it to tyro.

    >>> metavar(int | None), metavar(tuple[str, ...]), metavar(bool)
    ('INT', '[STR …]', None)
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return metavar(next(part for part in inner if part is not types.NoneType))
    if origin is tuple:
        return f"[{metavar(inner[0])} …]"
    if origin is typing.Literal:
        return f"{{{','.join(map(str, inner))}}}"
    return WORDS.get(getattr(hint, "__name__", ""))


def description_of(function: Callable) -> str:
    """What a command does, in paragraphs no wider than the terminal.

    Lines after the first begin with a space: tyro joins those that begin with a letter.
    """
    wrap = textwrap.TextWrapper(shutil.get_terminal_size().columns, subsequent_indent=" ")
    return "\n\n".join(map(wrap.fill, prose(function)))
