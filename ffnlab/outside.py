"""Methods that a file or a command may name: ours, those of other packages, any function.

A name is one of ours, one that an installed package registers by an entry point, or
"module:factory", of whatever Python can import. The file's own folder is not searched, so that a
file which came with a download runs none of the code beside it. A package registers names so:

    [project.entry-points."ffnlab.transforms"]      # or ".rules", ".optimizers", ".probes"
    ternary = "ternary:ternarize"

Only `factory`, `options`, `read` and `make` import anything, and only for a name that the user
gave. Names read from a model, a checkpoint or a report are compared and never imported.
"""

import dataclasses
import importlib
import importlib.metadata
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Generic, TypeVar

from ffnlab.errors import ConfigError, FFNLabError, first_line
from ffnlab.options import Option, checked, listed, nearest, options_from

__all__ = ["Methods"]

TARGET = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*(?:\.[^\W\d]\w*)*)")
SPELLED = '"module:factory"'
MISSING = object()
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Methods(Generic[R]):
    """The methods of one kind.

    Attributes:
      kind: "transform", "rule", "optimizer" or "probe", for messages.
      group: of the entry points by which packages register names.
      result: what a factory returns.
      own: names of ours -> the factory, or "module:factory".
      given: parameters that the caller fills in by name; they are no options.
      leading: how many parameters the caller fills in by position.
    """

    kind: str
    group: str
    result: type[R]
    own: Mapping[str, str | Callable]
    given: frozenset[str] = frozenset()
    leading: int = 0

    def registered(self) -> dict[str, list[EntryPoint]]:
        """Names that installed packages register, with the entry points of each; none is loaded."""
        found: dict[str, list[EntryPoint]] = {}
        for entry in importlib.metadata.entry_points(group=self.group):
            found.setdefault(entry.name, []).append(entry)
        return found

    def names(self) -> list[str]:
        """All names, ours first; those of a package that are ours too are refused."""
        return [*self.own, *(name for name in self.registered() if name not in self.own)]

    def check(self, name: str) -> None:
        """Checks a name without importing anything.

        Raises:
          ConfigError: it is no known name and not spelled "module:factory".
        """
        if name in self.own or TARGET.fullmatch(name):
            return
        names = self.names()
        if name not in names:
            raise ConfigError(
                f"unknown {self.kind} {name!r}{nearest(name, names)}; there are: "
                f"{', '.join(names)}, and {SPELLED} of what Python can import"
            )

    def factory(self, name: str) -> Callable:
        """The factory that a name stands for, imported.

        Raises:
          ConfigError: there is none, two packages register the name, or importing fails.
        """
        self.check(name)
        if name in self.own:
            target, where = self.own[name], f"{self.kind} {name!r}"
            return target if callable(target) else load(target, where)
        entries = self.registered().get(name, [])
        if len({entry.value for entry in entries}) > 1:
            raise ConfigError(
                f"{self.kind} {name!r} is registered more than once, by {sources(entries)}; "
                "name one by its module"
            )
        if entries:
            target = entries[0].value.partition("[")[0].replace(" ", "")
            return load(target, f"{self.kind} {name!r} of {sources(entries[:1])}")
        return load(name, f"{self.kind} {name!r}")

    def options(self, name: str) -> dict[str, Option]:
        """The options of a method, read off its factory's signature.

        Raises:
          ConfigError: see `factory`; or it needs something that TOML cannot write.
        """
        make = self.factory(name)
        try:
            parameters = [*inspect.signature(make).parameters.values()][self.leading :]
            found = options_from(make)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{self.kind} {name!r} does not say its parameters: {error}"
            ) from None
        ours = [p for p in parameters if p.name not in self.given]
        found = {p.name: found[p.name] for p in ours if p.name in found}
        starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        for p in ours:
            if p.default is p.empty and p.kind not in starred and p.name not in found:
                raise ConfigError(
                    f"{self.kind} {name!r} needs {p.name!r}, which a file cannot give: it takes "
                    "numbers, strings, true and false, and lists of them, by name, and reads "
                    "from the annotation which"
                )
        return found

    def takes(self, name: str) -> frozenset[str]:
        """Which of the `given` parameters a factory has."""
        return self.given.intersection(inspect.signature(self.factory(name)).parameters)

    def read(self, name: str, table: Mapping[str, object], where: str) -> dict[str, object]:
        """Options as a file gives them, as the factory takes them.

        Args:
          name: of the method.
          table: the options given.
          where: they stand, for messages.
        Raises:
          ConfigError: see `options`; or some are unknown, missing or of another type.
        """
        problems: list[str] = []
        found = self.look_over(name, table, where, problems)
        if problems:
            raise ConfigError("\n".join(problems))
        return found

    def look_over(
        self, name: str, table: Mapping[str, object], where: str, problems: list[str]
    ) -> dict[str, object]:
        """As `read`, but problems of the options are appended to a list."""
        known = self.options(name)
        found = checked(table, known, where, problems)
        problems += [
            f"{where}: {option.name} is missing; it takes\n{listed(known)}"
            for option in known.values()
            if option.required and option.name not in table
        ]
        return found

    def make(self, name: str, *leading: object, **options: object) -> R:
        """Calls a factory, and checks what it returns.

        Raises:
          ConfigError: see `factory`; one from outside fails or returns something else.
          ValueError: what one of ours raises.
        Warns:
          UserWarning: a package registers a name of ours; it is refused, and ours is made.
        """
        make, where = self.factory(name), f"{self.kind} {name!r}"
        if name in self.own:
            if entries := self.registered().get(name):
                said = f"that of {sources(entries)} is refused, and is to be named by its module"
                warnings.warn(f"{where} is ffnlab's own; {said}", stacklevel=2)
            return make(*leading, **options)
        try:
            made = make(*leading, **options)
        except FFNLabError:
            raise
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ConfigError(f"{where}: {kind}{error}") from error
        if not isinstance(made, self.result):
            raise ConfigError(
                f"{where} returns {type(made).__name__}; a {self.result.__name__} is needed"
            )
        return made


