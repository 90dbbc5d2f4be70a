"""Summaries of a heterogeneous graph (`ffnlab.graphs.precomputed`) beside the same in SciPy.

The other side is plain NumPy over SciPy's CSR matrices, normalized beforehand, relation by relation
like ours and stored in half precision like ours. Both are given the same projections; what they
find is compared. They take turns in one process for time; for memory each runs once in a process of
its own, where what counts is how far the peak rises above what graph and features take.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ffnlab.bench.turns import Comparison, Task
from ffnlab.clock import in_turns
from ffnlab.errors import FFNLabError, at_least
from ffnlab.graph import Hetero
from ffnlab.graphs import Entry, RpHGNNOptions, precomputed
from ffnlab.graphs.label_groups import means_of

__all__ = ["Settings", "compare", "memory_of", "ratios"]

TOLERANCE = 2e-3  # of half precision, relative to the largest
TARGET, RUN = "paper", "summaries"
PROGRAM = "import sys; from ffnlab.bench.summaries import told; told(*sys.argv[1:])"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      papers: nodes of the target; other kinds have 4/5, 1/200 and 1/10 of it.
      width: of every kind's rows.
      rounds: K.
      turns: times that both sides run, after one to warm up.
    """

    papers: int = 100_000
    width: int = 64
    rounds: int = 3
    turns: int = 7

    def __post_init__(self) -> None:
        at_least(200, papers=self.papers)
        at_least(1, width=self.width, rounds=self.rounds, turns=self.turns)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """What both sides work on.

    Attributes:
      graph: of 3, 1 and 10 edges a paper, drawn evenly.
      x: by kind, [n, width] float32.
      options: K rounds.
    """

    graph: Hetero
    x: Mapping[str, Float[np.ndarray, "_ _"]]
    options: RpHGNNOptions

    @functools.cached_property
    def matrices(self) -> dict[tuple[int, str, Entry], Float[np.ndarray, "_ _"]]:
        """Projections by round, kind and entry."""
        random, width = np.random.default_rng(1), next(iter(self.x.values())).shape[1]
        return {
            (turn, kind, Entry(parity, relation)): random.standard_normal(
                (width, width), np.float32
            )
            for turn in range(self.options.rounds - 1)
            for kind in self.graph.counts
            for relation in self.graph.touching(kind)
            for parity in ("odd", "even")
        }

    def given(self, turn: int, kind: str, entry: Entry) -> Any:
        """A projection."""
        return self.matrices[turn, kind, entry]


def drawn(settings: Settings) -> Case:
    """A graph and rows."""
    random, papers = np.random.default_rng(0), settings.papers
    counts = {"paper": papers, "author": 4 * papers // 5, "venue": papers // 200}
    counts["term"] = papers // 10

    def ends(first: str, last: str, edges: int) -> tuple[np.ndarray, np.ndarray]:
        return tuple(random.integers(0, counts[kind], edges) for kind in (first, last))  # type: ignore[return-value]

    relations = {
        ("author", "writes", "paper"): ends("author", "paper", 3 * papers),
        ("paper", "at", "venue"): ends("paper", "venue", papers),
        ("paper", "has", "term"): ends("paper", "term", 10 * papers),
    }
    x = {
        kind: random.standard_normal((n, settings.width), np.float32) for kind, n in counts.items()
    }
    return Case(Hetero.make(counts, relations), x, RpHGNNOptions(settings.rounds))


def ours(case: Case) -> Callable[[], Float[np.ndarray, "n w"]]:
    """Our side, ready to run."""
    x = {kind: jnp.asarray(rows) for kind, rows in case.x.items()}
    given = functools.partial(precomputed, case.graph, x, TARGET, case.options)
    return lambda: given(projections=case.given).rows


def theirs(case: Case) -> Callable[[], Float[np.ndarray, "n w"]]:
    """SciPy's side, with its matrices made."""
    means: dict[Any, Any] = {}
    for relation, edges in zip(case.graph.names, case.graph.edges, strict=True):
        means[relation, relation[2]] = means_of(edges).astype(np.float32)
        means[relation, relation[0]] = means_of(edges.transpose()).astype(np.float32)
    return lambda: by_scipy(case, means)


def by_scipy(case: Case, means: Mapping[Any, Any]) -> Float[np.ndarray, "n w"]:
    """The rows of the target, as `precomputed` lays them."""
    graph, x, width = case.graph, dict(case.x), next(iter(case.x.values())).shape[1]
    rounds, places = case.options.rounds, graph.touching(TARGET)
    rows = np.empty((graph.counts[TARGET], len(places) * 2 * rounds * width), np.float16)
    for turn in range(rounds):
        is_last = turn + 1 == rounds
        totals = {} if is_last else {kind: np.zeros_like(x[kind]) for kind in x}
        for relation in graph.names:
            first, _, last = relation
            if is_last and TARGET not in (first, last):
                continue
            odd = {last: means[relation, last] @ x[first], first: means[relation, first] @ x[last]}
            for kind, other in ((first, last), (last, first)):
                found = {"odd": odd[kind], "even": means[relation, kind] @ odd[other]}
                for i, (parity, h) in enumerate(found.items()):
                    if kind == TARGET:
                        start = ((places.index(relation) * 2 + i) * rounds + turn) * width
                        rows[:, start : start + width] = h
                    if not is_last:
                        h = h @ case.given(turn, kind, Entry(parity, relation))
                        h /= np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)
                        totals[kind] += h
        x = totals
    return rows


