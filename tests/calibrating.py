"""Memory of this process while transforms calibrate, on few batches and on four times as many.

`python -m tests.calibrating`: prints a JSON object, transform -> how many more resident bytes are
seen at a batch with 4 BATCHES than with BATCHES, the least of three times: what is held shows in
each, what the kernel does with pages does not. See `test_contracts_methods.py`. "holding" is one
that keeps an activation of every batch, to show that it would be seen.
"""

import ctypes
import gc
import json
import os
from collections.abc import Iterator

import jax
import numpy as np

from ffnlab import transform
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.transform import Transform
from tests.contracts_methods import TRANSFORMS

BATCHES, SHAPE = 3, (4, 512)
CONFIG = DecoderConfig(
    vocab=256,
    width=128,
    hidden=256,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=64,
    max_positions=SHAPE[1],
)
# What a transform would hold at the least that kept something of every batch: one activation.
ACTIVATION = 4 * SHAPE[0] * SHAPE[1] * CONFIG.width  # bytes


class Batches:
    """Random tokens, made when they are asked for."""

    def __init__(self, count: int):
        self.count = count
        self.highest = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for seed in range(self.count):
            self.highest = max(self.highest, resident())
            yield np.random.default_rng(seed).integers(0, CONFIG.vocab, SHAPE, np.int32)
        self.highest = max(self.highest, resident())


def resident() -> int:
    """Bytes of memory that this process has now (not the highest so far).

    Without pages of files: the kernel takes those of libraries away and brings them back as it
    likes, 18 MB once on a busy machine. Without what was freed and the allocator keeps, either.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        pages, of_files = (int(number) for number in file.read().split()[1:3])
    return (pages - of_files) * os.sysconf("SC_PAGE_SIZE")


def holding() -> Transform:
    """A transform that keeps an activation of every batch."""

    def observe(stats: tuple, model: Decoder, batch: np.ndarray) -> tuple:
        return (*stats, jax.block_until_ready(model.embed(batch)))

    return Transform("holding", lambda model: (), observe, lambda model, stats: model)


def highest(made: Transform, model: Decoder, count: int) -> int:
    """The most seen while a transform calibrates on so many batches."""
    batches = Batches(count)
    transform.calibrate(made, model, batches, progress=False)
    return batches.highest


if __name__ == "__main__":
    # Else the more batches there are, the more are under way at once.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    model, found = Decoder(CONFIG, key=jax.random.key(0)), {}
    for name, make in (TRANSFORMS | {"holding": holding}).items():
        made = make()  # once: its programs take memory too
        highest(made, model, 2 * BATCHES)  # compiles
        pairs = [[highest(made, model, n) for n in (BATCHES, 4 * BATCHES)] for _ in range(3)]
        found[name] = min(four - one for one, four in pairs)
    print(json.dumps(found))
