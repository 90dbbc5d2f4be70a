"""Mutation tests: a sample of small wrong changes, and whether the tests see them.

`table.toml` names the files and the tests of each, and the seed of the sample. Results go to
build/mutants/ and are kept: what was killed stays so while its file is the same, what survived is
tried again when its tests have changed. `equivalent.toml` lists survivors that no test can kill.

Neither mutmut nor cosmic-ray fits. mutmut 3 leaves out functions with decorators, which is all
that is jitted, and constants of modules; cosmic-ray begins an interpreter for every change, seven
seconds of imports here, runs one command whatever the file, and changes files in place. Neither
draws a sample.
"""

import argparse
import collections
import contextlib
import difflib
import fcntl
import functools
import json
import os
import random
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.mutation import sandbox
from tests.mutation.mutations import Mutation, applied, mutations

HERE = Path(__file__).resolve().parent
BUILD = sandbox.ROOT / "build" / "mutants"
RESULTS = BUILD / "results.jsonl"


class Job(NamedTuple):
    """A change to try.

    Attributes:
      target: the file.
      tests: files with its tests.
      change: the mutation.
    """

    target: str
    tests: list[str]
    change: Mutation

    @property
    def name(self) -> str:
        """What results and `equivalent.toml` call it."""
        return f"{self.target}: {self.change.name}"


def sample(table: Mapping, share: float, only: str) -> list[Job]:
    """The changes drawn: of each file a share, at least `least`; all whose name has `only` in it.

    A file's draw depends on the seed, its path and itself alone.
    """
    jobs = []
    for area in table["areas"].values():
        for target, tests in area.items():
            found = list(changes(target))
            if only:
                named = [Job(target, tests, m) for m in found]
                jobs += [job for job in named if only in job.name]
                continue
            random.Random(f"{table['seed']}/{target}").shuffle(found)
            count = max(table["least"], round(share * len(found)))
            drawn = sorted(found[:count], key=lambda change: change.start)
            jobs += [Job(target, tests, change) for change in drawn]
    return jobs


@functools.cache
def changes(target: str) -> tuple[Mutation, ...]:
    """All changes of a file."""
    return tuple(mutations((sandbox.ROOT / target).read_bytes()))


def results() -> dict[str, dict]:
    """The last result of every change tried so far, by name."""
    if not RESULTS.exists():
        return {}
    rows = map(json.loads, RESULTS.read_text().splitlines())
    return {row["name"]: row for row in rows}


def stands(job: Job, row: Mapping | None) -> bool:
    """Whether a result is still that of this change and these tests."""
    if row is None or row["file"] != sandbox.digest(sandbox.ROOT / job.target):
        return False
    return bool(row["killed_by"]) or row["tests"] == tests_digest(job)


def tests_digest(job: Job, root: Path = sandbox.ROOT) -> str:
    """A sum over the tests of a file, in the repository or a copy of it."""
    return sandbox.digest(*(root / test for test in job.tests))


def diff(job: Job) -> str:
    """The change as a unified diff without context."""
    source = (sandbox.ROOT / job.target).read_bytes()
    pair = (text.decode().splitlines() for text in (source, applied(source, job.change)))
    lines = list(difflib.unified_diff(*pair, job.target, job.target, lineterm="", n=0))
    return "\n".join(lines[2:])


