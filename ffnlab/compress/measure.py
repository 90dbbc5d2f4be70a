"""What a job measures of a model: quality on held-out text, size, work per token, decode speed."""

import math
import os
import statistics
import sys
import time
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from ffnlab import tree
from ffnlab.compress.task import Cost
from ffnlab.compress.text import Samples
from ffnlab.errors import NumericalError
from ffnlab.layers import SparseGatedFFN
from ffnlab.models import Decoder, account
from ffnlab.progress import track
from ffnlab.sparsity import realised_sparsity
from ffnlab.text.evaluate import nats_of
from ffnlab.text.generate import begin
from ffnlab.text.sample import Sampling
from ffnlab.weights import SparseInput

__all__ = ["Quality", "cost", "decode_speeds", "device", "peak_memory", "quality"]

PROMPT, STEPS, TURNS = 32, 48, 5  # 320 tokens of context in the end


class Quality(NamedTuple):
    """How well a model predicts a text.

    Attributes:
      nats: sum of -ln p over the counted tokens.
      tokens: how many there are.
      bytes: of text that they stand for.
    """

    nats: float
    tokens: int
    bytes: float

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens)."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes."""
        return self.nats / math.log(2) / self.bytes


def quality(
    model: Decoder, samples: Samples, batch: int, *, label: str = "evaluate", progress: bool = False
) -> Quality:
    """Scores a model on held-out windows.

    Args:
      model: prepared for the backend (`weights.prepare`).
      samples: the windows.
      batch: windows scored at once.
      label: names the model, for the bar and for errors.
      progress: show a bar.
    Raises:
      NumericalError: the loss is NaN or infinite.
    """
    nats = 0.0
    for tokens, counted in track(list(samples.batches(batch)), label, enabled=progress):
        nats += float(np.sum(np.asarray(nats_of(model, tokens), np.float64)[counted]))
    count = int(samples.counted.sum())
    found = Quality(nats, count, count * samples.bytes_per_token)
    if not math.isfinite(nats) or nats / count > 700:
        raise NumericalError(
            f"{label}: the mean loss on held-out text is {nats / count} nats; the model is broken "
            "at this point: leave out the last stage, or make it milder"
        )
    return found


def decode_speeds(*models: Decoder) -> list[float]:
    """Greedy decode speed at batch 1 in tokens per second, of several models in turns.

    Args:
      models: prepared for the backend. They take turns, so that what else the machine does
        falls on all of them; the median of their turns counts.
    """
    running = [
        begin(model, [[1] * PROMPT], (TURNS + 1) * STEPS, Sampling(), None, (), None)
        for model in models
    ]
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(TURNS + 1):
        for i, (model, state, advance) in enumerate(running):
            start = time.perf_counter()
            state = jax.block_until_ready(advance(model, state, (turn + 1) * STEPS))
            if turn:  # the first compiles
                seconds[i].append(time.perf_counter() - start)
            running[i] = model, state, advance
    return [STEPS / statistics.median(turns) for turns in seconds]


def cost(model: Decoder, prepared: Decoder, tokens: Int[np.ndarray, "b t"]) -> Cost:
    """What a model needs.

    Args:
      model: as it is stored.
      prepared: the same as it is run.
      tokens: held-out text, on which the channels that a sparse model skips are counted; a token
        attends to t of them.
    """
    sparse = tree.where(lambda _, node: isinstance(node, SparseGatedFFN | SparseInput))
    zeros = None
    if any(sparse(path, node) for path, node in tree.walk(model)):
        zeros = realised_sparsity(prepared, [jax.numpy.asarray(tokens)]).zeros
    return Cost(
        account.parameters(model),
        account.nbytes(model),
        account.cache_bytes_per_token(model),
        account.flops_per_token(model, tokens.shape[1], zeros=zeros),
    )


def device() -> str:
    """What the figures were measured on."""
    found = jax.devices()[0]
    return f"{found.platform}: {found.device_kind}, {os.cpu_count()} CPU threads"


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
