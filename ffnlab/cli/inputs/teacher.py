"""A trained model whose answers to a run's images are learned too."""

import hashlib
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from ffnlab.data import Labelled
from ffnlab.errors import ConfigError, first_line
from ffnlab.formats import load
from ffnlab.losses import Taught
from ffnlab.models.calibration import called

__all__ = ["sha256_of", "taught", "teacher_of"]


def taught(batches: Callable[[int], Labelled], teacher: nnx.Module) -> Callable[[int], Taught]:
    """Batches with what a teacher says of them."""
    logits = jax.jit(called)

    def with_logits(position: int) -> Taught:
        x, y = batches(position)
        return Taught(x, y, np.asarray(logits(teacher, x), np.float32))

    return with_logits


def teacher_of(place: str, shape: tuple[int, ...], classes: int | None) -> nnx.Module:
    """Loads a teacher.

    Args:
      place: a model directory.
      shape: of one input.
      classes: of the student.
    Raises:
      ConfigError: it reads other inputs or has other classes.
      FormatError: there is no model.
    """
    model = load(place)
    example = jax.ShapeDtypeStruct((1, *shape), np.float32)
    try:
        found = jax.eval_shape(called, model, example)
    except (TypeError, ValueError) as error:
        said = f"teacher={place!r} does not take inputs of shape {list(shape)}"
        raise ConfigError(f"{said}: {first_line(error)}") from None
    if getattr(found, "shape", None) != (1, classes):
        raise ConfigError(f"teacher={place!r} gives {found}; the model has {classes} classes")
    return model


def sha256_of(model: nnx.Module) -> str:
    """A digest of a model's arrays, in their order."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(model):
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()