SIDES = {"ours": ours, "theirs": theirs}


def compare(settings: Settings = Settings(), *, progress: bool = False) -> Comparison:
    """Measures both sides.

    Args:
      settings: sizes and turns.
      progress: show a bar.
    Returns:
      one task, "summaries"; `peaks` are rises of memory.
    Raises:
      FFNLabError: the two sides do not find the same, or a process failed.
    """
    import scipy

    case = drawn(settings)
    calls = {name: make(case) for name, make in SIDES.items()}
    mine, other = (calls[name]().astype(np.float32) for name in SIDES)
    difference = float(np.abs(mine - other).max() / np.abs(other).max())
    del mine, other
    if not difference <= TOLERANCE:
        raise FFNLabError(f"summaries: the two sides differ by {difference:.1e} of the largest")
    times = in_turns(calls, settings.turns, label="bench" if progress else None).seconds
    turns = list(zip(times["ours"].tolist(), times["theirs"].tolist(), strict=True))
    task = Task.of(turns, difference, "SciPy CSR, float32")
    peaks = tuple(in_process(name, settings) for name in SIDES)
    versions = f"jax {jax.__version__}; scipy {scipy.__version__}, numpy {np.__version__}"
    edges = sum(edges.num_edges for edges in case.graph.edges)
    said = f"{versions}; {edges:,} edges, {settings.rounds} rounds, memory is what a run adds"
    return Comparison("summaries of a graph beside SciPy", {RUN: task}, said, peaks)  # type: ignore[arg-type]


def in_process(side: str, settings: Settings, *, held: bool = False) -> float:
    """`memory_of` in a fresh process.

    Args:
      side, settings: as `memory_of`.
      held: have glibc return what is freed at once. It else keeps blocks below 32 MiB, in pieces
        that depend on the order they came in, and the peak is not of what is held alone.
    Raises:
      FFNLabError: it failed; the message ends with what it said.
    """
    sizes = json.dumps(dataclasses.asdict(settings))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, side, sizes],
        capture_output=True,
        text=True,
        env=os.environ | ({"MALLOC_MMAP_THRESHOLD_": "131072"} if held else {}),
    )
    if done.returncode:
        raise FFNLabError(f"memory of {side}: {' '.join(done.stderr.strip().splitlines()[-3:])}")
    return float(done.stdout.split()[-1])


def told(side: str, sizes: str) -> None:
    """Prints `memory_of`, what `in_process` reads."""
    print(memory_of(side, Settings(**json.loads(sizes))))


def memory_of(side: str, settings: Settings) -> float:
    """Bytes by which the peak of this process rises while a side runs for the first time.

    A small graph runs before: what libraries take on first use is not the run's. On Linux.
    """
    SIDES[side](drawn(Settings(200, settings.width, settings.rounds, 1)))()
    call = SIDES[side](drawn(settings))
    before = status("VmRSS")
    rows = call()
    return float(max(status("VmHWM") - before, rows.nbytes))


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def ratios() -> dict[str, float]:
    """How many times faster ours is ("time"), and its memory over SciPy's ("memory")."""
    found = compare()
    assert found.peaks is not None
    return {"time": found.tasks[RUN].ratio, "memory": found.peaks[0] / found.peaks[1]}
