"""What a probe says: rows, figures and a picture, which print, show and write themselves.

A report is a frozen dataclass of what was found, with three methods of its own; the rest is given:

    @dataclasses.dataclass(frozen=True)
    class Zeros(Report):
        share: Mapping[str, float]

        def rows(self):
            return [{"layer": name, "zeros": share} for name, share in self.share.items()]

        def figures(self):
            return {f"zeros/{name}": share for name, share in self.share.items()}

        def draw(self, figure):
            figure.subplots().bar(list(self.share), list(self.share.values()))

Tables, JSON and pictures of studies are made by the same functions.
"""

import abc
import base64
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ffnlab.errors import ConfigError, MissingExtraError, require
from ffnlab.storage.files import StrPath, atomic_dir, open_regular, write_json

__all__ = ["Report", "Rows", "Series", "as_png", "json_rows", "plain", "printed"]

UNBOUNDED = 10_000  # columns, more than any table needs
LINES = 10  # of one picture that a legend names
FILES = frozenset({"report.json", "report.png"})  # of a report that was written


@dataclasses.dataclass(frozen=True)
class Report(abc.ABC):
    """Something that was found out, as rows, as figures and as a picture."""

    @abc.abstractmethod
    def rows(self) -> Sequence[Mapping[str, object]]:
        """The table: each row maps a column to a JSON value, and may lack columns."""

    @abc.abstractmethod
    def figures(self) -> Mapping[str, float]:
        """Numbers by name, as a training log takes them; what belongs together is "group/name"."""

    @abc.abstractmethod
    def draw(self, figure: Any) -> None:
        """Draws on an empty `matplotlib.figure.Figure`; it may resize it."""

    def as_json(self) -> dict[str, object]:
        """Kind, rows and figures as JSON values; numbers that are not finite become null.

        What is written and read again is equal to it.

        Raises:
          ConfigError: a row holds what JSON has no form for.
        """
        figures = {name: float(value) for name, value in self.figures().items()}
        return {
            "report": type(self).__name__,
            "rows": plain(list(self.rows()), "rows"),
            "figures": plain(figures, "figures"),
        }

    def write(self, out: StrPath, *, about: Mapping[str, object] | None = None) -> None:
        """Writes `report.json` and `report.png` to a folder of their own, both or neither.

        Args:
          out: the folder; made if missing, and replaced where it holds an earlier report.
          about: what it is a report of, JSON values by name; kept beside rows and figures.
        Raises:
          ConfigError: the folder holds other files, or a value is none of JSON's.
        """
        folder = Path(out)
        others = {path.name for path in folder.iterdir()} - FILES if folder.is_dir() else set()
        if others:
            raise ConfigError(
                f"out={str(out)!r} holds {sorted(others)[:3]}; a report takes a folder of its own"
            )
        told = {} if about is None else {"about": plain(about, "about")}
        content, png = told | self.as_json(), as_png(self.draw)
        with atomic_dir(folder) as new:
            (new / "report.png").write_bytes(png)
            write_json(new / "report.json", content)

    def __rich__(self) -> Group:
        figures = [{"figure": name, "value": v} for name, v in self.figures().items()]
        return Group(*(Rows(rows) for rows in (self.rows(), figures) if rows))

    def __str__(self) -> str:
        return printed(self)

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        """How a notebook shows it: the tables, and the picture where matplotlib is installed."""
        console = Console(file=StringIO(), record=True, width=120, force_jupyter=False)
        console.print(self)
        shown = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
        try:
            png = base64.b64encode(as_png(self.draw)).decode()
            shown += f'<img src="data:image/png;base64,{png}">'
        except MissingExtraError:
            pass
        return {"text/plain": str(self), "text/html": shown}


