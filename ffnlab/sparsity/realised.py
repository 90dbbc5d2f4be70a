"""How sparse a model's activations really are, measured on given tokens."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ffnlab import models, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import Linear, SparseGatedFFN
from ffnlab.models.calibration import Given, Layered, given
from ffnlab.weights import SparseInput

__all__ = ["Realised", "realised_sparsity"]


@dataclasses.dataclass(frozen=True)
class Realised:
    """Fraction of zeros by layer path: of an FFN's gated channels, of a projection's inputs.

    Attributes:
      zeros: path -> fraction in [0, 1].
      tokens: how many tokens were looked at.
    """

    zeros: dict[str, float]
    tokens: int

    @property
    def ffn(self) -> float:
        """Mean over the FFNs; NaN when there is none."""
        found = [value for path, value in self.zeros.items() if path.endswith("ffn")]
        return float(np.mean(found)) if found else float("nan")

    def __str__(self) -> str:
        rows = [f"{path:24} {value:7.2%} zero" for path, value in self.zeros.items()]
        return "\n".join([*rows, f"over {self.tokens} tokens"])


def realised_sparsity(model: Layered, batches: Iterable[Any]) -> Realised:
    """Runs a sparsified model and counts the zeros that its thresholds make.

    Args:
      model: with `SparseGatedFFN`s or `SparseInput` weights, stacked or not.
      batches: what the model takes, tokens [b, t] for example, of equal shape.
    Raises:
      SelectionError: nothing in the model is sparse.
      ConfigError: no batch.
    """
    held = (given(batch, model) for batch in batches)
    counts = [(jax.device_get(fractions(model, b)), math.prod(b.first.shape[:2])) for b in held]
    if not counts:
        raise ConfigError("batches is empty: no token to measure sparsity on")
    tokens = sum(size for _, size in counts)
    paths = counts[0][0]
    return Realised({p: float(sum(f[p] * s for f, s in counts) / tokens) for p in paths}, tokens)


def is_sparse(_: str, node: object) -> bool:
    """Whether a node of a model drops activations."""
    gated = isinstance(node, SparseGatedFFN)
    return gated or (isinstance(node, Linear) and isinstance(node.weight, SparseInput))


@jax.jit
def fractions(model: Layered, batch: Given) -> dict[str, Array]:
    """Fraction of zeros at each sparse part of a model, by path."""
    model = models.unstack(model)
    parts = tree.select(model, tree.where(is_sparse))
    _, seen = tree.capture(
        model, tree.where(lambda path, _: path in parts), *batch.args, **batch.options
    )

    def zeros(path: str, node: SparseGatedFFN | Linear) -> Array:
        x = seen[path].input[0]
        gated = isinstance(node, SparseGatedFFN)
        kept = node.activate(x) if gated else node.weight.sparsify(x)
        return jnp.mean(kept == 0, dtype=jnp.float32)

    return {path: zeros(path, node) for path, node in parts.items()}
