"""What a study returns: the claims it tested, what it measured, and pictures of it.

A study is `run(*, out=None, quick=False, seed=0) -> Result`, and ends with

    return Result(...).write(out)

so that one call serves a notebook (`out=None` writes nothing) and `ffnlab run SLUG --out DIR`.
A `Result` prints as two tables (`print(result)`, in colour through `rich.print`) and writes
`result.json` and one PNG per picture; every file appears whole or not at all. `result.json` is
sealed: what was changed by hand is no result.
"""

import dataclasses
import importlib.metadata
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

import ffnlab
from ffnlab.errors import ConfigError, at_least
from ffnlab.report import Rows, as_png, plain, printed
from ffnlab.storage.files import StrPath, atomic_write, sealed, write_json

__all__ = ["PICTURE_LIMIT", "Claim", "Result", "versions"]

PICTURE_LIMIT = 60_000  # bytes of a PNG, which is kept in the repository
RESOLUTIONS = (120, 100, 80, 60, 50, 40)  # dots per inch, tried until a picture is within the limit

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
SPREAD = re.compile(r"±|\d to [-+]?[.\d]")


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim of a paper beside what was measured here.

    Attributes:
      claim: what is claimed, as one sentence.
      paper: the paper's figure with its setting, or "-" where it gives none.
      ours: our figure with its unit.
      holds: whether our figure bears the claim out.
      evidence: how `holds` was decided, so that a reader can repeat it: the rule and what it was
        applied to.
      seeds: how many seeds it was decided over; 0 where nothing is drawn. Of several, `ours` gives
        mean and spread: "0.98 ± 0.01" or "0.98 (0.97 to 0.99)".
      timed: whether it rests on times measured, which another machine or a busy one may change.

    >>> claim = Claim("attention goes first", "mostly", "4 of 6 units", True, "order", seeds=1)
    >>> claim.holds, claim.basis
    (True, 'one seed')
    """

    claim: str
    paper: str
    ours: str
    holds: bool
    evidence: str
    seeds: int
    timed: bool = False

    def __post_init__(self):
        for field in ("claim", "paper", "ours", "evidence"):
            text = getattr(self, field)
            if not isinstance(text, str) or not text:
                raise ConfigError(f"{field}={text!r} of a Claim; it takes a non-empty string")
        if not isinstance(self.holds, bool | np.bool_):
            raise ConfigError(f"holds={self.holds!r} of a Claim; it takes True or False")
        object.__setattr__(self, "holds", bool(self.holds))
        at_least(0, seeds=self.seeds)
        if self.seeds > 1 and not SPREAD.search(self.ours):
            raise ConfigError(
                f"ours={self.ours!r} of a Claim over {self.seeds} seeds; it takes mean and spread: "
                "'0.98 ± 0.01' or '0.98 (0.97 to 0.99)'"
            )

    @property
    def basis(self) -> str:
        """How many draws it rests on, and whether on times: "one seed, timed"."""
        seeds = {0: "nothing drawn", 1: "one seed"}.get(self.seeds, f"{self.seeds} seeds")
        return f"{seeds}, timed" if self.timed else seeds


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a study's figures; "-" if missing.

    >>> versions()["ffnlab"] == ffnlab.__version__
    True
    """
    found = {"python": platform.python_version(), "ffnlab": ffnlab.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    return found


@dataclasses.dataclass(frozen=True)
class Result:
    """Everything a study has to say.

    Attributes:
      slug: the study's name, as in `ffnlab list`.
      title: one line.
      settings: what was run: sizes, options, which model and text; JSON values.
      seed: the seed that the draw came from.
      quick: whether it was the quick form.
      seconds: wall-clock time of the study.
      claims: the claims tested, at least one, each of its own wording.
      table: the measurements as rows; each maps a column to a JSON value, and may lack columns.
      pictures: file stem -> function that draws on an empty `matplotlib.figure.Figure` (it may
        resize it); called by `write` only.
      versions: of the interpreter and the packages that decide the figures.
      sources: module -> digest of the code that the figures come from, as `ffnlab run` fills in.

    >>> claim = Claim("2 + 2 = 4", "4", "4", True, "integer arithmetic", seeds=0)
    >>> result = Result(
    ...     slug="demo",
    ...     title="A demo",
    ...     settings={},
    ...     seed=0,
    ...     quick=True,
    ...     seconds=0.1,
    ...     claims=[claim],
    ... )
    >>> result.status
    '1 of 1 claims hold'
    """

    slug: str
    title: str
    settings: Mapping[str, object]
    seed: int
    quick: bool
    seconds: float
    claims: Sequence[Claim]
    table: Sequence[Mapping[str, object]] = ()
    pictures: Mapping[str, Callable[..., object]] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=versions)
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        names = [("slug", self.slug), *(("pictures", stem) for stem in self.pictures)]
        for field, name in names:
            if not PLAIN_NAME.fullmatch(name):
                raise ConfigError(
                    f"{field}={name!r} names a file; use lower-case letters, digits, - and _"
                )
        if not self.claims:
            raise ConfigError(f"claims=[] of study {self.slug!r}; a study tests at least one claim")
        worded = [claim.claim for claim in self.claims]
        twice = next((words for words in worded if worded.count(words) > 1), None)
        if twice:
            raise ConfigError(f"claims of study {self.slug!r}: {twice!r} is there twice")
        plain(self.settings, "settings")
        plain(self.table, "table")

    @property
    def status(self) -> str:
        """`'m of n claims hold'`."""
        return f"{sum(c.holds for c in self.claims)} of {len(self.claims)} claims hold"

    def as_json(self) -> dict[str, object]:
        """The content of `result.json`; numbers that are not finite become null."""
        return {
            "slug": self.slug,
            "title": self.title,
            "settings": plain(self.settings, "settings"),
            "seed": int(self.seed),
            "quick": bool(self.quick),
            "versions": dict(self.versions),
            "sources": dict(self.sources),
            "seconds": round(float(self.seconds), 3),
            "claims": [dataclasses.asdict(claim) for claim in self.claims],
            "table": plain(self.table, "table"),
            "pictures": [f"{stem}.png" for stem in self.pictures],
        }

    def write(self, out: StrPath | None) -> "Result":
        """Writes the pictures, then `result.json`, to the folder `out`; `None` writes nothing.

        Args:
          out: a folder; it is made if missing, and files of an earlier run are replaced.
        Returns:
          the result itself, so that a study can end with `return Result(...).write(out)`.
        Raises:
          ConfigError: a picture is larger than `PICTURE_LIMIT` at any resolution.
        """
        if out is None:
            return self
        folder = Path(out)
        drawn = {stem: small_png(draw, stem) for stem, draw in self.pictures.items()}
        for stem, png in drawn.items():
            with atomic_write(folder / f"{stem}.png") as file:
                file.write(png)
        write_json(folder / "result.json", sealed(self.as_json()))
        return self

    def __rich__(self) -> Group:
        parts = [claims_table(self)]
        if self.table:
            parts.append(Rows(self.table))
        return Group(*parts)

    def __str__(self) -> str:
        return printed(self)


