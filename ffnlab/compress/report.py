"""The report of a job: what each stage cost and bought. It prints as a table; `report.json` is it.

The classes below are the schema of `report.json`: an object per class, a member per field, with the
types that the annotations say; tuples are arrays. Numbers are finite. `read_report` checks a file
against them.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import TypeVar

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ffnlab.errors import FormatError
from ffnlab.storage.files import StrPath, read_json, write_json

__all__ = ["FORMAT", "Export", "Report", "Rival", "Row", "Score", "Verdict", "read_report"]

FORMAT = "ffnlab compress report, version 4"
D = TypeVar("D")


@dataclasses.dataclass(frozen=True)
class Score:
    """A figure of quality.

    Attributes:
      name: its key in a row.
      title: as a heading has it.
      better: "less" or "more".
    """

    name: str
    title: str
    better: str


@dataclasses.dataclass(frozen=True)
class Row:
    """The model after a stage, or before the first one.

    Attributes:
      stage: "original", or the transform's name, with its number where it occurs twice.
      scores: on held-out data, by name: of text "perplexity", exp of the mean nats per counted
        token, and "bits_per_byte"; of labelled data "nats" and "accuracy"; of text for an encoder
        "bits_per_token" and "found" of hidden tokens, or "cosine" to the original's vectors.
      parameters: numbers that the model has, in whatever format.
      nbytes: stored bytes of all parameters, with scales and thresholds.
      cache_bytes: of keys and values, per token of context; 0 where there are none.
      flops: floating-point operations per item: of text per token at a context of one evaluation
        window, where channels that a sparse model skips are left out.
      speed: items per second; of text tokens, decoded greedily at batch 1.
      speed_original: the same of the original model, measured in turns with `speed`.
      seconds: calibration and rewriting.
    """

    stage: str
    scores: Mapping[str, float]
    parameters: int
    nbytes: int
    cache_bytes: int
    flops: float
    speed: float
    speed_original: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Export:
    """A model directory that was written, and what is in it.

    Attributes:
      folder: its name in the folder of the job.
      format: "dense", "compressed-tensors" or "ffnlab".
      nbytes: of all files but the record of what the model was trained on.
      files: SHA-256 by file name.
      score: the first score of the directory loaded again by ffnlab.
      score_elsewhere: of the directory as tools see it that ignore `ffnlab.json`.
      ignored: what those tools ignore or may stumble on, one sentence each.
    """

    folder: str
    format: str
    nbytes: int
    files: Mapping[str, str]
    score: float
    score_elsewhere: float
    ignored: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The compressed model beside its rival on one text.

    Attributes:
      text: what both were measured on.
      sha256: of that text.
      compressed: bits per byte of the compressed model.
      dense: those of the dense one.
      wins: whether the dense model's are fewer.
      note: when both were measured.
    """

    text: str
    sha256: str
    compressed: float
    dense: float
    wins: bool
    note: str


@dataclasses.dataclass(frozen=True)
class Rival:
    """A dense model trained on as many tokens as the original one, to be stored instead.

    Attributes:
      nbytes: stored bytes of its parameters.
      file_bytes: of the files that it is loaded from.
      verdicts: the held-out text of this report first.
      note: how it was made.
    """

    nbytes: int
    file_bytes: int
    verdicts: tuple[Verdict, ...]
    note: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything a job has to say.

    Attributes:
      format: `FORMAT`.
      model: source, sha256 and sizes of the original model.
      recipe: as it was applied, defaults filled in.
      data: source, of text the split rule, and SHA-256 and size of both parts.
      item: what costs and speeds are per, "token" or "image".
      scores: the figures of quality in the rows.
      axis: the one that pictures show.
      pace: what speeds are, "decode tok/s".
      measured_on: how much was scored: of text counted tokens, and windows they are in.
      rows: the original model, then each stage.
      exports: the directories that were written, at least one.
      rival: the dense model to compare with, where there is one.
      versions: of Python and the packages that decide the figures.
      device: what it ran on.
      seconds: by phase.
      peak_memory: of the process, bytes.
    """

    format: str
    model: Mapping[str, object]
    recipe: Mapping[str, object]
    data: Mapping[str, object]
    item: str
    scores: tuple[Score, ...]
    axis: str
    pace: str
    measured_on: Mapping[str, int]
    rows: tuple[Row, ...]
    exports: tuple[Export, ...]
    rival: Rival | None
    versions: Mapping[str, str]
    device: str
    seconds: Mapping[str, float]
    peak_memory: int

    def as_json(self) -> dict[str, object]:
        """The content of `report.json`."""
        return dataclasses.asdict(self)

    def write(self, path: StrPath) -> None:
        """Writes `report.json`, atomically."""
        write_json(path, self.as_json())

    def __rich__(self) -> Group:
        parts: list[object] = [table(self)]
        if self.rival is not None:
            parts.append(Text(versus(self.rival, self.exports[0])))
        parts += [Text(describe(export, self.scores[0].title)) for export in self.exports]
        parts.append(Text(timings(self.seconds, self.peak_memory)))
        return Group(*parts)

    def __str__(self) -> str:
        console = Console(
            width=100, color_system=None, force_terminal=False, markup=False, emoji=False
        )
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def table(report: Report) -> Table:
    """The rows, each figure above its ratio to the original's.

    Of speed only the ratio is comparable, as the original is measured anew beside each stage: it
    stands alone, and the first row has the one speed that the ratios are read with.
    """
    found = Table(
        title="held-out quality, size and speed after each stage",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    found.add_column("stage")
    first = report.rows[0]
    columns: dict[str, tuple[Callable[[Row], float | int], Callable[[float | int], str]]] = {
        score.title.replace(" per ", " /\n").replace(", ", ",\n"): (
            lambda row, name=score.name: row.scores[name],
            number,
        )
        for score in report.scores
    }
    columns["para-\nmeters"] = (lambda row: row.parameters, count)
    columns["bytes"] = (lambda row: row.nbytes, size)
    if any(row.cache_bytes for row in report.rows):
        columns[f"cache /\n{report.item}"] = (lambda row: row.cache_bytes, size)
    columns[f"FLOPs /\n{report.item}"] = (lambda row: row.flops, count)
    for name in (*columns, report.pace.replace(" ", "\n")):
        found.add_column(name, justify="right")
    for row in report.rows:
        cells = [show(value(row)) for value, show in columns.values()]
        cells.append(f"{row.speed:.0f}" if row is first else "")
        if row is not first:
            ratios = [ratio(value(row), value(first)) for value, _ in columns.values()]
            ratios.append(ratio(row.speed, row.speed_original))
            cells = [f"{c}\n{r}" for c, r in zip(cells, ratios, strict=True)]
        found.add_row(row.stage, *cells, end_section=True)
    return found


def ratio(value: float | int, base: float | int) -> str:
    """`x0.50`, to be read as a multiple of the original's figure."""
    return f"x{value / base:.3g}" if base else "-"


