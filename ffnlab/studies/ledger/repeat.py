"""Running every study, each in a process of its own, and comparing with what was recorded.

A study whose result is there and not stale is not run again, so a run that was interrupted goes on.
A process each: what one leaves in memory or in compiled programs is no part of the next, and one
that fails or dies stops no other.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from ffnlab.errors import check_seed
from ffnlab.parallel.signals import SIGNALS, handled
from ffnlab.storage.files import atomic_write
from ffnlab.studies.ledger.recorded import FULL, Recorded, changes, differences, file_of, read
from ffnlab.studies.table import STUDIES

__all__ = ["Outcome", "run_all"]


class Outcome(NamedTuple):
    """How it went with one study.

    Attributes:
      slug: of the study.
      said: one line for people.
      failed: whether it was run and has no result.
      differs: what came out otherwise than it was recorded.
    """

    slug: str
    said: str
    failed: bool = False
    differs: Sequence[str] = ()


def run_all(out: Path, against: Path, *, quick: bool = False, seed: int = 0) -> int:
    """Runs all studies that have no result yet, or a stale one.

    Of a full run `out/SLUG` gets `result.json` and the pictures, of a quick one `quick.json`.

    Args:
      out: folder of the results.
      against: folder of recorded results to compare with; `out` itself compares with what was
        there before.
      quick: the quick forms.
      seed: of all.
    Returns:
      0, or 1 where a study failed or a claim came out otherwise than recorded.
    Raises:
      ConfigError: a seed that is none.
      FormatError: a recorded result is damaged; nothing is run.
      KeyboardInterrupt: a signal came; what was finished is kept.
    """
    check_seed(seed)
    there = {
        slug: (read(out, slug, quick=quick), read(against, slug, quick=quick)) for slug in STUDIES
    }
    out.mkdir(parents=True, exist_ok=True)
    done: list[Outcome] = []
    try:
        with handled(interrupt, SIGNALS):
            for outcome in outcomes(out, there, quick=quick, seed=seed):
                say(f"[{len(done) + 1}/{len(STUDIES)}] {outcome.slug}: {outcome.said}")
                done.append(outcome)
    finally:
        summarize(done)
    return int(any(outcome.failed or outcome.differs for outcome in done))


def interrupt() -> NoReturn:
    """What every signal to stop does."""
    raise KeyboardInterrupt


def say(line: str) -> None:
    """Prints a line of progress, at once."""
    print(line, flush=True)


def outcomes(
    out: Path,
    there: Mapping[str, tuple[Recorded | None, Recorded | None]],
    *,
    quick: bool,
    seed: int,
) -> Iterator[Outcome]:
    """Runs what is to be run, study by study.

    Args:
      out: folder of the results.
      there: of each study, what is in it, and what is recorded to compare with.
      quick, seed: as `run_all`.
    """
    for slug, (found, old) in there.items():
        reason = why_run(found, seed)
        if found is not None and not reason:
            yield judged(found, old, f"{found.status} claims hold, run before and not stale")
            continue
        say(f"{slug}: {reason}, is run")
        start = time.perf_counter()
        status = record(out / slug, slug, quick=quick, seed=seed)
        new = None if status else read(out, slug, quick=quick)
        took = f"after {time.perf_counter() - start:.0f} s"
        if new is None:
            yield Outcome(slug, f"failed {took}, exit status {status}", failed=True)
        else:
            yield judged(new, old, f"{new.status} claims hold, {took}")


def why_run(found: Recorded | None, seed: int) -> str:
    """Why a study is to be run; "" where it need not be."""
    if found is None:
        return "has no result"
    if found.seed != seed:
        return f"has a result of seed {found.seed}"
    changed = changes(found)
    return f"is stale ({', '.join(changed)} changed)" if changed else ""


def judged(new: Recorded, old: Recorded | None, said: str) -> Outcome:
    """The outcome of a study that has a result, beside the one recorded."""
    if old is None:
        return Outcome(new.slug, f"{said}; nothing was recorded to compare with")
    differs = differences(old.claims, new.claims)
    if differs and new.versions != old.versions:
        differs.append(f"with {new.made_with}; recorded with {old.made_with}")
    if differs and new.text != old.text:
        differs.append("its text is not the one of the recorded run")
    return Outcome(new.slug, said, differs=differs)


def record(folder: Path, slug: str, *, quick: bool, seed: int) -> int:
    """Runs a study and puts its files in place, the result last; the exit status of its process."""
    with tempfile.TemporaryDirectory() as work:
        status = run_one(slug, Path(work), quick=quick, seed=seed)
        if status:
            return status
        fresh = {file.name: file for file in Path(work).glob("*.png") if not quick}
        for name, file in fresh.items():
            copy(file, folder / name)
        copy(Path(work) / FULL, file_of(folder.parent, slug, quick=quick))
        for file in folder.glob("*.png"):
            if not quick and file.name not in fresh:
                file.unlink()
    return 0


def run_one(slug: str, out: Path, *, quick: bool, seed: int) -> int:
    """`ffnlab run SLUG` in a process of its own, which is ended with this one; its exit status."""
    command = [sys.executable, "-m", "ffnlab", "run", slug, "--out", str(out), "--seed", str(seed)]
    command += ["--quick"] if quick else []
    return subprocess.run(command, stdout=subprocess.DEVNULL).returncode


def copy(source: Path, target: Path) -> None:
    """Copies a file, which appears whole or not at all."""
    with atomic_write(target) as file:
        file.write(source.read_bytes())


def summarize(done: Sequence[Outcome]) -> None:
    """Prints what is to be known at the end: what failed, what differs, what is left."""
    left = len(STUDIES) - len(done)
    if left:
        say(f"{left} of {len(STUDIES)} studies are left; the same command goes on")
    for outcome in done:
        if outcome.failed:
            say(f"{outcome.slug}: {outcome.said}")
    for outcome in done:
        for line in outcome.differs:
            say(f"{outcome.slug} differs from what was recorded: {line}")
    if not any(outcome.failed or outcome.differs for outcome in done) and not left:
        say("all studies have results, and no claim differs from what was recorded")
