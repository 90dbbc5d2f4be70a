"""ffnlab beside `transformers` on the same weights, tokens and CPU: prefill, decode, evaluation.

The peer does each task in the fastest form that it has here (`transformers_peer.py`: eager or
compiled, one thread or all). The two take turns, so that what else the machine does falls on both;
a ratio is the median of the turns' ratios. Both compute in float32, and what they compute is
compared: greedy tokens and the summed loss must agree, else the figures would not be of the same
work.
"""

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from rich import box
from rich.table import Table

from ffnlab import weights
from ffnlab.bench.peer import Peer
from ffnlab.errors import FFNLabError, at_least
from ffnlab.formats import load, save
from ffnlab.models import Cache, Decoder, DecoderConfig
from ffnlab.progress import track
from ffnlab.text import generate
from ffnlab.text.evaluate import nats_of

__all__ = ["Comparison", "Settings", "Task", "compare", "embedded_model", "ratios"]

# Greedy tokens may differ where two logits are closer than float32 sums in another order.
MIN_SAME = 0.9
NATS_TOLERANCE = 1e-3  # relative


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      prompt: tokens of the prompt of decoding.
      new: tokens decoded.
      prefill: tokens of the prefill.
      window: predictions in a window of the evaluation.
      windows: how many windows are evaluated.
      turns: times that both sides do each task, after one to warm up.
    """

    prompt: int = 64
    new: int = 128
    prefill: int = 512
    window: int = 512
    windows: int = 8
    turns: int = 9

    def __post_init__(self) -> None:
        at_least(1, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Task:
    """One task, both sides.

    Attributes:
      name: of the task.
      tokens: processed or generated in one turn.
      ours, theirs: median seconds.
      ratio: how many times faster ours is; median over turns.
      agreement: how alike the results are, in words.
      form: in which the peer did it.
    """

    name: str
    tokens: int
    ours: float
    theirs: float
    ratio: float
    agreement: str
    form: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All tasks, and what the two sides are.

    Attributes:
      tasks: by name: "prefill", "decode", "evaluate".
      ours, theirs: versions, dtype, threads; one line each.
    """

    tasks: dict[str, Task]
    ours: str
    theirs: str

    def __rich__(self) -> Table:
        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title="ffnlab beside transformers",
            caption=f"{self.ours}\n{self.theirs}",
        )
        texts = ("task", "results", "peer's form")
        numbers = ("tokens", "ffnlab tok/s", "peer tok/s", "ratio")
        for name in (texts[0], *numbers, *texts[1:]):
            table.add_column(name, justify="left" if name in texts else "right")
        for task in self.tasks.values():
            speeds = (f"{task.tokens / s:,.0f}" for s in (task.ours, task.theirs))
            figures = (f"{task.tokens:,}", *speeds, f"{task.ratio:.2f}")
            table.add_row(task.name, *figures, task.agreement, task.form)
        return table


def compare(
    directory: Path,
    settings: Settings = Settings(),
    *,
    progress: bool = False,
) -> Comparison:
    """Measures both sides.

    Args:
      directory: a model that `transformers` loads without ffnlab's extras.
      settings: sizes and turns.
      progress: show a bar.
    Returns:
      the figures.
    Raises:
      MissingExtraError: torch or transformers is nowhere to be found.
      FFNLabError: the two sides do not compute the same.
    """
    model = weights.prepare(load(directory, extras=False, kinds=("decoder",)))
    random = np.random.default_rng(0)

    def tokens(*shape: int) -> np.ndarray:
        return random.integers(1, model.config.vocab, shape, np.int32)

    prompt, row = tokens(settings.prompt), tokens(1, settings.prefill)
    rows = tokens(settings.windows, settings.window + 1)
    with Peer(directory) as peer:
        sides: dict[str, tuple[int, Callable, Callable]] = {
            "prefill": (
                row.size,
                lambda: prefill(model, row),
                lambda: peer.ask("prefill", tokens=row.tolist()),
            ),
            "decode": (
                settings.new,
                lambda: decode(model, prompt, settings.new),
                lambda: peer.ask("decode", prompt=prompt.tolist(), new=settings.new),
            ),
            "evaluate": (
                rows.size - len(rows),
                lambda: evaluate(model, rows),
                lambda: peer.ask("evaluate", rows=rows.tolist()),
            ),
        }
        found = {
            name: measure(name, *side, settings.turns)
            for name, side in track(list(sides.items()), "bench", enabled=progress)
        }
        versions = ", ".join(f"{k} {v}" for k, v in peer.about["versions"].items())
        theirs = f"{versions}, {peer.about['dtype']}, up to {peer.about['threads']} threads"
    dtype = model.embed.weight.dtype
    ours = f"jax {jax.__version__}, {dtype}, {jax.devices()[0].platform}"
    return Comparison(found, f"ffnlab: {ours}", f"peer: {theirs}")


