"""ScaleLong: Towards More Stable Training of Diffusion Model via Scaling Network Long Skip
Connection (2023, arXiv 2310.13545).

Long skips that are added or joined as they are let hidden states and gradients grow with the depth
of a U-shaped network. Factors that fall geometrically towards the middle, or small gates, keep them
in bounds (`ffnlab.layers.long_skips`, whose `scale_skips` is for the skips of any network).

The map that joins a skip to the stream could undo any factor: what changes is where training
begins and how it goes, so that a model is trained with the scaling that it is run with.
"""

import dataclasses
from typing import Any

import jax

from ffnlab import tree
from ffnlab.errors import check_seed
from ffnlab.layers import scale_skips
from ffnlab.models import UViT
from ffnlab.models.rewriting import rewriting
from ffnlab.models.uvit import make_scaling
from ffnlab.transform import Transform

__all__ = ["scale_skips", "scalelong"]


def scalelong(
    *, method: str = "constant", kappa: float = 0.5, seed: int = 0
) -> Transform[Any, tuple[()]]:
    """The transform that scales the long skips of a U-ViT otherwise.

    Args:
      method: "original", "root", "constant", "learned" or "apart".
      kappa: of "constant", in (0, 1]; the paper suggests .5 to .95.
      seed: of gates that are learned.
    Returns:
      a Transform that observes nothing; the model's configuration says what it has then. The
      function changes: train it.
    Raises:
      ConfigError: another method or a kappa out of range; from the transform, what is no U-ViT, or
        one of fewer than 16 tokens where gates are learned.
    Source:
      arXiv 2310.13545; `libs/uvit.py` of its code, whose `scalelong` 0 to 4 are the methods.

    >>> scalelong(kappa=0.7).name
    'scalelong'
    """
    check_seed(seed)
    scale_skips(method, kappa=kappa, sizes=(16,), key=jax.random.key(seed))  # to say what is wrong

    def problems(model: Any) -> list[str]:
        if isinstance(model, UViT):
            return []
        return [f"model is a {type(model).__name__}; a UViT is accepted"]

    def change(model: UViT) -> UViT:
        new = tree.copy(model)
        new.config = dataclasses.replace(model.config, scaling=method, kappa=kappa)
        new.scaling = make_scaling(new.config, jax.random.key(seed), model.patches.weight.dtype)
        return new

    return rewriting("scalelong", problems, change)
