"""How fast a run goes: items per second, and the part of the devices' peak that it uses.

    MFU = items/s * operations per item / (devices * peak of a device)

An item is a token of text, and an input of anything else.

Peaks are of dense bfloat16 products, from the vendors' data sheets; where none is known (CPUs)
there is no MFU.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax

__all__ = ["PEAKS", "Meter", "Work"]

# FLOP/s of one device, by the start of the name that jax gives its kind; the longest start counts.
PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step does, for the rates that are logged.

    Attributes:
      items: position -> items of its batch, of all processes.
      flops: operations that an item needs in a step; 0 where it is not known.
      item: what one is called.
    """

    items: Callable[[int], int]
    flops: float = 0.0
    item: str = "token"


def peak(kind: str) -> float | None:
    """The peak of a kind of device, FLOP/s; None where it is not known.

    >>> peak("NVIDIA H100 80GB HBM3") / 1e12
    989.0
    """
    names = [name for name in PEAKS if kind.startswith(name)]
    return PEAKS[max(names, key=len)] if names else None


class Meter:
    """Counts the items of steps; the time of evaluations and of compiling is left out.

    Attributes:
      work: what a step does; None for no figures.
      devices: those that take part.
    """

    def __init__(self, work: Work | None, devices: Sequence[jax.Device]):
        self.work = work
        each = peak(devices[0].device_kind)
        self.peak = None if each is None else each * len(devices)
        self.restart()

    def restart(self) -> None:
        """Begins to count."""
        self.items, self.since = 0, time.perf_counter()

    def count(self, position: int, steps: int = 1) -> None:
        """Counts the batches of some steps from a position on."""
        if self.work is not None:
            self.items += sum(map(self.work.items, range(position, position + steps)))

    def figures(self) -> dict[str, float]:
        """Such as "tokens_per_second", and "mfu" where it is known, since the last call."""
        items, seconds = self.items, time.perf_counter() - self.since
        self.restart()
        if self.work is None or not items:
            return {}
        found = {f"{self.work.item}s_per_second": items / seconds}
        if self.peak is not None and self.work.flops:
            found["mfu"] = items / seconds * self.work.flops / self.peak
        return found