@dataclasses.dataclass(frozen=True)
class Series(Report):
    """Figures over the steps of a run: `Series(outcome.evaluations)`.

    Attributes:
      evaluations: position -> figures by name; a position may lack some.

    >>> Series({0: {"loss": 2.0}, 10: {"loss": 1.5}}).figures()
    {'loss': 1.5}
    """

    evaluations: Mapping[int, Mapping[str, float]]

    def __post_init__(self) -> None:
        if not self.names:
            raise ConfigError("evaluations hold no figure; a series needs one at least")

    @classmethod
    def read(cls, run: StrPath, *names: str) -> "Series":
        """The figures that a run wrote, earlier parts of a resumed one included.

        Args:
          run: its folder, or the `metrics.jsonl` in it.
          names: figures wanted; all but the time when none is named.
        Raises:
          ConfigError: there are none, or a name that is in no row.
          FileNotFoundError: there is no such file.
        """
        path = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
        found: dict[int, dict[str, float]] = {}
        for row in json_rows(path):
            kept = {k: float(v) for k, v in row.items() if isinstance(v, int | float)}
            found[int(kept["step"])] = {
                k: v for k, v in kept.items() if k not in ("step", "seconds") or k in names
            }
        known = {name for figures in found.values() for name in figures}
        if unknown := set(names) - known:
            raise ConfigError(f"{path} has no figure {min(unknown)!r}; it has {sorted(known)}")
        if names:
            found = {
                at: {k: v for k, v in each.items() if k in names} for at, each in found.items()
            }
        return cls({at: figures for at, figures in found.items() if figures})

    @property
    def names(self) -> list[str]:
        """The figures, in order of first appearance."""
        return list(dict.fromkeys(name for _, found in self.steps for name in found))

    @property
    def steps(self) -> list[tuple[int, Mapping[str, float]]]:
        """Positions with their figures, in order."""
        return sorted(self.evaluations.items())

    def rows(self) -> list[dict[str, object]]:
        """A row for each position."""
        return [{"step": at, **found} for at, found in self.steps]

    def figures(self) -> dict[str, float]:
        """The last value of each figure."""
        return {
            name: found[name] for name in self.names for _, found in self.steps if name in found
        }

    def draw(self, figure: Any) -> None:
        """Lines over steps: one picture for each group of figures."""
        groups: dict[str, list[str]] = {}
        for name in self.names:
            groups.setdefault(name.partition("/")[0], []).append(name)
        figure.set_size_inches(8, 1 + 3 * len(groups))
        for axes, (group, names) in zip(
            figure.subplots(len(groups), squeeze=False)[:, 0], groups.items(), strict=True
        ):
            for name in names:
                points = [(at, found[name]) for at, found in self.steps if name in found]
                axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=name)
            axes.set_xlabel("steps")
            axes.set_ylabel(group)
            axes.spines[["top", "right"]].set_visible(False)
            if 1 < len(names) <= LINES:
                axes.legend(frameon=False, fontsize=8)


def json_rows(path: StrPath) -> Iterator[dict[str, Any]]:
    """The rows of a `metrics.jsonl`: objects with an integer "step", a line each.

    Lines that are none, such as one that was cut off when a run was killed, are left out.

    Raises:
      FormatError: it is no regular file.
      FileNotFoundError: there is none.
    """
    with open_regular(path) as file:
        for line in file:
            try:
                row = json.loads(line.decode(errors="replace"))
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


class Rows:
    """Measurements that print as one table, or as several where one would break words.

    Columns are all keys, in order of first appearance; the first stands in each of several tables.

    Attributes:
      rows: the measurements.
    """

    def __init__(self, rows: Sequence[Mapping[str, object]]):
        self.rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        names = list(dict.fromkeys(key for row in self.rows for key in row))
        while names:
            shown = self.fitting(names, console, options)
            yield self.table(shown)
            names = [*names[:1], *names[len(shown) :]] if len(shown) < len(names) else []

    def fitting(self, names: list[str], console: Console, options: ConsoleOptions) -> list[str]:
        """As many of the first columns as there is room for, two at least."""
        unbounded = options.update(width=UNBOUNDED)
        for count in range(len(names), 2, -1):
            least = Measurement.get(console, unbounded, self.table(names[:count])).minimum
            if least <= options.max_width:
                return names[:count]
        return names[:2]

    def table(self, names: Sequence[str]) -> Table:
        """Some columns as a rich table."""
        table = Table()
        for name in names:
            found = [row.get(name, 0) for row in self.rows]
            is_number = all(isinstance(value, int | float | np.generic) for value in found)
            justify = "right" if is_number else "left"
            table.add_column(Text(name), justify=justify, overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(cell(row.get(name, ""))) for name in names))
        return table


def cell(value: object) -> str:
    """A measurement as people read it: four significant digits for floats.

    >>> cell(0.123456)
    '0.1235'
    """
    if isinstance(value, float | np.floating):
        return f"{float(value):.4g}"
    return str(value)


def printed(renderable: RenderableType) -> str:
    """What rich draws, as plain text of 120 columns."""
    console = Console(width=120, color_system=None, force_terminal=False, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().rstrip()


def plain(value: object, where: str) -> object:
    """`value` as JSON takes it: array scalars become numbers, arrays lists, NaN and inf null.

    Args:
      value: null, bool, number, string, array, list, tuple, or mapping with string keys, nested.
      where: its name, for the error message.
    Raises:
      ConfigError: anything else.

    >>> plain({"loss": np.float32(1.5), "bad": float("nan")}, "table")
    {'loss': 1.5, 'bad': None}
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        odd = [key for key in value if not isinstance(key, str)]
        if odd:
            raise ConfigError(f"{where}: key {odd[0]!r} is not a string; JSON takes strings only")
        return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist(), where)
    raise ConfigError(
        f"{where}: a {type(value).__name__} is no JSON value; use numbers, strings, lists, mappings"
    )


def as_png(draw: Callable[..., object], dpi: int = 120) -> bytes:
    """Runs `draw(figure)` on a fresh 8 x 5 inch figure, without a display."""
    figure = require("matplotlib.figure", extra="run").Figure(figsize=(8, 5), layout="constrained")
    draw(figure)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