def measure(name: str, tokens: int, ours: Callable, theirs: Callable, turns: int) -> Task:
    """Lets both sides take turns at one task."""
    answer = theirs()  # the peer chooses its form
    agreement = agree(name, ours(), answer)
    seconds = [(ours()["seconds"], theirs()["seconds"]) for _ in range(turns)]
    mine, other = zip(*seconds, strict=True)
    ratio = statistics.median(b / a for a, b in seconds)
    medians = statistics.median(mine), statistics.median(other)
    return Task(name, tokens, *medians, ratio, agreement, answer["form"])


def agree(name: str, ours: dict, theirs: dict) -> str:
    """Says how alike two results are; raises FFNLabError where they are not of the same model."""
    if "nats" in ours:
        difference = abs(ours["nats"] - theirs["nats"]) / abs(theirs["nats"])
        alike, text = difference <= NATS_TOLERANCE, f"loss differs by {difference:.1e}"
    else:
        same = np.mean(np.array(ours["tokens"]) == np.array(theirs["tokens"]))
        alike, text = same >= MIN_SAME, f"{same:.0%} of tokens equal"
    if not alike:
        raise FFNLabError(f"{name}: the two sides do not compute the same: {text}")
    return text


def prefill(model: Decoder, row: np.ndarray) -> dict:
    """Our prefill of one prompt: a cache and the most likely next token."""
    start = time.perf_counter()
    best, _ = jax.block_until_ready(fill(model, jnp.asarray(row)))
    return {"seconds": time.perf_counter() - start, "tokens": np.asarray(best).tolist()}


@jax.jit
def fill(model: Decoder, tokens: Int[Array, "b t"]) -> tuple[Int[Array, "b"], Cache]:
    """(most likely next tokens [b], cache of these tokens)."""
    logits, cache = model.extend(tokens, model.init_cache(*tokens.shape), last=True)
    return jnp.argmax(logits[:, -1], axis=-1), cache


def decode(model: Decoder, prompt: np.ndarray, new: int) -> dict:
    """Our greedy continuation, prefill included."""
    start = time.perf_counter()
    result = generate(model, [prompt.tolist()], max_tokens=new)
    return {"seconds": time.perf_counter() - start, "tokens": result.tokens[0].tolist()}


def evaluate(model: Decoder, rows: np.ndarray) -> dict:
    """Our loss of every token but the first of each row, one row at a time."""
    start = time.perf_counter()
    losses = [np.asarray(nats_of(model, row[None]), np.float64) for row in rows]
    nats = float(sum(map(np.sum, losses)))
    return {"seconds": time.perf_counter() - start, "nats": nats}


@contextlib.contextmanager
def embedded_model() -> Iterator[Path]:
    """The directory of the embedded model; without one, of a random model of its shape."""
    folder = resources.files("ffnlab") / "embedded"
    if (folder / "model.safetensors").is_file():
        with resources.as_file(folder) as path:
            yield path
        return
    config = DecoderConfig(
        256, 128, 384, layers=8, heads=4, kv_heads=2, head_dim=32, max_positions=1024
    )
    with tempfile.TemporaryDirectory() as path:
        save(Decoder(config, key=jax.random.key(0)), path)
        yield Path(path)


def ratios() -> dict[str, float]:
    """How many times faster ours is on the embedded model: "prefill", "decode", "evaluate"."""
    with embedded_model() as directory:
        return {name: task.ratio for name, task in compare(directory).tasks.items()}
