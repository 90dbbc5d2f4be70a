"""Training beside torch: the same weights, batches and AdamW in float32, step by step in turns.

The peer is `transformers`' model in a plain loop in its own process (`transformers_peer.py`),
eager or compiled, whichever is faster here. The losses of all steps are compared: they must stay
together, else the steps would not be of the same work.
"""

import dataclasses
import resource
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

from ffnlab.bench.peer import Peer
from ffnlab.bench.versus import embedded_model
from ffnlab.data import TextBatches, stdlib_text
from ffnlab.errors import FFNLabError, at_least
from ffnlab.formats import load
from ffnlab.learning import backprop
from ffnlab.progress import track

__all__ = ["Comparison", "Settings", "compare", "ratio"]

RATE, DECAY = 1e-4, 0.01
LOSS_TOLERANCE = 1e-2  # relative, of every step


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      batch: rows of a batch.
      length: predictions in a row.
      turns: steps that both sides take, after one that compiles.
    """

    batch: int = 8
    length: int = 256
    turns: int = 15

    def __post_init__(self) -> None:
        at_least(1, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both sides of the same steps.

    Attributes:
      tokens: predicted in a step.
      ours, theirs: median seconds of a step.
      ratio: how many times faster ours is; median over steps.
      peaks: largest resident set of our and of the peer's process, bytes.
      difference: largest relative difference of the losses of a step.
      form: in which the peer did it, and versions.
    """

    tokens: int
    ours: float
    theirs: float
    ratio: float
    peaks: tuple[float, float]
    difference: float
    form: str

    def __rich__(self) -> Table:
        caption = f"losses differ by {self.difference:.1e} at most; peer: {self.form}; float32 both"
        table = Table(title="training beside torch", caption=caption)
        for name in ("", "ms a step", "tokens/s", "peak memory, MiB"):
            table.add_column(name, justify="right" if name else "left")
        for name, seconds, peak in zip(
            ("ffnlab", "peer"), (self.ours, self.theirs), self.peaks, strict=True
        ):
            figures = (
                f"{1e3 * seconds:.1f}",
                f"{self.tokens / seconds:,.0f}",
                f"{peak / 2**20:,.0f}",
            )
            table.add_row(name, *figures)
        table.add_row("ratio", f"{self.ratio:.2f}", "", "")
        return table


def compare(
    directory: Path, settings: Settings = Settings(), *, progress: bool = False
) -> Comparison:
    """Measures both sides on the training text of the standard library.

    Args:
      directory: a model that `transformers` loads without ffnlab's extras; its ids may be fewer
        than 256, then they are drawn at random.
      settings: sizes and turns.
      progress: show a bar.
    Raises:
      MissingExtraError: torch or transformers is nowhere to be found.
      FFNLabError: the two sides do not compute the same.
    """
    model = load(directory, extras=False)
    batches = TextBatches(tokens_for(model.config.vocab), settings.batch, settings.length)
    rule = backprop(optimizer=optax.adamw(RATE, weight_decay=DECAY))
    state = rule.init(model, jax.random.key(0))
    rows = []
    with Peer(directory) as peer:
        for position in track(range(settings.turns + 1), "bench", enabled=progress):
            batch = batches(position)
            start = time.perf_counter()
            state, metrics = rule.step(state, jnp.asarray(batch))
            loss = float(jax.block_until_ready(metrics)["loss"])
            seconds = time.perf_counter() - start
            answer = peer.ask("train", rows=batch.tolist(), rate=RATE, decay=DECAY)
            rows.append((seconds, answer["seconds"], abs(loss / answer["loss"] - 1)))
        versions = ", ".join(f"{k} {v}" for k, v in peer.about["versions"].items())
    difference = max(row[2] for row in rows)
    if not difference <= LOSS_TOLERANCE:
        raise FFNLabError(f"the two sides do not compute the same: losses differ by {difference}")
    ours, theirs, _ = zip(*rows[1:], strict=True)
    return Comparison(
        tokens=settings.batch * settings.length,
        ours=statistics.median(ours),
        theirs=statistics.median(theirs),
        ratio=statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
        peaks=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0, float(answer["peak"])),
        difference=difference,
        form=f"{answer['form']}; {versions}",
    )


def tokens_for(vocab: int) -> np.ndarray | bytes:
    """Text for a model of at least 256 ids, random ids for a smaller one."""
    if vocab >= 256:
        return stdlib_text().train
    return np.random.default_rng(0).integers(1, vocab, 1 << 16)


def ratio() -> float:
    """How many times faster our training step is on the embedded model."""
    with embedded_model() as directory:
        return compare(directory).ratio