def work(jobs: Sequence[Job], copy: Path, watched: Sequence[str]) -> None:
    """Tries jobs that no other worker has begun; each file in a process of its own."""
    sandbox.copy_repository(copy)
    while (ahead := next_job(jobs, None)) is not None:
        target = ahead.target
        child = sandbox.forked(lambda target=target: serve(jobs, target, copy, watched))
        if os.waitpid(child, 0)[1]:
            while next_job(jobs, target) is not None:  # its jobs are left out
                pass


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Keeps a second run out: both would change files of the same copies.

    Raises:
      SystemExit: another run is at work here.
    """
    with (BUILD / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another run is at work in {BUILD}; wait for it, or use another clone")
        yield


def next_job(jobs: Sequence[Job], target: str | None) -> Job | None:
    """Takes the next job if it is of the target; with None looks at it and leaves it there."""
    with (BUILD / "next").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        index = int(file.read())
        job = jobs[index] if index < len(jobs) else None
        if job is not None and job.target == target:
            file.seek(0)
            file.write(str(index + 1))
        elif target is not None:
            return None
        return job


def serve(jobs: Sequence[Job], target: str, copy: Path, watched: Sequence[str]) -> None:
    """Tries the changes of one file in a copy of the repository."""
    some = next(job for job in jobs if job.target == target)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sandbox.prepare(target, some.tests)
    known = baseline(some.tests, watched)
    limit = 30 + 2 * sum(test["seconds"] for test in known.values())
    killers = [(row["scope"], row["killed_by"]) for row in results().values()]
    file = Path(target)
    source, sums = (
        file.read_bytes(),
        {"file": sandbox.digest(file), "tests": tests_digest(some, copy)},
    )
    while (job := next_job(jobs, target)) is not None:
        scope = job.change.scope
        first = likely(target, scope, known, killers)
        with sandbox.changed(file, applied(source, job.change)):
            outcome = sandbox.run(some.tests, first=first, known=known, seconds=limit)
        killed_by = outcome.failed[0] if outcome.failed else ""
        killers.append((scope, killed_by))
        seconds = round(sum(outcome.seconds.values()), 1)
        row = {"name": job.name, "killed_by": killed_by, "scope": scope, "seconds": seconds}
        with RESULTS.open("a") as log:
            log.write(json.dumps({**row, **sums, "diff": diff(job)}) + "\n")
        print(f"{job.name}: {killed_by or 'SURVIVED'} ({seconds} s)", file=sys.stderr, flush=True)


def likely(
    target: str, scope: str, known: Mapping, killers: Sequence[tuple[str, str]]
) -> list[str]:
    """Tests to begin with: those that killed most in a function, that call it, the quick ones."""
    here = collections.Counter(name for where, name in killers if where == scope)
    anywhere = collections.Counter(name for _, name in killers)

    def rank(name: str) -> tuple:
        misses = scope not in known[name]["called"].get(target, ())
        return -here[name], misses, -anywhere[name], known[name]["seconds"]

    return sorted(known, key=rank)[: sandbox.FIRST]


def baseline(tests: Sequence[str], watched: Sequence[str]) -> dict[str, dict]:
    """Time and calls of each test without a change; kept while what it reaches stays.

    Raises:
      RuntimeError: tests fail.
    """
    known = {}
    for test in tests:
        file = BUILD / "baseline" / f"{test.replace('/', '.')}.json"
        kept = json.loads(file.read_text()) if file.exists() else {"reached": [], "sum": ""}
        if kept["sum"] != sandbox.digest(*map(Path, [test, *kept["reached"]])):
            found = sandbox.run([test], watched=watched)
            if found.failed:
                raise RuntimeError(f"tests fail without any change: {found.failed}")
            rows = {
                name: {"seconds": seconds, "called": found.called[name]}
                for name, seconds in found.seconds.items()
            }
            reached = sorted({target for row in rows.values() for target in row["called"]})
            total = sandbox.digest(*map(Path, [test, *reached]))
            kept = {"reached": reached, "sum": total, "tests": rows}
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(kept))
        known |= kept["tests"]
    return known


def report(table: Mapping, jobs: Sequence[Job], found: Mapping[str, dict]) -> int:
    """Prints the killed share of each file and what survived; returns how many are not judged."""
    equivalent = tomllib.loads((HERE / "equivalent.toml").read_text())
    summary, survivors = {}, []
    for area, files in table["areas"].items():
        for target in files:
            mine = [job for job in jobs if job.target == target]
            done = [job for job in mine if stands(job, found.get(job.name))]
            alive = [job for job in done if not found[job.name]["killed_by"]]
            same = [job for job in alive if job.name in equivalent]
            survivors += alive
            counts = {"drawn": len(mine), "tried": len(done), "killed": len(done) - len(alive)}
            summary[target] = {"area": area, **counts, "equivalent": len(same)}
    for line in lines_of(summary):
        print(line)
    for job in survivors:
        print(f"\n{job.name}\n{found[job.name]['diff']}")
        print(f"  equivalent: {equivalent[job.name]}" if job.name in equivalent else "  NOT KILLED")
    unjudged = [job.name for job in survivors if job.name not in equivalent]
    content = {"seed": table["seed"], "files": summary, "survivors": [j.name for j in survivors]}
    (BUILD / "summary.json").write_text(json.dumps({**content, "unjudged": unjudged}, indent=1))
    return len(unjudged)


def lines_of(summary: Mapping[str, dict]) -> Iterator[str]:
    """A table: files, areas, all of them."""
    rows = [(target, [row]) for target, row in summary.items() if row["drawn"]]
    areas = dict.fromkeys(row["area"] for row in summary.values())
    rows += [(f"[{a}]", [r for r in summary.values() if r["area"] == a]) for a in areas]
    yield f"{'':46}{'tried':>6} {'killed':>6} {'equivalent':>10}  {'killed of the others':>6}"
    for name, parts in [*rows, ("all", list(summary.values()))]:
        tried, killed, same = (sum(p[k] for p in parts) for k in ("tried", "killed", "equivalent"))
        if tried:
            share = killed / max(1, tried - same)
            yield f"{name:46}{tried:6} {killed:6} {same:10}  {share:6.1%}"


def main() -> int:
    """Draws, tries what was not tried yet, reports."""
    table = tomllib.loads((HERE / "table.toml").read_text())
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__.split("\n")[0])
    parser.add_argument("--share", type=float, default=table["share"], help="of a file's changes")
    parser.add_argument("--only", default="", help="all changes with this in their name instead")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="try nothing more")
    options = parser.parse_args()
    jobs = sample(table, options.share, options.only)
    BUILD.mkdir(parents=True, exist_ok=True)
    if not options.report:
        with alone():
            kept = results()
            left = [job for job in jobs if not stands(job, kept.get(job.name))]
            print(f"{len(jobs)} changes, {len(left)} to try", file=sys.stderr)
            (BUILD / "next").write_text("0")
            sandbox.import_libraries()
            watched = [target for files in table["areas"].values() for target in files]
            for copy in [BUILD / f"copy{i}" for i in range(options.workers)]:
                sandbox.forked(lambda copy=copy: work(left, copy, watched))
            for _ in range(options.workers):
                os.wait()
    return int(report(table, jobs, results()) > 0)


if __name__ == "__main__":
    sys.exit(main())
