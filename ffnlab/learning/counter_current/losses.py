"""What the two networks of counter-current learning (arXiv 2409.19841) are to agree on.

`PairLoss` is classification: B reads classes, layers are compared through products with class
codes, and the scores are trained by cross-entropy. `MapLoss` is the autoencoder: B reads the image
that F is to give, which is F's input, and matching feature maps are pulled together.

Each has five parts, all that the rule asks of it: `check` looks at a batch before anything else,
`targets` splits it into x and y, `read` is what B starts from, `losses` are those of all layers,
`measures` the metrics beside them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int, PyTree

from ffnlab.errors import ConfigError, is_known
from ffnlab.learning.labels import check_labels

__all__ = ["Agreement", "MapLoss", "PairLoss"]

REFERENCE_WIDTH = 256  # the width at which the authors' dot-product loss has weight `scale`
CONFIDENT = 0.1


@runtime_checkable
class Agreement(Protocol):
    """What the rule asks of a loss; `PairLoss` and `MapLoss` are two."""

    def check(self, batch: PyTree, outputs: int) -> None:
        """Raises ValueError for a batch that a network of so many outputs cannot learn from."""
        ...

    def targets(self, batch: PyTree) -> tuple[PyTree, PyTree]:
        """(x, y) of a batch, y what the network is to give."""
        ...

    def read(self, output: Array, y: Array) -> Array:
        """What B reads, where F gives `output`."""
        ...

    def losses(self, a: Sequence[Array], c: Sequence[Array], y: Array) -> list[Array]:
        """The losses of all layers, input first, from the L + 1 activations of F and of B."""
        ...

    def measures(self, output: Array, y: Array) -> dict[str, Array]:
        """Metrics of F's output."""
        ...


@dataclasses.dataclass(frozen=True)
class PairLoss:
    """How the activations of a layer are compared with its class codes.

    With A [n, d] of the batch, C [C, d] of the classes and Y the one-hot classes of the batch:

        "dot":     256 / d * scale * mean (A C' - Y)^2                             (MLPs)
        "cosine":  scale * mean (A C' - Y)^2 + contrast * [mean (A A' - I)^2 + mean (C C' - I)^2],
                   rows of A and C divided by their norms                          (conv networks)

    Attributes:
      kind: "dot" or "cosine".
      scale: > 0; the authors take .5 for "dot" and 1 for "cosine".
      contrast: of "cosine", >= 0.
      skip_confident: leave out inputs whose class has a probability above .9 already.
      rows: what B reads: "classes", each class once, or "batch", the class of each input; then Y
        tells which inputs share a class.
    """

    kind: str = "dot"
    scale: float | Array = 0.5
    contrast: float | Array = 0.5
    skip_confident: bool = False
    rows: str = "classes"

    def __post_init__(self) -> None:
        for name, accepted in (("kind", ("dot", "cosine")), ("rows", ("classes", "batch"))):
            if getattr(self, name) not in accepted:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {accepted}")
        check_terms(self.scale, self.contrast)

    def __call__(
        self, a: Float[Array, "n *d"], c: Float[Array, "m *e"], same: Float[Array, "n m"]
    ) -> Float[Array, ""]:
        """The loss of one pair.

        Args:
          a: activations of the batch.
          c: class codes, in the shape of an activation.
          same: 1 where input and code are of one class, else 0.
        Raises:
          ValueError: an activation and a code have other shapes.
        """
        if a.shape[1:] != c.shape[1:]:
            shapes = f"{a.shape[1:]} meet codes of shape {c.shape[1:]}"
            raise ValueError(f"activations of shape {shapes}; the mirror must fit the network")
        a, c = a.reshape(len(a), -1), c.reshape(len(c), -1)
        if self.kind == "dot":
            return REFERENCE_WIDTH / a.shape[1] * self.scale * squared(a @ c.T, same)
        a, c = unit_rows(a), unit_rows(c)
        apart = squared(a @ a.T, jnp.eye(len(a))) + squared(c @ c.T, jnp.eye(len(c)))
        return self.scale * squared(a @ c.T, same) + self.contrast * apart

    def check(self, batch: PyTree, outputs: int) -> None:
        """Raises ValueError where y has classes outside [0, outputs)."""
        check_labels(batch[1], outputs)

    def targets(self, batch: PyTree) -> tuple[PyTree, PyTree]:
        """The batch, (x, y)."""
        x, y = batch
        return x, y

    def read(self, output: Float[Array, "n c"], y: Int[Array, "n"]) -> Float[Array, "m c"]:
        """One-hot classes: each once, or those of the batch."""
        if self.rows == "batch":
            return jax.nn.one_hot(y, output.shape[1], dtype=output.dtype)
        return jnp.eye(output.shape[1], dtype=output.dtype)

    def losses(
        self, a: Sequence[Array], c: Sequence[Array], y: Int[Array, "n"]
    ) -> list[Float[Array, ""]]:
        """The pairs below the scores, then the cross-entropy of the scores a[-1]."""
        scores = a[-1]
        labels = jax.nn.one_hot(y, scores.shape[1], dtype=scores.dtype)
        same, used = labels @ c[-1].T, jnp.ones(len(y), scores.dtype)
        if self.skip_confident:
            sure = jnp.sum(stop_gradient(jax.nn.softmax(scores)) * labels, axis=1)
            used = (sure <= 1 - CONFIDENT).astype(scores.dtype)
        pairs = [
            self(low * used.reshape(-1, *[1] * (low.ndim - 1)), code, same)
            for low, code in zip(a[:-1], c[:-1], strict=True)
        ]
        return [*pairs, optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()]

    def measures(self, output: Float[Array, "n c"], y: Int[Array, "n"]) -> dict[str, Array]:
        """{"accuracy"}: the fraction of inputs whose class has the largest score."""
        return {"accuracy": jnp.mean(output.argmax(-1) == y)}


