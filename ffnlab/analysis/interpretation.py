"""What a model's answers are made of: votes of the input's parts, and of its constants.

Every input of the batches is interpreted (`ffnlab.analysis.linear_interpreter`): the output named
by the largest logit is F x + r at x, a sum of parts that places of the input vote and of what
biases and frozen decisions give.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ffnlab.analysis.linear_interpreter import MODES, interpret
from ffnlab.analysis.linear_queries import votes
from ffnlab.analysis.parts import taken_apart
from ffnlab.errors import ConfigError, at_least
from ffnlab.models import Decoder
from ffnlab.probe import Probe, rows
from ffnlab.report import Report

__all__ = ["Interpretation", "InterpretationReport", "after_embedding", "interpretation"]


@dataclasses.dataclass(frozen=True)
class Interpretation:
    """An input, and what it was answered.

    Attributes:
      named: the output with the largest logit.
      logit: that one.
      residual: the constant's part of it.
      share: |residual| / (|residual| + |sum of the votes|).
      votes: parts of places: pixels, tokens or numbers.
    """

    named: int
    logit: float
    residual: float
    share: float
    votes: Float[np.ndarray, "*places"]


@dataclasses.dataclass(frozen=True)
class InterpretationReport(Report):
    """Inputs one by one, and all of them.

    Attributes:
      inputs: the first ones.
      share: mean over all inputs of the constant's share.
      error: largest difference of F x + r and the logits, of their largest.
      count: inputs that were looked at.
    """

    inputs: tuple[Interpretation, ...]
    share: float
    error: float
    count: int

    def rows(self) -> list[dict[str, Any]]:
        """A row for each of the first inputs."""
        return [
            {"input": i, "named": each.named, "logit": each.logit}
            | {"constant": each.residual, "its share": each.share}
            | {"most votes": str(tuple(map(int, place_of(each.votes)))).replace(",)", ")")}
            for i, each in enumerate(self.inputs)
        ]

    def figures(self) -> dict[str, float]:
        """Of all inputs."""
        return {"share": self.share, "error": self.error}

    def draw(self, figure: Any) -> None:
        """Votes for and against what was named, a picture for each of the first inputs."""
        shown = self.inputs[:8]
        figure.set_size_inches(2 * len(shown), 2.4)
        for axes, each in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            picture = each.votes if each.votes.ndim == 2 else each.votes.reshape(1, -1)
            most = max(float(np.abs(picture).max()), 1e-30)
            axes.imshow(picture, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
            axes.set_title(f"{each.named}: {each.logit:.2f}", fontsize=8)
            axes.set_xticks([])
            axes.set_yticks([])


def place_of(values: np.ndarray) -> tuple[Any, ...]:
    """Where the largest is."""
    return np.unravel_index(int(values.argmax()), values.shape)


def after_embedding(model: Decoder) -> Callable[[Array], Array]:
    """Embeddings [t, d] -> logits of the last place: what of a language model is interpreted."""
    return lambda h: model.logits(model.hidden(embeddings=h[None])[:, -1:])[0, 0]


def interpretation(*, mode: str = "secant", inputs: int = 16) -> Probe:
    """A probe of what answers are made of, over batches of inputs (or inputs and classes).

    Of a decoder inputs are tokens, and the answer is the one after the last of a row; of other
    models they are numeric, and an output is a row of logits.

    Args:
      mode: of nonlinearities, see `interpret`.
      inputs: how many are told one by one; all are in the figures.
    Returns:
      a probe; its report is an `InterpretationReport`.
    Raises:
      ConfigError: another mode, inputs below 1; from the probe, what `interpret` refuses, outputs
        that are no row of logits.
    """
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r} is not one of {MODES}")
    at_least(1, inputs=inputs)

    def measure(model: PyTree, batch: PyTree) -> dict[str, Array]:
        model = taken_apart(model)
        x = jnp.asarray(batch[0] if isinstance(batch, tuple) else batch)
        if isinstance(model, Decoder):
            fn, x = after_embedding(model), model.embed_tokens(x)
        elif not jnp.issubdtype(x.dtype, jnp.floating):
            raise ConfigError(
                f"inputs are {x.dtype}; floating ones are accepted, tokens of a decoder"
            )
        else:
            fn = lambda row: model(row[None])[0]  # noqa: E731
        out = jax.eval_shape(fn, x[0])
        if len(out.shape) != 1:
            raise ConfigError(f"an output is {list(out.shape)}; a row of logits is accepted")
        return jax.lax.map(lambda row: told(fn, row, mode), x)

    def report(model: PyTree, found: dict[str, np.ndarray]) -> InterpretationReport:
        del model
        first = tuple(
            Interpretation(
                int(found["named"][i]),
                float(found["logit"][i]),
                float(found["residual"][i]),
                float(found["share"][i]),
                found["votes"][i],
            )
            for i in range(min(inputs, len(found["named"])))
        )
        error = float(found["error"].max())
        return InterpretationReport(first, float(found["share"].mean()), error, len(found["share"]))

    return rows("interpretation", measure, report)


def told(fn: Callable[[Array], Array], x: Float[Array, "*in"], mode: str) -> dict[str, Array]:
    """What one input's answer is made of."""
    at, logits = interpret(fn, x, mode=mode), fn(x)
    named = logits.argmax()
    found = votes(at, named)
    largest = jnp.abs(logits).max()
    error = jnp.abs(at.matvec(x) + at.residual - logits).max() / jnp.where(largest > 0, largest, 1)
    return {
        "named": named,
        "logit": logits[named],
        "residual": found.residual,
        "share": found.share,
        "error": error,
        "votes": found.of.sum(-1) if x.ndim > 1 else found.of,
    }
