"""Times every configuration of a task and keeps the fastest whose numbers are right."""

import datetime
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.bench.measure import Work
from pallas_kernels.tuning import cache
from pallas_kernels.tuning.trials import Trials

HEADER = (
    "| task | us, heuristic (measured) | us, best (measured) | times the heuristic "
    "| best | tried |\n|---|---|---|---|---|---|"
)


class Task(NamedTuple):
    """A call whose configuration is looked for.

    Attributes:
      name: of a line of the table.
      op, m, facts: what `cache.find` is asked for.
      heuristic: the configuration taken without a measurement.
      candidates: all others that are tried.
      named: gives a configuration's numbers by name, as they are kept.
      work: gives what is timed with a configuration.
      error: gives the relative norm of the difference from the reference with a configuration.
      bound: what `error` may be.
    """

    name: str
    op: str
    m: int
    facts: dict[str, int | str]
    heuristic: object
    candidates: Sequence[object]
    named: Callable[[object], dict[str, int]]
    work: Callable[[object], Work]
    error: Callable[[object], float]
    bound: float


class Outcome(NamedTuple):
    """What trying a task gave.

    Attributes:
      entry: the `cache.Entry` kept, None where nothing was.
      tried: configurations timed.
      refused: (configuration, reason) of those that were not.
    """

    entry: cache.Entry | None
    tried: int
    refused: list[tuple[object, str]]


class DeviceLost(Exception):
    """The device computes no more in this process; the message says after what."""


def run(makers, *, path, measure, again=False):
    """Tunes tasks one after another; what is found is kept at once, so that it can be interrupted.

    Args:
      makers: functions that make a `Task`; one at a time holds its operands.
      path: the file; tasks that it holds are passed over, and so are the configurations that the
        file of `Trials` beside it names.
      measure: gives the seconds of a `Work`; see `bench.measure`.
      again: also those.
    Returns:
      how many tasks have an entry now; a line per task is printed.
    Raises:
      ValueError: the file is not a table of this schema.
      DeviceLost: a configuration left the device dead.
    """
    done, held = 0, {entry.key: entry for entry in cache.read(path)[0]}
    print(HEADER, flush=True)
    for number, make in enumerate(makers, 1):
        task = make()
        key = cache.key(task.op, task.m, task.facts)
        old = held.get(key)
        if old is not None and not again:
            print(line(task, Outcome(old, 0, [])), flush=True)
            done += 1
            continue
        trials, show = Trials(path, key, again), f"{number}/{len(makers)} "
        found = one(task, measure, lambda text, show=show: progress(show + text), trials)
        progress("")
        print(line(task, found), flush=True)
        if found.entry is not None:
            cache.record(found.entry, path)
            done += 1
    cache.reload()
    return done


def one(task, measure, show, trials):
    """Times the configurations of a task, the heuristic's first.

    Args:
      task: a `Task`.
      measure: gives the seconds of a `Work`.
      show: called with a line of progress before each configuration.
      trials: `Trials` of the task.
    Returns:
      an `Outcome`; without an entry where the heuristic's own configuration cannot be timed.
    Raises:
      DeviceLost: the device does not survive a configuration.
    """
    seconds, refused = {}, []
    configs = list(dict.fromkeys([task.heuristic, *task.candidates]))
    for number, config in enumerate(configs, 1):
        show(f"{task.name}: {number} of {len(configs)}")
        found = trials.find(task.named(config))
        if found is None:
            found = trial(task, config, measure)
            trials.note(task.named(config), found)
            if isinstance(found, str) and not alive():
                raise DeviceLost(f"{task.name}, {task.named(config)}: {found}")
        if isinstance(found, str):
            refused.append((config, found))
        else:
            seconds[config] = 1e-6 * found
    if task.heuristic not in seconds:
        return Outcome(None, len(seconds), refused)
    best = min(seconds, key=seconds.__getitem__)
    times = 1e6 * seconds[best], 1e6 * seconds[task.heuristic]
    today = datetime.date.today().isoformat()
    named = cache.key(task.op, task.m, task.facts)
    return Outcome(cache.Entry(named, task.named(best), *times, today), len(seconds), refused)


def trial(task, config, measure):
    """Microseconds of a configuration, or why there are none."""
    try:
        error = task.error(config)
        if not error <= task.bound:  # NaN is not
            raise ValueError(f"error {error:.1e} from the reference, above {task.bound:.0e}")
        return 1e6 * measure(task.work(config))
    except Exception as problem:  # noqa: BLE001
        # A configuration that a compiler or the device rejects is one that is not chosen.
        return str(problem).replace("\n", " ")[:200]


def alive():
    """Whether the device computes: after a fault of one kernel it refuses all others."""
    try:
        return float(jnp.float32(1) + jax.block_until_ready(jnp.ones(()))) == 2
    except Exception:  # noqa: BLE001
        return False


def line(task, found):
    """A task's line of the table; reasons why configurations were not timed follow it."""
    entry = found.entry
    reasons = "".join(f"\n  not {task.named(c)}: {why}" for c, why in found.refused)
    if entry is None:
        return f"| {task.name} | the heuristic's configuration failed | | | | |{reasons}"
    ratio = entry.heuristic_us / entry.us
    best = ", ".join(f"{name}={value}" for name, value in entry.config.items())
    tried = found.tried or f"kept from {entry.date}"
    return (
        f"| {task.name} | {entry.heuristic_us:.1f} | {entry.us:.1f} | {ratio:.2f} | {best} "
        f"| {tried} |{reasons}"
    )


def progress(text):
    """Replaces a line on a terminal; nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
