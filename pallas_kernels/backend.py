"""Which of a kernel's implementations runs.

Each kernel's `api.py` holds a tuple of `Backend`, fastest first and one that runs anywhere last.
`choose` takes the first that fits the device, the jax version and the call. A backend that cannot
run says why, and when none can the caller gets every reason at once.

Two ways back at run time: PALLAS_KERNELS_DISABLE=sm90,mosaic takes backends out by name; and one
that is chosen for the device at hand proves itself on a small call first (`selftest`), once per
process, or is left out with a warning.

The device is the one the call is traced for (`device`): the mesh's inside `shard_map`, else the
default device. On a CPU that is always a backend without Pallas: a GPU kernel's body runs there
only when it is asked for by name (`sm90_interpret`), for tests.
"""

import functools
import importlib
import os
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

JAX_VERSION = tuple(map(int, re.findall(r"\d+", jax.__version__)[:3]))
DISABLE = "PALLAS_KERNELS_DISABLE"  # names of backends, with commas between
OPTIONAL = ("sm90", "sm80", "mosaic", "triton", "tpu")  # what may be disabled: XLA remains
INTERPRETER = (0, 11)  # the first jax that interprets GPU kernels
ARCHITECTURES = {(7, 5): "Turing", (8, 0): "Ampere", (8, 9): "Ada", (9, 0): "Hopper"}
# Compute capability by a word of the device's name, where only the name is known (a mesh without
# devices). Longer words first: "L40" is not an "L4", nor "A100" an "A10".
CAPABILITIES = {
    **dict.fromkeys(("GH200", "H200", "H100", "H800", "H20"), (9, 0)),
    **dict.fromkeys(("GB200", "B200", "B100"), (10, 0)),
    **dict.fromkeys(("A100", "A800", "A30"), (8, 0)),
    **dict.fromkeys(("L40S", "L40", "L4"), (8, 9)),
    **dict.fromkeys(("A10G", "A10", "A40", "A6000"), (8, 6)),
    **dict.fromkeys(("T4",), (7, 5)),
    **dict.fromkeys(("V100",), (7, 0)),
}


def accept(**facts: object) -> None:
    """Refuses nothing; the `refuse` of a backend that runs any call."""


class Backend(NamedTuple):
    """One implementation of a kernel.

    Attributes:
      name: what `backend=` of the public function accepts.
      run: the implementation; all backends of one kernel take the same arguments.
      platforms: names of `jax.default_backend()` it runs on ("cpu", "gpu", "tpu"); empty: all.
      refuse: called with facts about the call; returns None, or the reason why it cannot run.
      automatic: False for implementations that only run when asked for by name.
      at_least, below: compute capabilities a GPU must have; None: any.
      jax: the oldest version of jax it runs on.
      test: raises where a small call of it is wrong, or None; see `failure`.
    """

    name: str
    run: Callable[..., jax.Array]
    platforms: tuple[str, ...] = ()
    refuse: Callable[..., str | None] = accept
    automatic: bool = True
    at_least: tuple[int, int] | None = None
    below: tuple[int, int] | None = None
    jax: tuple[int, ...] = ()
    test: Callable[[], None] | None = None


class lazy:
    """A function of a module that is imported at the first call (Pallas is slow to import).

    >>> lazy("math", "sqrt")(4.0)
    2.0
    """

    def __init__(self, module: str, name: str, **options: object) -> None:
        """Names the function; `options` are passed to every call."""
        self.module, self.name, self.options = module, name, options

    def __call__(self, *args, **keywords):
        """Calls the function."""
        function = getattr(importlib.import_module(self.module), self.name)
        return function(*args, **self.options, **keywords)


def device() -> tuple[str, tuple[int, int] | None]:
    """What is traced for: the platform, and a GPU's compute capability (None when unknown)."""
    abstract, concrete = traced_devices()
    if abstract is not None and abstract.device_kind != concrete.device_kind:
        return abstract.platform, named_capability(abstract.device_kind)
    if concrete.platform != "gpu":
        return concrete.platform, None
    words = str(getattr(concrete, "compute_capability", "")).split(".")
    known = len(words) == 2 and all(word.isdigit() for word in words)
    return "gpu", (int(words[0]), int(words[1])) if known else None


def device_kind() -> str:
    """The name of the device that is traced for, as its driver gives it."""
    abstract, concrete = traced_devices()
    return (concrete if abstract is None else abstract).device_kind


def cores() -> int:
    """Multiprocessors of the device that is traced for; an H200's where that is not known."""
    abstract, concrete = traced_devices()
    if abstract is not None:
        return abstract.num_cores or 132
    return getattr(concrete, "core_count", None) or 132


def traced_devices():
    """The abstract device of the mesh around the call, or None, and the default device."""
    chosen = getattr(jax.config, "jax_default_device", None)
    concrete = jax.devices()[0] if chosen is None or isinstance(chosen, str) else chosen
    return jax.sharding.get_abstract_mesh().abstract_device, concrete


