"""What is compiled: each kernel folder's `cases.py` holds `CASES`, a tuple of `Case`."""

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable

import pallas_kernels


@dataclasses.dataclass(frozen=True)
class Case:
    """One shipped configuration of a kernel.

    Attributes:
      name: unique, starting with the kernel's name: "w4a8 matmul, 16 tokens".
      make: gives a function and its abstract arguments.
      chips: keys of `topology.CHIPS` to compile for.
      expect: strings that the machine code must contain ("QGMMA"), or a TPU's compiled module.
      max_spill: bytes that one thread may spill.
      jax: the oldest version of jax that can compile it.
    """

    name: str
    make: Callable[[], tuple[Callable[..., object], tuple[object, ...]]]
    chips: tuple[str, ...]
    expect: tuple[str, ...] = ()
    max_spill: int = 16
    jax: tuple[int, ...] = ()


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
