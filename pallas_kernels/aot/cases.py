"""What is compiled: each kernel folder's `cases.py` holds `CASES`, a tuple of `Case`."""

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable

import pallas_kernels
from pallas_kernels.aot.topology import find
from pallas_kernels.backend import Backend, unfit


@dataclasses.dataclass(frozen=True)
class Case:
    """One shipped configuration of a kernel.

    Attributes:
      name: unique, starting with the kernel's name: "w4a8 matmul, 16 tokens".
      make: gives a function and its abstract arguments.
      chips: keys of `topology.CHIPS` to compile for.
      expect: strings that the machine code must contain ("QGMMA"), or a TPU's compiled module.
      max_spill: bytes that one thread may spill, none of them in a loop of products.
      backends: entries of the kernel's table (`named`) whose rules say which jax compiles it for
        which chip; none: any jax for any chip.
      patterns: regular expressions that something in the machine code must match.
      launches: kernels that the compiled program may launch; None: any number.
      registers: the most that a thread may have, where blocks are to share a multiprocessor.
    """

    name: str
    make: Callable[[], tuple[Callable[..., object], tuple[object, ...]]]
    chips: tuple[str, ...]
    expect: tuple[str, ...] = ()
    max_spill: int = 16
    backends: tuple[Backend, ...] = ()
    patterns: tuple[str, ...] = ()
    launches: int | None = None
    registers: int = 255


def named(table, name):
    """The entries of a kernel's table of backends that are called `name`.

    Raises:
      ValueError: there is none.
    """
    found = tuple(backend for backend in table if backend.name == name)
    if not found:
        accepted = ", ".join(dict.fromkeys(repr(backend.name) for backend in table))
        raise ValueError(f"no backend is called {name!r}; accepted: {accepted}")
    return found


def too_old(case: Case, name: str) -> str | None:
    """Why this jax cannot compile a case for the chip `name`; None if it can.

    Raises:
      ValueError: the case's backend does not serve that chip, whatever the jax.
    """
    chip = find(name)
    device = (chip.platform, chip.capability)
    serving = [b for b in case.backends if unfit(b._replace(jax=()), *device) is None]
    if case.backends and not serving:
        raise ValueError(f"{case.name!r} lists {name!r}: {unfit(case.backends[0], *device)}")
    reasons = [reason for b in serving if (reason := unfit(b, *device))]
    return reasons[0] if reasons and len(reasons) == len(serving) else None


def collect() -> dict[str, Case]:
    """All cases by name.

    Raises:
      ValueError: two cases of one name.
    """
    found: dict[str, Case] = {}
    for module in pkgutil.iter_modules(pallas_kernels.__path__):
        name = f"pallas_kernels.{module.name}.cases"
        if module.name == "aot" or not module.ispkg or importlib.util.find_spec(name) is None:
            continue
        for case in importlib.import_module(name).CASES:
            if case.name in found:
                raise ValueError(f"two cases are called {case.name!r}; the second is in {name}")
            found[case.name] = case
    return found
