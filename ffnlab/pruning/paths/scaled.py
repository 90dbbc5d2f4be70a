"""EnsembleScale: weights for the paths of a network, which are then trained with it.

Revisiting Vision Transformer from the View of Path Ensemble (2023, arXiv 2308.06548). The head
reads e = sum of w_j * c_j, w_j a vector of the model's width for each path, 1 at first, so that the
function is the same until training changes it. One number for each path is the ablation. Unlike
LayerScale the weights do not change what later layers read.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ffnlab.errors import ConfigError
from ffnlab.layers import EnsembleScale
from ffnlab.models.paths import check_ensemble, sizes_of, with_ensemble
from ffnlab.pruning.paths.unroll import Paths
from ffnlab.transform import Transform

__all__ = ["ensemble_scale"]

KINDS = ("vector", "scalar")


def ensemble_scale(
    *, kind: str = "vector", drop: tuple[int, ...] = ()
) -> Transform[Any, tuple[()]]:
    """The transform that gives every path of a model a weight of 1, to be trained.

    Args:
      kind: "vector": a weight for each channel of each path; "scalar": one for each path.
      drop: paths that the head does not read at all, 0 for the beginning of the stream, j for unit
        j - 1 (`ffnlab.models.units`).
    Returns:
      a transform of a ViT or a Decoder that observes nothing. A mask that the model has is kept.
    Raises:
      ConfigError: another kind; from the transform, another model, one whose stream is no sum of
        branches (post-norm), one that has such weights, or paths that are not there.

    Source: arXiv 2308.06548, EnsembleScale.

    >>> from ffnlab import transform
    >>> from ffnlab.testing import tiny
    >>> transform.apply(ensemble_scale(kind="scalar"), tiny())[0].ensemble.scale.shape
    (7,)
    """
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r} is not one of {KINDS}")

    def init(model: Any) -> tuple[()]:
        check_ensemble(model)
        paths = paths_of(model)
        if model.ensemble is not None and model.ensemble.scale is not None:
            raise ConfigError("ensemble_scale: the model has weights of its paths already")
        if any(not 0 <= j < paths for j in drop) or len(set(drop)) >= paths:
            raise ConfigError(f"drop={drop}: some of the paths 0 to {paths - 1}, not all")
        return ()

    def rewrite(model: Any, stats: tuple[()]) -> Paths:
        init(model)
        paths, old = paths_of(model), model.ensemble
        kept = np.ones(paths) if old is None else np.array(old.kept[...])
        kept[list(drop)] = 0
        shape = (paths, model.config.width) if kind == "vector" else (paths,)
        return with_ensemble(model, EnsembleScale(kept, jnp.ones(shape)))

    return Transform("ensemble_scale", init, None, rewrite)


def paths_of(model: Paths) -> int:
    """How many paths a model has."""
    layers, slots = sizes_of(model.layers)
    return layers * slots + 1
