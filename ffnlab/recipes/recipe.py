"""The recipe: calibration and evaluation settings, and the stages, parsed and checked.

    [calibration]            # of every stage; a stage may override it in [stage.calibration]
    tokens = 16384           # of training text, in evenly spaced windows
    window = 256             # tokens in one sample
    batch = 8                # samples in one forward pass
    samples = 256            # of labelled data, instead of tokens and window; 0: all

    [evaluation]
    tokens = 65536           # of held-out text, in evenly spaced windows; 0: all of it
    window = 512
    batch = 8

    [[stage]]
    transform = "finercut"   # a name that `ffnlab compress --keys` lists, or "module:factory"
    remove = 4               # its options, as its docstring says

Every problem of a file is reported at once, before anything is computed.
"""

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TypeVar

from ffnlab.errors import ConfigError
from ffnlab.options import Option, checked, nearest
from ffnlab.recipes.table import METHODS, options_of
from ffnlab.storage.files import StrPath
from ffnlab.storage.structure import jsonable, later, told
from ffnlab.transform import Transform

__all__ = ["Calibration", "Evaluation", "Recipe", "Stage", "default", "parse_recipe", "read_recipe"]

SIZE_LIMIT = 1 << 20  # bytes; a recipe is written by hand
DEFAULTS = {"decoder": "default.toml", "encoder": "encoder.toml"}  # by kind of model
S = TypeVar("S", "Calibration", "Evaluation")


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a stage calibrates on.

    Attributes:
      tokens: tokens of training text, in evenly spaced windows; rounded down to whole batches.
      window: tokens in one sample, >= 2.
      batch: samples in one forward pass, >= 1.
      samples: of labelled data, for which tokens and window mean nothing; 0: all.
    """

    tokens: int = 16384
    window: int = 256
    batch: int = 8
    samples: int = later(0)

    def __post_init__(self) -> None:
        least_of(self, tokens=1, window=2, batch=1, samples=0)
        if self.tokens < self.window * self.batch:
            raise ConfigError(
                f"tokens = {self.tokens} is less than one batch of {self.batch} windows of "
                f"{self.window} tokens"
            )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is scored.

    Attributes:
      tokens: tokens of held-out text, in evenly spaced windows; 0: all of the text.
      window: tokens in one sample, >= 2; the first of each is context only.
      batch: samples in one forward pass, >= 1.
      samples: of labelled data, for which tokens and window mean nothing; 0: all.
    """

    tokens: int = 65536
    window: int = 512
    batch: int = 8
    samples: int = later(0)

    def __post_init__(self) -> None:
        least_of(self, tokens=0, window=2, batch=1, samples=0)
        if 0 < self.tokens < self.window:
            raise ConfigError(f"tokens = {self.tokens} is less than one window of {self.window}")