@dataclasses.dataclass(frozen=True)
class MapLoss:
    """How an autoencoder's maps are compared with those of the network that reads its target.

    A batch is x alone, images [n, h, w, c] or rows [n, d]; F maps it to its own shape, and B reads
    it at F's output. With A, C of one layer:

        ends, l = 0 and L:  scale * mean (A - C)^2
        between them:       scale * mean (A' - C')^2 + contrast * [mean (A" A"' - I)^2 + same of C]

    where A' has mean 0 and variance 1 over the batch in every channel, and A" [n, d] is A' with
    every row divided by its norm.

    The authors compare A and C themselves, between layers with batch normalization. Without it two
    networks that follow each other agree on a constant, whatever the input. Here maps are
    normalized where they are compared, which keeps the way forward free of statistics, and inputs
    are kept apart by the contrast that the authors take for classes.

    Attributes:
      scale: > 0.
      contrast: >= 0; of digits, 1 served rows best and .1 images.
    """

    scale: float | Array = 1.0
    contrast: float | Array = 1.0

    def __post_init__(self) -> None:
        check_terms(self.scale, self.contrast)

    def __call__(
        self, a: Float[Array, "n *d"], c: Float[Array, "m *e"], *, is_end: bool
    ) -> Float[Array, ""]:
        """The loss of one pair.

        Args:
          a: activations of F.
          c: those of B that meet them, of the same shape.
          is_end: whether they are an input or an output, which are compared as they are.
        Raises:
          ValueError: other shapes.
        """
        if a.shape != c.shape:
            shapes = f"{a.shape} meet those of shape {c.shape}"
            raise ValueError(f"activations of shape {shapes}; the mirror must fit the network")
        if is_end:
            return self.scale * squared(a, c)
        a, c = standardized(a), standardized(c)
        rows = (unit_rows(z.reshape(len(z), -1)) for z in (a, c))
        apart = sum(squared(z @ z.T, jnp.eye(len(z))) for z in rows)
        return self.scale * squared(a, c) + self.contrast * apart

    def check(self, batch: PyTree, outputs: int) -> None:
        """Raises ValueError where the batch is no array of floats [n, d] or [n, h, w, c]."""
        shape, dtype = getattr(batch, "shape", None), getattr(batch, "dtype", None)
        if shape is None or len(shape) not in (2, 4) or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"batch is {type(batch).__name__} of shape {shape} and dtype {dtype}; an "
                "autoencoder takes its inputs alone, floats [n, d] or [n, h, w, c]"
            )

    def targets(self, batch: PyTree) -> tuple[PyTree, PyTree]:
        """(x, x): what goes in is to come out."""
        return batch, batch

    def read(self, output: Float[Array, "n *d"], y: Float[Array, "m *e"]) -> Float[Array, "m *e"]:
        """The target."""
        return y

    def losses(
        self, a: Sequence[Array], c: Sequence[Array], y: Float[Array, "n *d"]
    ) -> list[Float[Array, ""]]:
        """All pairs; the last compares F's output with the target."""
        ends = (0, len(a) - 1)
        pairs = enumerate(zip(a, c, strict=True))
        return [self(up, down, is_end=i in ends) for i, (up, down) in pairs]

    def measures(self, output: Float[Array, "n *d"], y: Float[Array, "n *d"]) -> dict[str, Array]:
        """{"error"}: the mean squared error of the output."""
        return {"error": squared(output, y)}


def check_terms(scale: float | Array, contrast: float | Array) -> None:
    """Raises ConfigError for weights of a loss's terms that are known and out of range."""
    if is_known(scale, contrast) and (not scale > 0 or not contrast >= 0):
        raise ConfigError(f"scale={scale} must be positive and contrast={contrast} not negative")


def squared(a: Array, b: Array) -> Float[Array, ""]:
    """The mean squared difference."""
    return jnp.mean(jnp.square(a - b))


def unit_rows(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Rows divided by their norm, zero rows left zero."""
    square = jnp.sum(x * x, axis=1, keepdims=True)
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0)) * (square > 0)  # a gradient at zero too
    return x / (norm + 1e-8)


def standardized(x: Float[Array, "n *d"]) -> Float[Array, "n *d"]:
    """Every channel less its mean, divided by its standard deviation; constant ones zero."""
    axes = tuple(range(x.ndim - 1))
    x = x - x.mean(axes, keepdims=True)
    return x / jnp.sqrt(jnp.mean(x * x, axes, keepdims=True) + 1e-5)
