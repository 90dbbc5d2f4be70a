"""Long paths teach short ones: self-distillation of a path ensemble (2023, arXiv 2308.06548).

    logits_m = head(norm(sum of w_j c_j over the paths through the first m layers))
    loss = CE(logits, y) + weight * sum over m of T^2 KL(q || p_m)
    q = softmax(sg[logits] / T),   p_m = softmax(logits_m / T)

sg: no gradient reaches the teacher, which is the whole ensemble of the same pass. Norm and head are
shared by all exits. The paper's weights and depths were not at hand; the defaults are ours.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError, is_known
from ffnlab.losses import Loss, check_distillation, distillation, labelled
from ffnlab.models.paths import check_ensemble, sizes_of
from ffnlab.pruning.paths.unroll import exits

__all__ = ["self_distilled"]


def self_distilled(
    depths: Sequence[int], *, weight: float | Array = 0.5, temperature: float | Array = 1.0
) -> Loss:
    """A loss of labelled inputs whose short paths also learn from the whole ensemble.

    Args:
      depths: layers that short paths go through, 1 to n - 1 each.
      weight: of the distillation, at least 0.
      temperature: T > 0; the paper's range is not known, 1 to 3 are usual.
    Returns:
      the loss: (a ViT, batch as `losses.labelled` takes it) -> (nats per input [], {"accuracy": of
      the whole [], "labels": cross-entropy of the whole [], "teacher": sum of the distillations [],
      "exit m": accuracy of each depth []}).
    Raises:
      ConfigError: no depths, one that is there twice or below 1, a weight below 0 or a temperature
        that is not positive; from the loss, a depth that is not below the model's, or a model whose
        stream is no sum of branches (post-norm).

    Source: arXiv 2308.06548, self-distillation.
    """
    depths = tuple(depths)
    if not depths or min(depths) < 1 or len(set(depths)) != len(depths):
        raise ConfigError(f"depths={depths}: numbers of layers from 1 on, each once, are accepted")
    if is_known(weight) and not weight >= 0:
        raise ConfigError(f"weight={weight} must be 0 or more")
    check_distillation(temperature, "batchmean")

    def loss(model: Any, batch: tuple) -> tuple[Float[Array, ""], dict[str, Array]]:
        inputs, classes = batch
        check_ensemble(model)
        layers, _ = sizes_of(model.layers)
        if max(depths) >= layers:
            raise ConfigError(f"depths={depths}: below the {layers} layers of the model")
        *short, whole = exits(model, inputs, (*depths, layers))
        nats, metrics = labelled(lambda _: whole, (inputs, classes))
        far = jax.vmap(lambda logits: distillation(logits, whole, temperature=temperature))
        told = jnp.sum(far(jnp.stack(short)))
        right = {
            f"exit {m}": labelled(lambda _, at=logits: at, (inputs, classes))[1]["accuracy"]
            for m, logits in zip(depths, short, strict=True)
        }
        return nats + weight * told, {**metrics, "labels": nats, "teacher": told, **right}

    return loss