def least_of(settings: object, **least: int) -> None:
    """Raises ConfigError unless each named field is at least its bound."""
    bad = [
        f"{k} = {getattr(settings, k)} (>= {v})"
        for k, v in least.items()
        if getattr(settings, k) < v
    ]
    if bad:
        raise ConfigError(f"out of range: {', '.join(bad)}")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One transform with its options.

    Attributes:
      transform: a name in `TRANSFORMS`, one that a package registers, or "module:factory".
      options: those given; the factory's defaults stand for the rest.
      calibration: what it calibrates on.
    """

    transform: str
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    calibration: Calibration = Calibration()

    def build(self) -> Transform:
        """The transform itself.

        Raises:
          ConfigError: unknown transform, or no transform comes of its factory.
          ValueError: an option out of range.
        """
        return METHODS.make(self.transform, **self.options)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole recipe.

    Attributes:
      stages: in the order of application, at least one.
      evaluation: what is scored after each.
      source: file name, for messages.
    """

    stages: tuple[Stage, ...]
    evaluation: Evaluation = Evaluation()
    source: str = "recipe"

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("a recipe needs at least one [[stage]]")

    def as_json(self) -> dict[str, object]:
        """Everything that decides the result, defaults filled in."""
        stages = []
        for stage in self.stages:
            options = {o.name: o.default for o in options_of(stage.transform).values()}
            options |= stage.options
            stages.append(
                {
                    "transform": stage.transform,
                    "options": {name: jsonable(value) for name, value in options.items()},
                    "calibration": settings_of(stage.calibration),
                }
            )
        return {"stages": stages, "evaluation": settings_of(self.evaluation)}

    def digest(self) -> str:
        """SHA-256 of `as_json`: equal for two files that ask for the same."""
        text = json.dumps(self.as_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def settings_of(settings: Calibration | Evaluation) -> dict[str, object]:
    """Settings as JSON; what older recipes know nothing of only where it is not the default."""
    return {field.name: getattr(settings, field.name) for field in told(settings)}


def default(kind: str = "decoder") -> Recipe:
    """The recipe that `ffnlab compress` uses without `--recipe`.

    Args:
      kind: of the model, "decoder" or "encoder".
    Raises:
      ConfigError: a kind that has none.
    """
    if kind not in DEFAULTS:
        raise ConfigError(
            f"there is no default recipe for a model of kind {kind!r}, only for "
            f"{' and '.join(map(repr, DEFAULTS))}: give a recipe"
        )
    text = (resources.files("ffnlab.recipes") / DEFAULTS[kind]).read_text(encoding="utf-8")
    return parse_recipe(text, source=DEFAULTS[kind])


def read_recipe(path: StrPath) -> Recipe:
    """Reads and checks a recipe file.

    Args:
      path: a TOML file of at most 1 MiB.
    Raises:
      ConfigError: not TOML, or anything in it is unknown or out of range; every problem is listed.
      OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(SIZE_LIMIT + 1)
    if len(content) > SIZE_LIMIT:
        raise ConfigError(f"{path}: more than {SIZE_LIMIT} bytes; that is no recipe")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from None
    return parse_recipe(text, source=Path(path).name)


def parse_recipe(text: str, *, source: str = "recipe") -> Recipe:
    """Parses and checks a recipe.

    Args:
      text: TOML, as the module docstring shows.
      source: its name, for messages.
    Raises:
      ConfigError: see `read_recipe`.

    >>> recipe = parse_recipe('[[stage]]\\ntransform = "finercut"\\nremove = 2')
    >>> recipe.stages[0].transform, dict(recipe.stages[0].options)
    ('finercut', {'remove': 2})
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: not valid TOML: nested too deeply") from None
    problems: list[str] = []
    known = ("calibration", "evaluation", "stage")
    problems += [
        f"unknown entry {name!r}{nearest(name, known)}; there are: {', '.join(known)}"
        for name in tables
        if name not in known
    ]
    calibration = settings(tables.get("calibration", {}), Calibration(), "[calibration]", problems)
    evaluation = settings(tables.get("evaluation", {}), Evaluation(), "[evaluation]", problems)
    entries = tables.get("stage", [])
    if (
        not isinstance(entries, list)
        or not entries
        or not all(isinstance(e, dict) for e in entries)
    ):
        problems.append('no stage: write at least one [[stage]] with transform = "NAME"')
        entries = []
    stages = [parse_stage(i, entry, calibration, problems) for i, entry in enumerate(entries, 1)]
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError(f"{source}: {count}\n" + "\n".join(f"  - {p}" for p in problems))
    return Recipe(tuple(s for s in stages if s is not None), evaluation, source)


def settings(table: object, base: S, where: str, problems: list[str]) -> S:
    """`base` with the entries of a table; problems are appended to the list."""
    if not isinstance(table, dict):
        problems.append(f"{where}: must be a table")
        return base
    known = {f.name: Option(f.name, int, getattr(base, f.name)) for f in dataclasses.fields(base)}
    given = checked(table, known, where, problems)
    try:
        return dataclasses.replace(base, **given)
    except ConfigError as error:
        problems.append(f"{where}: {error}")
        return base


def parse_stage(
    number: int, entry: dict[str, object], calibration: Calibration, problems: list[str]
) -> Stage | None:
    """One [[stage]]; problems are appended to the list, and then there is no stage."""
    rest = dict(entry)
    name = rest.pop("transform", None)
    where = f"stage {number}"
    before = len(problems)
    if not isinstance(name, str):
        there = f"there are: {', '.join(METHODS.names())}"
        problems.append(f'{where}: needs transform = "NAME"; {there}')
        return None
    named = f"{where} ({name})"
    if "calibration" in rest:
        inner = f"{named} [stage.calibration]"
        calibration = settings(rest.pop("calibration"), calibration, inner, problems)
    try:
        given = METHODS.look_over(name, rest, named, problems)
    except ConfigError as error:
        problems.append(f"{where}: {error}")
        return None
    stage = Stage(name, given, calibration)
    if len(problems) == before:
        try:
            stage.build()
        except ValueError as error:
            problems.append(f"{named}: {error}")
    return stage