def number(value: float | int) -> str:
    """A score as people read it."""
    return f"{value:.3f}" if value < 1000 else f"{value:.3g}"


def count(value: float | int) -> str:
    """
    >>> count(1_624_320), count(940)
    ('1.62 M', '940')
    """
    return scaled(value, ("", " k", " M", " G", " T"))


def size(value: float | int) -> str:
    """
    >>> size(3_407_872), size(512)
    ('3.41 MB', '512 B')
    """
    return scaled(value, (" B", " kB", " MB", " GB", " TB"))


def scaled(value: float | int, units: tuple[str, ...]) -> str:
    """Three significant digits and a unit."""
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    digits = max(0, 3 - len(str(int(value)))) if power else 0
    return f"{value:.{digits}f}{units[power]}"


def versus(rival: Rival, export: Export) -> str:
    """The compressed model against the dense one, a line for every text."""
    files = f"{size(rival.file_bytes)} of files, the compressed model {size(export.nbytes)}"
    lines = [f"against a dense model ({files}; {rival.note}), in bits per byte:"]
    for v in rival.verdicts:
        winner = "the dense model" if v.wins else "the compressed model"
        figures = f"{v.compressed:.3f} compressed, {v.dense:.3f} dense: {winner} wins"
        lines.append(f"  - {v.text} ({v.note}): {figures}")
    return "\n".join(lines)


def describe(export: Export, title: str) -> str:
    """What was written, and what other tools make of it."""
    files = f"{size(export.nbytes)} in {len(export.files)} files"
    lines = [f"{export.folder}: {export.format}, {files}"]
    if export.ignored:
        lines.append(
            f"  other tools read it with {title} {number(export.score_elsewhere)}, not "
            f"{number(export.score)}; they ignore or may stumble on:"
        )
    return "\n".join([*lines, *(f"  - {sentence}" for sentence in export.ignored)])


def timings(seconds: Mapping[str, float], peak: int) -> str:
    """Seconds by phase, their sum and the peak of memory, in a line."""
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return f"{sum(seconds.values()):.0f} s ({parts}); peak memory {size(peak)}"


def read_report(path: StrPath) -> Report:
    """Reads and checks a `report.json`.

    Raises:
      FormatError: not such a file; the message has the place.
      FileNotFoundError: there is none.
    """
    found = read_json(path)
    report = build(Report, found, str(path))
    if report.format != FORMAT:
        raise FormatError(f"{path}: format is {report.format!r}, not {FORMAT!r}")
    return report


def build(kind: type[D], value: object, where: str) -> D:
    """A dataclass from JSON, every field checked against its annotation."""
    fields = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(value, dict) or value.keys() != fields:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise FormatError(f"{where}: an object with {sorted(fields)} is expected, not {found}")
    hints = typing.get_type_hints(kind)
    return kind(**{n: read(hints[n], v, f"{where}: {n}") for n, v in value.items()})


def read(hint: typing.Any, value: object, where: str) -> typing.Any:
    """One value of an annotated type from JSON."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else read(inner[0], value, where)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(read(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is not None and origin is not tuple and isinstance(value, dict):
        return {key: read(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is object or type(value) is hint:
        return value
    if hint is float and type(value) is int:
        return float(value)
    raise FormatError(
        f"{where}: {type(value).__name__} instead of {getattr(hint, '__name__', hint)}"
    )
