"""The toys of `robust_qa_moe`: maps of clusters, and answers among words never seen in training."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ffnlab import transform
from ffnlab.layers import MoE, MoESpec
from ffnlab.layers.balance import counts, load_balance
from ffnlab.losses import Loss
from ffnlab.models import Encoder, EncoderConfig
from ffnlab.transform import Transform

__all__ = [
    "CLUSTERS",
    "WIDTH",
    "Regression",
    "balanced",
    "mixture",
    "regression_scores",
    "small_encoder",
    "span_draw",
    "token_f1",
]

WIDTH, CLUSTERS, HIDDEN = 16, 4, 32
# Span finding: what begins a row, an answer and a decoy, what ends both; then words by domain.
CLS, ASKED, DECOY, STOP, FIRST_WORD = 1, 2, 3, 4, 5
WORDS, DOMAINS, LENGTH, LONGEST = 24, 4, 24, 4


class Regression:
    """Four Gaussian clusters of width 16, in each y = tanh(x W) with a W of its own.

    Centres are drawn from N(0, I), points around them too, W from N(0, 1 / 16).
    """

    def __init__(self, seed: int):
        random = np.random.default_rng([seed, 0])
        self.centres = random.normal(size=(CLUSTERS, WIDTH))
        self.maps = random.normal(size=(CLUSTERS, WIDTH, WIDTH)) * WIDTH**-0.5

    def draw(self, random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and outputs, [n, 16] each."""
        which = random.integers(CLUSTERS, size=n)
        x = self.centres[which] + random.normal(size=(n, WIDTH))
        y = np.tanh(np.einsum("nd,nde->ne", x, self.maps[which]))
        return x.astype(np.float32), y.astype(np.float32)


def mixture(experts: int) -> Callable[[int], MoE]:
    """seed -> a Switch layer on rows of width 16; of one expert it is a dense FFN."""
    spec = MoESpec(experts, 1, HIDDEN, gated=False, normalize=False, router_bias=True)
    return lambda seed: MoE(WIDTH, spec, key=jax.random.key(seed), activation="relu", bias=True)


def balanced(coefficient: float | Array) -> Loss:
    """Mean squared error, and the load balance with a coefficient."""

    def loss(model: MoE, batch: PyTree) -> tuple[Float[Array, ""], dict[str, Array]]:
        error, uneven, share = regression_scores(model, batch)
        return error + coefficient * uneven, {"error": error, "balance": uneven, "share": share}

    return loss


def regression_scores(model: MoE, batch: PyTree) -> tuple[Array, Array, Array]:
    """(mean squared error, load balance, largest share of an expert) on rows."""
    x, y = batch
    found, routing = model(jnp.asarray(x)[None])
    share = counts(routing).max() / len(x)
    return jnp.mean((found[0] - y) ** 2), load_balance(routing), share


def small_encoder(head: Callable[..., Transform]) -> Callable[[int], Encoder]:
    """seed -> an encoder of two blocks of width 32 for the span toy, with a head."""
    config = EncoderConfig(
        vocab=FIRST_WORD + DOMAINS * WORDS,
        width=32,
        hidden=64,
        layers=2,
        heads=4,
        head_dim=8,
        max_positions=LENGTH,
        norm="before",
    )

    def make(seed: int) -> Encoder:
        bare = Encoder(config, key=jax.random.key(seed))
        return transform.apply(head(seed=seed), bare)[0]

    return make


def span_draw(
    random: np.random.Generator, n: int, domains: tuple[int, ...]
) -> tuple[dict[str, Any], Int[np.ndarray, "n 2"]]:
    """Rows of words with two phrases, `ASKED words STOP` and `DECOY words STOP`, in any order.

    The one to four words of the first are the answer. Which words are between a marker and STOP
    says nothing, and in a new domain none of them was ever seen.

    Args:
      random: of the draw.
      n: rows.
      domains: whose words are used, each row's of one of them.
    Returns:
      (inputs of an encoder, ends of the answers).
    """
    tokens, ends = np.zeros((n, LENGTH), np.int32), np.zeros((n, 2), np.int32)
    for row in range(n):
        first = FIRST_WORD + WORDS * int(random.choice(domains))
        text = [CLS]
        for marker in random.permutation([ASKED, DECOY]).tolist():
            before, within = random.integers(1, LONGEST + 1, size=2)
            text += [*(first + random.integers(WORDS, size=before)), marker]
            if marker == ASKED:
                ends[row] = len(text), len(text) + within - 1
            text += [*(first + random.integers(WORDS, size=within)), STOP]
        tokens[row] = [*text, *(first + random.integers(WORDS, size=LENGTH - len(text)))]
    return {"tokens": tokens}, ends


def token_f1(logits: Float[np.ndarray, "n t 2"], ends: Int[np.ndarray, "n 2"]) -> float:
    """Mean F1 of the places of the best span against those of the answer."""
    starts, lasts = np.moveaxis(np.asarray(logits, np.float64), -1, 0)
    sums = starts[:, :, None] + lasts[:, None, :]
    length = sums.shape[1]
    sums = np.where(np.tril(np.ones((length, length), bool), -1), -np.inf, sums)
    first, last = np.divmod(sums.reshape(len(sums), -1).argmax(1), length)
    shared = np.minimum(last, ends[:, 1]) - np.maximum(first, ends[:, 0]) + 1
    total = (last - first + 1) + (ends[:, 1] - ends[:, 0] + 1)
    return float(np.mean(2 * np.maximum(shared, 0) / total))
