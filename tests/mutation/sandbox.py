"""Runs tests against a changed copy of the repository, in forks of a process that has imported jax.

What a file does not reach is imported once for all its changes. A fork is safe as long as jax has
not made its devices, which have threads: importing makes none.
"""

import ast
import collections
import contextlib
import hashlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("ffnlab", "pallas_kernels", "tests")
FIRST = 8  # tests moved to the front; moving more tears fixtures of modules down again and again
LIBRARIES = (
    "beartype flax.nnx hypothesis.extra.numpy jax.numpy jaxtyping optax orbax.checkpoint rich "
    "safetensors.numpy scipy.integrate scipy.stats"
)


class Outcome(NamedTuple):
    """What the tests said.

    Attributes:
      failed: ids of the tests that failed, or what else ended the run; empty when all passed.
      seconds: of the processor, by test.
      called: file -> its functions that were called, by test.
    """

    failed: list[str]
    seconds: dict[str, float]
    called: dict[str, dict[str, list[str]]]


def copy_repository(to: Path) -> None:
    """Copies what git knows or would take, as it is in the working tree, and what was compiled."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    wanted = {name for name in names.decode().split("\0") if name and (ROOT / name).is_file()}
    there = {str(file.relative_to(to)) for file in to.rglob("*") if file.is_file()}
    for name in there - wanted:
        if "__pycache__" not in name:
            (to / name).unlink()
    for name in wanted:
        if name not in there or (to / name).read_bytes() != (ROOT / name).read_bytes():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).unlink(missing_ok=True)
            replace(to / name, (ROOT / name).read_bytes())


def digest(*files: Path) -> str:
    """A sum over the content of files."""
    total = hashlib.sha256()
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()[:16]


@contextlib.contextmanager
def changed(file: Path, content: bytes) -> Iterator[None]:
    """The file with other content, and no compiled form of either."""
    before = file.read_bytes()
    try:
        replace(file, content)
        yield
    finally:
        replace(file, before)


def replace(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
        compiled.unlink()


def imports(file: Path, name: str = "") -> set[str]:
    """Modules that a file of the repository imports, packages included; `name` is its own."""
    found = {name}
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    parents = {".".join(full.split(".")[:i]) for full in found for i in range(1, 9)}
    return {each for each in found | parents if module_file(each) is not None} - {name}


def module_file(name: str) -> Path | None:
    """The file of a module of the repository."""
    path = name.replace(".", "/")
    files = [Path(f"{path}.py"), Path(path, "__init__.py")] if path.startswith(PACKAGES) else []
    return next((file for file in files if file.is_file()), None)


def independent(target: str, tests: Sequence[str]) -> list[str]:
    """Modules that the tests import and that do not import the target in any way, in order."""
    reached, queue = {}, [name for test in tests for name in imports(Path(test))]
    while queue:
        name = queue.pop()
        if name not in reached:
            reached[name] = imports(module_file(name), name)
            queue += reached[name]
    tainted, before = {name for name in reached if str(module_file(name)) == target}, set()
    while tainted != before:
        before = tainted
        tainted = before | {name for name, used in reached.items() if used & before}
    return sorted(name for name in set(reached) - tainted if not name.startswith("tests"))


def import_libraries() -> None:
    """What all tests need and no change reaches; modules are compiled once, and kept."""
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for name in LIBRARIES.split():
        importlib.import_module(name)


def prepare(target: str, tests: Sequence[str]) -> None:
    """Imports what does not depend on the target; the working directory is a copy."""
    sys.path[:0] = [os.getcwd(), str(Path.cwd() / "tests")]
    importlib.import_module("tests.conftest")
    for name in independent(target, tests):
        with contextlib.suppress(ImportError):  # of an extra
            importlib.import_module(name)
    from jax._src import xla_bridge

    if xla_bridge.backends_are_initialized():
        raise RuntimeError(f"importing what {target} does not reach has made jax's devices")


class Recorder:
    """A pytest plugin: the order of tests, their time and what they call.

    Attributes:
      first: ids of tests that begin, after those that are not in `known`.
      known: ids of the tests that have been seen.
      watched: files whose calls are noted.
    """

    def __init__(self, first: Sequence[str], known: Container[str], watched: Sequence[str]):
        self.first, self.known = first, known
        self.watched = {str(Path(file).absolute()): file for file in watched}
        self.outcome = Outcome([], {}, {})

    def pytest_collection_modifyitems(self, items: list) -> None:
        """New tests, then those that are likely to fail, then the others as they come."""
        rank = {name: i for i, name in enumerate(self.first)}

        def place(item: pytest.Item) -> int:
            return rank.get(item.nodeid, len(rank) if item.nodeid in self.known else -1)

        items.sort(key=place)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> object:
        called, begin = collections.defaultdict(set), time.process_time()

        def note(frame: object, event: str, _: object) -> None:
            if event == "call" and frame.f_code.co_filename in self.watched:
                scope = frame.f_code.co_qualname.replace(".<locals>", "").partition(".<")[0]
                called[self.watched[frame.f_code.co_filename]].add(scope)

        if self.watched:
            sys.setprofile(note)
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            self.outcome.seconds[item.nodeid] = round(time.process_time() - begin, 3)
            self.outcome.called[item.nodeid] = {file: sorted(x) for file, x in called.items()}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.outcome.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.outcome.failed.append(f"collecting {report.nodeid}")


def run(
    tests: Sequence[str],
    *,
    first: Sequence[str] = (),
    known: Container[str] = (),
    watched: Sequence[str] = (),
    seconds: float = 3000.0,
) -> Outcome:
    """The outcome of tests in a fork of this process, up to the first failure unless watched.

    Args:
      tests: files with tests.
      first, known, watched: see `Recorder`.
      seconds: of the processor, after which the fork is ended; ten times as many by the clock.
    """
    ends, begins = os.pipe()

    def answer() -> None:
        os.close(ends)
        outcome = in_fork(tests, Recorder(first, known, watched), int(seconds))
        with os.fdopen(begins, "w") as pipe:
            pipe.write(json.dumps(outcome))

    child = forked(answer)
    os.close(begins)
    with os.fdopen(ends) as pipe:
        answer = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what a test has left running
    if answer:
        return Outcome(*json.loads(answer))
    return Outcome([signal.Signals(-code).name if code < 0 else "no outcome"], {}, {})


def forked(call: Callable[[], None]) -> int:
    """Calls a function in a fork; returns the process id. Its exit status is 0 after success."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            call()
            code = 0
        except BaseException:  # noqa: BLE001 (the fork ends here)
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def in_fork(tests: Sequence[str], recorder: Recorder, seconds: int) -> Outcome:
    """The tests of `run`; what they print goes to a file beside the copy."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 9))
    signal.alarm(10 * seconds)
    log = os.open(f"{os.getcwd()}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    options = "-q --assert=plain --no-header -p no:cacheprovider -p no:xdist".split()
    code = pytest.main([*options, *([] if recorder.watched else ["-x"]), *tests], [recorder])
    outcome = recorder.outcome
    if code not in (0, 1) and not outcome.failed:
        outcome.failed.append(f"pytest ended with {code!r}")
    return outcome
