"""Steps of reversible columns: memory and time, by what is kept for the backward pass.

    plain          everything, as autodiff keeps it
    checkpointed   what goes from column to column; columns are computed again
    local          the same, but what a column reads is rebuilt from what it gave (save_every = 1)
    rebuilt        what the last column gave, all others rebuilt (save_every = columns)

Columns of alpha 1, whose gradients rounding leaves as they are. Bytes are those that a compiled
gradient keeps besides arguments and results, as the compiler plans them; nothing is run for them.
Times are of the most columns, in turns.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
from rich.table import Table

from ffnlab.bench.sparse import timed
from ffnlab.errors import ConfigError, at_least
from ffnlab.learning import labelled
from ffnlab.models import RevCol, RevColConfig, stack
from ffnlab.progress import track
from ffnlab.structure.revcol import saving

__all__ = ["FORMS", "Comparison", "Settings", "compare", "draw", "memory", "ratios"]

FORMS = ("plain", "checkpointed", "local", "rebuilt")
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      columns: numbers of them, rising.
      images: of a step.
      side: pixels of an image, along a side, a multiple of 8.
      widths, blocks: of the levels, two.
      turns: times that every form runs, after one to warm up; 0 for memory alone.
      forms: of `FORMS`; "plain" among them.
    """

    columns: tuple[int, ...] = (4, 8, 16, 32)
    images: int = 8
    side: int = 32
    widths: tuple[int, ...] = (16, 32)
    blocks: tuple[int, ...] = (1, 1)
    turns: int = 9
    forms: tuple[str, ...] = FORMS

    def __post_init__(self) -> None:
        at_least(0, turns=self.turns)
        at_least(1, images=self.images)
        at_least(2, columns=min(self.columns, default=0))
        if sorted(set(self.columns)) != list(self.columns):
            raise ConfigError(f"columns={list(self.columns)} must rise")
        if "plain" not in self.forms or not set(self.forms) <= set(FORMS):
            raise ConfigError(f"forms={list(self.forms)}: some of {FORMS}, 'plain' among them")
        self.config(self.columns[-1])

    def config(self, columns: int) -> RevColConfig:
        """Of so many columns."""
        return RevColConfig(
            (self.side, self.side),
            self.widths,
            self.blocks,
            columns,
            CLASSES,
            channels=1,
            alpha=1.0,
        )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Memory and times of all forms.

    Attributes:
      temporary: bytes by form and number of columns.
      seconds: of a step of the most columns by form, median; empty where nothing was timed.
      ratios: of those over "plain", median over turns.
      about: what they are of; one line.
    """

    temporary: Mapping[str, Mapping[int, int]]
    seconds: Mapping[str, float]
    ratios: Mapping[str, float]
    about: str

    def growth(self, form: str) -> float:
        """Bytes of the most columns over those of the fewest."""
        each = self.temporary[form]
        return each[max(each)] / each[min(each)]

    def rows(self) -> list[dict[str, object]]:
        """Bytes by form and number of columns, for a study's table."""
        return [
            {"kept": form, "columns": n, "MiB": nbytes / 2**20}
            for form, each in self.temporary.items()
            for n, nbytes in each.items()
        ]

    def __rich__(self) -> Table:
        counts = list(self.temporary["plain"])
        names = ("kept", *(f"MiB of {n}" for n in counts), "growth", "step ms", "/ plain")
        table = Table(*names, title="reversible columns", caption=self.about)
        for form, each in self.temporary.items():
            cells = [f"{each[n] / 2**20:.2f}" for n in counts] + [f"{self.growth(form):.2f}"]
            if self.seconds:
                cells += [f"{1e3 * self.seconds[form]:.1f}", f"{self.ratios[form]:.2f}"]
            table.add_row(form, *cells)
        return table


