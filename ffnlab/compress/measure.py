"""What a job measures of a model: quality on held-out text, size, work per token, decode speed."""

import math
import os
import statistics
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ffnlab import tree
from ffnlab.compress.text import Samples
from ffnlab.errors import NumericalError
from ffnlab.models import Decoder
from ffnlab.models.generate import begin
from ffnlab.models.sample import Sampling
from ffnlab.progress import track

__all__ = ["Quality", "decode_speeds", "peak_memory", "quality"]

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
        nats += float(np.sum(np.asarray(window_nats(model, tokens, counted), np.float64)))
    count = int(samples.counted.sum())
    found = Quality(nats, count, count * samples.bytes_per_token)
    if not math.isfinite(nats) or nats / count > 700:
        raise NumericalError(
            f"{label}: the mean loss on held-out text is {nats / count} nats; the model is broken "
            "at this point: leave out the last stage, or make it milder"
        )
    return found


@jax.jit
def window_nats(
    model: Decoder, tokens: Int[Array | np.ndarray, "b u"], counted: Bool[Array | np.ndarray, "b t"]
) -> Float[Array, "b"]:
    """-ln p summed over the counted tokens of each row."""
    logits = model(tokens[:, :-1])
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - chosen) * counted, axis=1)


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


class Cost(NamedTuple):
    """What a model needs.

    Attributes:
      parameters: numbers that it has.
      nbytes: stored, with scales and thresholds.
      cache_bytes: of keys and values per token of context.
      flops: per decoded token.
    """

    parameters: int
    nbytes: int
    cache_bytes: float
    flops: float


def cost(model: Decoder, samples: Samples) -> Cost:
    """What a model needs, as it is stored."""
    cache = jax.eval_shape(lambda: model.init_cache(1, PROMPT).layers)
    n = sum(math.prod(v.get_value().shape) for _, v in tree.walk(model) if isinstance(v, nnx.Param))
    return Cost(n, tree.nbytes(model), tree.nbytes(cache) / PROMPT, 2.0 * n)


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
