"""Changes of single matrices as a tree: applied to a model, taken back, kept in a file.

A tree of deltas maps the path of a linear map in the list form of a model ("layers[3].ffn.down")
to what is added to its matrix, [in, out] float32. A matrix in another format than `Dense`
(quantized, factored) becomes a dense one where it is changed, and stays what it was elsewhere.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ffnlab import tree
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats import safetensors
from ffnlab.formats.untrusted import quoted
from ffnlab.layers import Linear
from ffnlab.models.stack import in_list, unstack
from ffnlab.storage.files import StrPath
from ffnlab.weights import Dense

__all__ = [
    "Deltas",
    "converted",
    "load_deltas",
    "originals",
    "save_deltas",
    "with_deltas",
    "without_deltas",
]

M = TypeVar("M")
Deltas = Mapping[str, Float[Array | np.ndarray, "h d"]]


def with_deltas(model: M, deltas: Deltas) -> M:
    """The model with deltas added to its matrices; all other leaves are the same.

    Args:
      model: its layers in a list or stacked; the result is in the same form.
      deltas: see the module.
    Raises:
      ConfigError: the model has no such map, or one of another size.
    """
    check(model, deltas)

    def change(model: M) -> M:
        new = {path: added(node, deltas[path]) for path, node in maps(model, deltas).items()}
        return tree.replace(model, new)

    return in_list(model, change)


def without_deltas(model: M, deltas: Deltas, originals: Mapping[str, Linear] | None = None) -> M:
    """The model without deltas that were added to it.

    Args:
      model: what `with_deltas` made, in either form.
      deltas: that were added.
      originals: what stood there before (`originals`), which is put back bit for bit; without them
        the deltas are subtracted, to rounding, and what was converted stays dense.
    Raises:
      ConfigError: as `with_deltas`, or a map was changed since: it is not the original and its
        delta.
    """
    if originals is None:
        return with_deltas(model, {path: -np.asarray(delta) for path, delta in deltas.items()})
    check(model, deltas)
    now = maps(unstack(model), deltas)
    missing = sorted(set(deltas) - set(originals))
    if missing:
        raise ConfigError(f"originals lack {missing[:3]}, which the deltas change")
    changed = [path for path in deltas if not same(now[path], added(originals[path], deltas[path]))]
    if changed:
        raise ConfigError(
            f"{changed[0]} is not its original and the delta any more; take back later changes "
            "first, or leave the originals out to subtract the deltas"
        )
    return in_list(model, lambda m: tree.replace(m, {path: originals[path] for path in deltas}))


def originals(model: object, paths: Iterable[str]) -> dict[str, Linear]:
    """The linear maps at some paths, to be put back by `without_deltas`.

    Raises:
      ConfigError: the model has no such map.
    """
    return dict(maps(unstack(model), list(paths)))


def converted(model: object, paths: Iterable[str]) -> list[str]:
    """Which of the maps would become dense when changed, with the format that they are in.

    >>> from ffnlab.testing import tiny
    >>> converted(tiny(), ["layers[0].ffn.down"])
    []
    """
    found = maps(unstack(model), list(paths)).items()
    kinds = {path: node.weight for path, node in found}
    return [
        f"{path} ({type(weight).__name__})"
        for path, weight in kinds.items()
        if not isinstance(weight, Dense)
    ]


def save_deltas(path: StrPath, deltas: Deltas) -> None:
    """Writes deltas as one safetensors file, a tensor by its path each."""
    arrays = {name: np.asarray(delta, np.float32) for name, delta in deltas.items()}
    safetensors.write_file(
        Path(path), {name: safetensors.entry(array) for name, array in arrays.items()}
    )


def load_deltas(path: StrPath, model: object) -> dict[str, Float[np.ndarray, "h d"]]:
    """Reads what `save_deltas` wrote, for a model that it fits.

    Raises:
      FormatError: no such file, a damaged one, or numbers that are not finite.
      ConfigError: the model has no such map, or one of another size.
    """
    file = safetensors.open_file(Path(path))
    for name, info in file.tensors.items():
        if info.dtype != np.float32 or len(info.shape) != 2:
            raise FormatError(f"{path}: {quoted(name)} is no float32 matrix")
    check_shapes(model, {name: info.shape for name, info in file.tensors.items()})
    found = {name: file.read(name) for name in file.tensors}
    bad = [name for name, delta in found.items() if not np.isfinite(delta).all()]
    if bad:
        raise FormatError(f"{path}: {quoted(bad[0])} has NaN or infinity")
    return found


def check(model: object, deltas: Deltas) -> None:
    """Raises ConfigError unless a model has a map of the right size for each delta."""
    check_shapes(model, {path: tuple(delta.shape) for path, delta in deltas.items()})


def check_shapes(model: object, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ConfigError unless a model has maps of these sizes."""
    for path, node in maps(unstack(model), list(shapes)).items():
        if tuple(node.weight.shape) != shapes[path]:
            raise ConfigError(
                f"the delta of {path} is {shapes[path]}; the matrix there is {node.weight.shape}"
            )


def maps(model: object, paths: Iterable[str]) -> dict[str, Linear]:
    """The linear maps at some paths of a model in its list form."""
    paths = list(paths)
    there = {path: node for path, node in tree.walk(model) if isinstance(node, Linear)}
    strange = [path for path in paths if path not in there]
    if strange:
        near = [path for path in there if path.endswith("ffn.down")][:3]
        raise ConfigError(
            f"deltas are for {quoted(strange[0])}, which is no linear map of this model; among "
            f"others there are {near}"
        )
    return {path: there[path] for path in paths}


def added(linear: Linear, delta: Float[Array | np.ndarray, "h d"]) -> Linear:
    """A linear map with a delta in its matrix, which is dense then."""
    weight = linear.weight
    dtype = weight.dtype
    total = weight.dense().astype(jnp.float32) + jnp.asarray(delta, jnp.float32)
    return linear.replace(Dense(total.astype(dtype), getattr(weight, "act", None)))


def same(a: Linear, b: Linear) -> bool:
    """Whether two maps have the same dense matrix, bit for bit."""
    if not (isinstance(a.weight, Dense) and isinstance(b.weight, Dense)):
        return False
    return bool(np.array_equal(np.asarray(a.weight.dense()), np.asarray(b.weight.dense())))
