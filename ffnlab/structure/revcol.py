"""Reversible columns: their loss, and what rounding does to gradients of rebuilt features
(RevCol: Reversible Column Networks, arXiv 2212.11696).

The model is `ffnlab.models.RevCol`, its layer `ffnlab.layers.Column`, and an optimizer for it ends
with `ffnlab.models.keep_invertible`. After a quarter, a half and three quarters of the columns a
head and a decoder keep both ends of what a column has to hold, the class and the image:

    loss = CE_last + sum_i f (1 - i / 3) BCE(decoded_i, image) + c (i + 1) / 4 CE_i,   i = 0, 1, 2

Official code: `compound_loss` of megvii-research/RevCol. Images are compared in [0, 1] as they come
to the model, cut to .01 … .99, of which the authors undo a normalization first.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.losses import Costs, InformedLoss, Moment, labelled
from ffnlab.models import ImageInput, RevCol
from ffnlab.models.revcol import Outputs
from ffnlab.models.vit_config import as_values

__all__ = ["costs", "gradient_error", "saving", "supervised", "with_alphas"]

LOW, HIGH = 0.01, 0.99  # of the pixels that are decoded


def supervised(*, image: float = 3.0, classes: float = 0.7) -> InformedLoss:
    """The loss of reversible columns, of all their scores and images.

    Blocks are skipped by the moment's key (`RevColConfig.drop`). Of a model without supervision it
    is the cross-entropy of its scores.

    Args:
      image: f, weight of the decoded images, >= 0 (3 of the authors' T, S and B).
      classes: c, weight of the classes on the way, >= 0 (0.7).
    Returns:
      the loss: (model, (images [b, h, w, c] in [0, 1] or bytes, classes [b]), moment) -> (nats [],
      {"accuracy": of the last scores, "classes": their cross-entropy []; with supervision "image":
      mean binary cross-entropy of pixels []}).
    Raises:
      ConfigError: a weight below 0; from the loss, a model that is no `RevCol`.

    >>> loss = supervised(image=1.0)
    """
    for name, weight in (("image", image), ("classes", classes)):
        if not weight >= 0:
            raise ConfigError(f"{name}={weight} must be 0 or more")

    def loss(model: Any, batch: tuple[Array, Array], moment: Moment) -> Costs:
        if not isinstance(model, RevCol):
            raise ConfigError(f"model is a {type(model).__name__}; a RevCol is accepted")
        return costs(model.outputs(batch[0], key=moment.key), batch, image, classes)

    return loss


def costs(
    outputs: Outputs, batch: tuple[Array, Array], image: float = 3.0, classes: float = 0.7
) -> Costs:
    """`supervised` of what a model gave for a batch."""
    images, wanted = batch
    scores, decoded = outputs
    total, metrics = labelled(lambda _: scores[-1], batch)
    metrics = {"classes": total, **metrics}
    if not decoded:
        return total, metrics
    pixels = jnp.clip(as_values(images, ImageInput()).astype(jnp.float32), LOW, HIGH)
    found = []
    for i, logits in enumerate(decoded):
        found.append(optax.sigmoid_binary_cross_entropy(logits, pixels).mean())
        nats = optax.softmax_cross_entropy_with_integer_labels(scores[i], wanted).mean()
        total += image * (1 - i / len(decoded)) * found[i]
        total += classes * (i + 1) / len(scores) * nats
    return total, metrics | {"image": jnp.stack(found).mean()}


def saving(model: RevCol, every: int, *, remat: str | None = None) -> RevCol:
    """The same model, which keeps the features of other columns in its backward pass.

    Args:
      every: `RevColConfig.save_every`; whatever its tolerance, none is asked for.
      remat: what columns keep where `every` is 0, see `ffnlab.models.remat`.
    Raises:
      ConfigError: every is below 0.
    """
    new = tree.copy(model)
    new.config, new.remat = dataclasses.replace(model.config, save_every=every), remat
    return new


@functools.partial(jax.jit, static_argnums=3)
def gradient(trained: PyTree, fixed: PyTree, batch: PyTree, loss: Callable) -> PyTree:
    """Of a loss, for what is trained."""
    return jax.grad(lambda trained: loss(tree.combine(trained, fixed), batch)[0])(trained)


def gradient_error(
    model: RevCol, batch: PyTree, loss: Callable[[Any, PyTree], tuple] = labelled
) -> float:
    """How far rebuilding puts a model's gradients off those of plain autodiff.

    Scales of columns (alphas) change as a model learns, and with them what rounding does; what the
    constructor checks is a drawn model.

    Args:
      model: as it stands, with its `save_every`.
      batch: of the loss.
      loss: (model, batch) -> (mean, metrics).
    Returns:
      |g - plain| / |plain|, norms over all parameters, in float64.
    """
    both = [gradient(*tree.trained(each), batch, loss) for each in (model, saving(model, 0))]
    ours, plain = (
        np.concatenate([np.ravel(leaf).astype(float) for leaf in jax.tree.leaves(each)])
        for each in both
    )
    return float(np.linalg.norm(ours - plain) / np.linalg.norm(plain))


def with_alphas(model: RevCol, value: float) -> RevCol:
    """The same model with all scales of columns at one value."""

    def filled(node: Any) -> Any:
        return node.replace(jnp.full_like(node.get_value(), value))

    return tree.map_at(model, tree.at("layers**.alphas[*]"), filled)