def small_png(draw: Callable[..., object], stem: str) -> bytes:
    """A picture at the highest resolution at which it is within the limit."""
    sizes = []
    for dpi in RESOLUTIONS:
        png = as_png(draw, dpi)
        if len(png) <= PICTURE_LIMIT:
            return png
        sizes.append(f"{len(png):,} at {dpi} dpi")
    raise ConfigError(
        f"picture {stem!r} has {', '.join(sizes)}; at most {PICTURE_LIMIT:,} bytes: draw less"
    )


def claims_table(result: Result) -> Table:
    """The claims as a rich table, what belongs to one below each other: 80 columns hold no five."""
    table = Table(
        title=Text(f"{result.slug}: {result.title}"),
        caption=Text(f"{result.status} · seed {result.seed} · {result.seconds:.1f} s"),
        show_lines=True,
    )
    table.add_column("holds")
    table.add_column("claim", overflow="fold")
    for c in result.claims:
        holds = Text("yes", "bold green") if c.holds else Text("no", "bold red")
        parts = Table.grid(padding=(0, 1))
        parts.add_column(no_wrap=True, style="dim")
        parts.add_column(overflow="fold")
        for name in ("paper", "ours", "evidence", "basis"):
            parts.add_row(name, Text(getattr(c, name)))
        table.add_row(holds, Group(Text(c.claim, "bold"), parts))
    return table