def named_capability(kind: str) -> tuple[int, int] | None:
    """Compute capability of the GPU called `kind`, None when the name is not known.

    >>> named_capability("NVIDIA H100 80GB HBM3")
    (9, 0)
    """
    words = re.findall(r"[A-Z0-9]+", kind.upper())
    return next((pair for name, pair in CAPABILITIES.items() if name in words), None)


def choose(
    backends: Sequence[Backend],
    requested: str | None = None,
    *,
    platform: str | None = None,
    capability: tuple[int, int] | None = None,
    **facts: object,
) -> Backend:
    """The first backend that can run a call.

    Args:
      backends: implementations in order of preference.
      requested: a name, to take that one or fail.
      platform: "cpu", "gpu" or "tpu"; that of `device` when None.
      capability: a GPU's compute capability; that of `device` when `platform` is None.
      **facts: what `refuse` of each backend needs to know (shapes, dtypes, options).
    Returns:
      one of `backends`.
    Raises:
      ValueError: unknown name, or no backend can run; the message holds every reason.

    >>> choose([Backend("xla", print)]).name
    'xla'
    """
    candidates = [b for b in backends if b.name == requested]
    if requested is None:
        candidates = [b for b in backends if b.automatic]
    if not candidates:
        accepted = ", ".join(dict.fromkeys(repr(b.name) for b in backends))
        raise ValueError(f"backend={requested!r} is unknown; accepted: None, {accepted}")
    at_hand = platform is None and requested is None
    if platform is None:
        platform, capability = device()
    reasons = []
    for backend in candidates:
        reason = (
            unfit(backend, platform, capability)
            or disabled(backend)
            or backend.refuse(**facts)
            or (distrusted(backend) if at_hand else None)
        )
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise ValueError("no backend can run this call: " + "; ".join(reasons))


def disabled(backend: Backend) -> str | None:
    """Why the user's environment takes a backend out; None when it does not.

    Raises:
      ValueError: the variable names what is none, or cannot be taken out.
    """
    names = [name.strip() for name in os.environ.get(DISABLE, "").split(",") if name.strip()]
    unknown = [name for name in names if name not in OPTIONAL]
    if unknown:
        accepted = ", ".join(OPTIONAL)
        raise ValueError(f"{DISABLE} names {', '.join(unknown)}; accepted: {accepted}")
    return f"disabled by {DISABLE}" if backend.name in names else None


def distrusted(backend: Backend) -> str | None:
    """Why a backend is not relied on here: it failed its test. Only a device at hand can tell."""
    abstract, concrete = traced_devices()
    other = abstract is not None and abstract.device_kind != concrete.device_kind
    other |= bool(backend.platforms) and concrete.platform not in backend.platforms
    if backend.test is None or other or concrete not in jax.devices():
        return None
    return failure(concrete.device_kind, backend.name, backend.test)


@functools.cache
def failure(kind: str, name: str, test: Callable[[], None]) -> str | None:
    """What a backend's test says, once per device and backend, with a warning; None for nothing."""
    said: list[str] = []

    def run() -> None:
        try:
            test()
        except Exception as error:  # noqa: BLE001
            said.append(str(error).replace("\n", " ")[:300])  # whatever a compiler or a device says

    thread = threading.Thread(target=run)  # of its own: nothing is traced there
    thread.start()
    thread.join()
    if not said:
        return None
    reason = f"failed its self-test on {kind}: {said[0]}"
    warnings.warn(f"backend {name} {reason}; another one does its work", stacklevel=4)
    return reason


def tested(kernel: str, name: str) -> Callable[[], None]:
    """The self-test of a kernel's backend, a function of `pallas_kernels.selftest`."""
    return lazy("pallas_kernels.selftest", kernel, backend=name)


def unfit(backend: Backend, platform: str, capability: tuple[int, int] | None) -> str | None:
    """Why a device or this jax cannot run a backend; None when it can."""
    if backend.platforms and platform not in backend.platforms:
        return f"runs on {', '.join(backend.platforms)}, this is {platform}"
    if backend.jax > JAX_VERSION:
        return f"needs jax {'.'.join(map(str, backend.jax))}, this is {jax.__version__}"
    low, high = backend.at_least, backend.below
    if low is None or platform != "gpu":
        return None
    if capability is not None and low <= capability and (high is None or capability < high):
        return None
    wanted = (
        f"{low[0]}.{low[1]} or newer"
        if high is None
        else f"{low[0]}.{low[1]} to below {high[0]}.{high[1]}"
    )
    if high == (low[0] + 1, 0) and low[1] == 0:
        wanted = f"{low[0]}.x"
    name = f" ({ARCHITECTURES[low]})" if low in ARCHITECTURES else ""
    has = "an unknown one" if capability is None else f"{capability[0]}.{capability[1]}"
    return f"needs compute capability {wanted}{name}; this device has {has}"