def sources(entries: list[EntryPoint]) -> str:
    """The packages of entry points, and what each names."""
    return " and ".join(
        f"{entry.dist.name if entry.dist else 'a package'} ({entry.value})" for entry in entries
    )


def load(target: str, where: str) -> Callable:
    """Imports what "module:attribute" names.

    Args:
      target: of the user's own file, of an installed package or of ours.
      where: it was named, for messages.
    Raises:
      ConfigError: there is no such module or attribute, or importing it fails, or the attribute
        cannot be called.
    """
    matched = TARGET.fullmatch(target)
    if matched is None:
        raise ConfigError(f"{where}: {target!r} is not spelled {SPELLED}")
    module, path = matched.groups()
    try:
        found = holder = importlib.import_module(module)
        for attribute in path.split("."):
            holder, found = found, getattr(found, attribute, MISSING)
            if found is MISSING:
                break
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"{where}: importing {module} failed: {error}") from error
        raise ConfigError(f"{where}: no module {error.name!r}; {advice(module)}") from None
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{where}: importing {module} failed: {what}") from error
    if found is MISSING:
        callables = (name for name, value in vars(holder).items() if callable(value))
        raise ConfigError(f"{where}: {module} has no {path!r}{nearest(attribute, callables)}")
    if not callable(found):
        raise ConfigError(f"{where} is {type(found).__name__}, and cannot be called")
    return found


def advice(module: str) -> str:
    """What to do about a module that Python does not find."""
    file = Path(f"{module.replace('.', '/')}.py")
    if file.exists():
        return f"{file} is in the working directory, which is not searched: set PYTHONPATH=."
    return "install its package, or set PYTHONPATH to its folder"