def compare(settings: Settings = Settings(), *, progress: bool = False) -> Comparison:
    """Measures all forms.

    Args:
      settings: sizes and turns.
      progress: show a bar.
    """
    s, temporary, programs = settings, {}, {}
    for form in track(s.forms, "bench", enabled=progress):
        made = {n: compiled(s, n, form) for n in s.columns}
        temporary[form] = {
            n: program.memory_analysis().temp_size_in_bytes for n, program in made.items()
        }
        programs[form] = made[s.columns[-1]]
    seconds, found = times(s, programs) if s.turns else ({}, {})
    about = (
        f"float32, jax {jax.__version__}, {jax.devices()[0].platform}; {s.images} images of "
        f"{s.side} x {s.side}, {list(s.widths)} channels"
    )
    return Comparison(temporary, seconds, found, about)


def of_form(model: RevCol, form: str) -> RevCol:
    """The model that keeps what a form says."""
    kept = {"local": 1, "rebuilt": model.config.columns}.get(form, 0)
    return saving(model, kept, remat="nothing" if form == "checkpointed" else None)


def gradient(model: RevCol, batch: PyTree) -> PyTree:
    """Of the cross-entropy, for all parameters."""
    return jax.grad(lambda model: labelled(model, batch)[0])(model)


def drawn(settings: Settings, columns: int) -> tuple[RevCol, tuple[Array, Array]]:
    """A model and a batch for it."""
    s, key = settings, jax.random.key(0)
    images = jax.random.uniform(key, (s.images, s.side, s.side, 1))
    model = stack(RevCol(s.config(columns), key=key))
    return model, (images, jnp.arange(s.images) % CLASSES)


def compiled(settings: Settings, columns: int, form: str) -> Any:
    """The gradient's program; nothing is drawn for it."""
    model, batch = jax.eval_shape(lambda: drawn(settings, columns))
    return jax.jit(gradient).lower(of_form(model, form), batch).compile()


def times(
    settings: Settings, programs: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, float]]:
    """(median seconds, median ratio to "plain") of programs of the most columns, in turns."""
    model, batch = drawn(settings, settings.columns[-1])
    ready: dict[str, Callable[[], Any]] = {}
    for form, program in programs.items():
        given = of_form(model, form)
        ready[form] = lambda program=program, given=given: program(given, batch)
        jax.block_until_ready(ready[form]())
    found = [{form: timed(call) for form, call in ready.items()} for _ in range(settings.turns)]
    medians = {form: statistics.median(turn[form] for turn in found) for form in ready}
    over = {form: statistics.median(turn[form] / turn["plain"] for turn in found) for form in ready}
    return medians, over


def draw(figure: Any, found: Comparison) -> None:
    """Memory by the number of columns, and the time of a step."""
    left, *right = figure.subplots(1, 2 if found.seconds else 1, squeeze=False)[0]
    for form, each in found.temporary.items():
        left.plot(list(each), [n / 2**20 for n in each.values()], "o-", label=form)
    left.set_xscale("log", base=2)
    left.set_ylim(bottom=0)
    left.set_xticks(list(each), [str(n) for n in each])
    left.set_xlabel("columns")
    left.set_ylabel("MiB beside arguments and results")
    left.legend(frameon=False, fontsize=8)
    for axes in right:
        colors = [f"C{i}" for i in range(len(found.ratios))]
        bars = axes.bar(list(found.ratios), list(found.ratios.values()), color=colors)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
        axes.set_ylabel(f"time of a step of {max(each)} columns over plain")
        axes.tick_params(axis="x", labelsize=8)
    for axes in (left, *right):
        axes.spines[["top", "right"]].set_visible(False)


def memory() -> dict[str, float]:
    """Bytes of 32 columns over those of 4, by form; and "saved", plain over rebuilt of 32."""
    found = compare(Settings(columns=(4, 32), turns=0))
    saved = found.temporary["plain"][32] / found.temporary["rebuilt"][32]
    return {form: found.growth(form) for form in FORMS} | {"saved": saved}


def ratios() -> dict[str, float]:
    """Time of a step of 16 columns over the plain one's, by form."""
    return dict(compare(Settings(columns=(16,))).ratios)
