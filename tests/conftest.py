"""Set-up of the whole suite: eight CPU devices, warnings are errors, shapes are checked.

The environment is set before jax is imported; the import hook comes before ffnlab is imported,
and makes each jaxtyping annotation in ffnlab and pallas_kernels a check made at the call.
"""

import gc
import os
import signal
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compiling: programs run unoptimized, but in `make test-slow`.
FLAGS = {"--xla_force_host_platform_device_count": 8, "--xla_backend_optimization_level": 0}
if version("jaxlib").startswith("0.10."):  # a third of compiling; later versions refuse the flag
    FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # 7 % of the time of tests
os.environ.setdefault("MPLBACKEND", "agg")

# A suite in the background of a script ignores these, and so would all that it starts.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402

from tests.shape_checks import checked  # noqa: E402


def share_contexts(uses: int = 10) -> None:
    """Lets programs of a thread share a context of MLIR, as jax does from 0.12 on.

    To make one takes 3.4 ms, more than to lower most programs: a fifth of the time of tests.
    """
    make, kept = mlir.make_ir_context, threading.local()

    def make_ir_context() -> object:
        context, left = getattr(kept, "context", (None, 0))
        if left == 0:
            context, left = make(), uses
        kept.context = context, left - 1
        return context

    mlir.make_ir_context = make_ir_context


if version("jax").startswith("0.10."):
    share_contexts()

# Programs are graphs of many Python objects, which live long: with the usual 700 new ones between
# two collections a twentieth of the time is garbage collection.
gc.set_threshold(20_000, 20, 100)

jaxtyping.jaxtyped = checked  # which the hook puts on every function
HOOK = jaxtyping.install_import_hook(["ffnlab", "pallas_kernels"], "beartype.beartype")

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"

# Folders of tests/ in which adding bfloat16 to float32 raises instead of giving float32.
STRICT_FOLDERS = frozenset({"weights", "pallas_kernels", "pruning", "quantization", "sparsity"})

MANY_MAPS = 25_000

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, print_blob=True, database=None
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture
def key() -> jax.Array:
    """A random key: the one source of randomness of a test."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of recorded oracle outputs, each beside the script that made it."""
    return FIXTURES


@pytest.fixture(scope="session")
def data() -> Path:
    """The shared data folder: FFNLAB_DATA, else ../shared/data beside the checkout."""
    folder = Path(os.environ.get("FFNLAB_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set FFNLAB_DATA")
    return folder


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Forgets compiled programs before they take more memory maps than Linux lets a process have.

    A program takes some 16 of 65,530; past that XLA dies of a segmentation fault.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """Makes a silent upcast an error where dtypes matter (STRICT_FOLDERS)."""
    inside = request.path.is_relative_to(ROOT / "tests")
    folders = request.path.relative_to(ROOT / "tests").parts[:-1] if inside else ()
    if STRICT_FOLDERS.isdisjoint(folders) or request.node.get_closest_marker("standard_promotion"):
        yield
    else:
        with jax.numpy_dtype_promotion("strict"):
            yield
