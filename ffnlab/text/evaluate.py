"""Perplexity of a text by strided windows, every token scored once.

A window holds `window` predictions; windows start every `stride` tokens. The first scores all of
its predictions, each later one its last `stride`, so every scored token has at least
window - stride tokens before it (all there are, in the first window). The first token of the text
has nothing before it and is context only: begin with the model's bos token to score all of a text.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from ffnlab import weights
from ffnlab.data import held_out_windows
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.models.decoder import Decoder
from ffnlab.progress import track

__all__ = ["Perplexity", "perplexity"]

WINDOW = 1024  # predictions in a window at most, unless asked for more


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
      nats: sum over the scored tokens of -ln p(token | context).
      tokens: how many were scored.
      nbytes: of text they stand for, or None where it was not said.
      window, stride: of the evaluation, in tokens.
    """

    nats: float
    tokens: int
    nbytes: int | None
    window: int
    stride: int

    @property
    def nats_per_token(self) -> float:
        """Mean of -ln p."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinite where that overflows."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """nats / ln 2 / bytes, comparable between tokenizers and with compressors."""
        return None if self.nbytes is None else self.nats / math.log(2) / self.nbytes

    def __str__(self) -> str:
        bits = "" if self.nbytes is None else f", {self.bits_per_byte:.4f} bits per byte"
        return (
            f"perplexity {self.perplexity:.4f}, {self.nats_per_token:.4f} nats per token{bits} "
            f"({self.tokens:,} tokens, window {self.window}, stride {self.stride})"
        )


def perplexity(
    model: Decoder,
    tokens: bytes | Integer[np.ndarray | Array, "n"],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    counted: Bool[np.ndarray, "n"] | None = None,
    nbytes: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """Scores a text.

    Args:
      model: any decoder; its weights are prepared for the backend.
      tokens: ids of the text, [n], n >= 2, or bytes as ids of a byte-level model.
      window: predictions in a window, at most the model's max_positions; min(1024, that) when
        None.
      stride: tokens between windows, 1 <= stride <= window; half a window when None. The smaller,
        the more context each token has, and the more work.
      batch: windows scored at once; 1 on a CPU, where more is not faster, else 8, when None.
      counted: which tokens to score; all when None. The first never is.
      nbytes: bytes of text that the scored tokens stand for; gives bits per byte.
      progress: show a bar.
    Returns:
      the report.
    Raises:
      ConfigError: too few tokens, none to score, ids outside the vocabulary, options out of range.
      NumericalError: the model's logits are NaN.
    Source:
      strided evaluation as in the `transformers` guide on perplexity of fixed-length models.

    >>> from ffnlab.models import Decoder, DecoderConfig
    >>> config = DecoderConfig(256, 16, 32, layers=1, heads=2, kv_heads=1, head_dim=8)
    >>> model = Decoder(config, key=jax.random.key(0))
    >>> perplexity(model, b"some text", window=4, stride=2).tokens
    8
    """
    ids = np.frombuffer(tokens, np.uint8) if isinstance(tokens, bytes) else np.asarray(tokens)
    window, stride, batch = options(model, ids, window, stride, batch)
    windows = held_out_windows(ids, window, stride, "tokens", counted)
    if not windows.counted.any():
        raise ConfigError("counted leaves no token to score")
    prepared = weights.prepare(model)
    nats = 0.0
    for part in track(list(windows.batches(batch)), "perplexity", enabled=progress):
        found = np.asarray(nats_of(prepared, part.tokens), np.float64)
        nats += float(np.sum(found[part.counted]))
    if math.isnan(nats):
        raise NumericalError("the model's logits are NaN; check its weights")
    return Perplexity(nats, int(windows.counted.sum()), nbytes, window, stride)


def options(
    model: Decoder,
    ids: Integer[np.ndarray, "n"],
    window: int | None,
    stride: int | None,
    batch: int | None,
) -> tuple[int, int, int]:
    """(window, stride, batch), checked, with the defaults put in."""
    limit, vocab = model.config.max_positions, model.config.vocab
    window = min(WINDOW, limit) if window is None else window
    stride = max(window // 2, 1) if stride is None else stride
    batch = (1 if jax.default_backend() == "cpu" else 8) if batch is None else batch
    if not 1 <= window <= limit:
        raise ConfigError(f"window={window} must lie in 1..{limit}, the model's max_positions")
    if not 1 <= stride <= window:
        raise ConfigError(f"stride={stride} must lie in 1..{window}, the window")
    if batch < 1:
        raise ConfigError(f"batch={batch} must be at least 1")
    if len(ids) < 2:
        raise ConfigError(f"tokens has {len(ids)} entries; at least 2 are needed to score one")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        raise ConfigError(f"tokens holds ids {low}..{high}; the model has 0..{vocab - 1}")
    return window, stride, batch


@jax.jit
def nats_of(model: Decoder, tokens: Int[Array | np.ndarray, "b u"]) -> Float[Array, "b t"]:
    """-ln p of every token but the first of each row, [b, u] -> [b, u - 1]."""
    logits = model(tokens[:, :-1])
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
