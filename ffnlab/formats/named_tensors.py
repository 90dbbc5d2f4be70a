"""Parameters of a model from a file of tensors that has other names for them.

A `Source` hands out each tensor once and says what is missing, of another shape or left over;
`filled` puts what was found at its paths.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ffnlab import tree
from ffnlab.errors import FormatError, first_line
from ffnlab.storage.files import StrPath
from ffnlab.weights import Dense

__all__ = ["Named", "Source", "filled", "matrix", "of_linear", "opened"]

Arrays = Mapping[str, np.ndarray]
Named = Iterator[tuple[str, np.ndarray | Dense]]
M = TypeVar("M")


class Source:
    """Arrays of a file, each taken once.

    Attributes:
      file: for messages.
      arrays: by name.
      taken: names that were asked for.
    """

    def __init__(self, file: StrPath, arrays: Arrays):
        self.file, self.arrays, self.taken = file, arrays, set()

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """An array of this name and shape.

        Raises:
          FormatError: there is none, or of another shape or dtype, or not finite.
        """
        if name not in self.arrays:
            raise FormatError(f"{self.file} has no tensor {name!r}")
        array = self.arrays[name]
        if array.shape != shape or array.dtype != np.float32:
            raise FormatError(
                f"{self.file}: {name} is {array.dtype}{list(array.shape)}, the model has "
                f"float32{list(shape)}"
            )
        if not np.isfinite(array).all():
            raise FormatError(f"{self.file}: {name} has NaN or infinity")
        self.taken.add(name)
        return array

    def check_all_taken(self, ignored: Sequence[str] = ()) -> None:
        """Raises FormatError where a tensor was not asked for."""
        if unknown := sorted(self.arrays.keys() - self.taken - set(ignored)):
            raise FormatError(f"{self.file}: {unknown[0]} is not part of the model")


def opened(file: StrPath) -> Source:
    """The tensors of a safetensors file.

    Raises:
      FormatError: no such file, or a damaged one.
    """
    try:
        return Source(file, load_file(file))
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{file} cannot be read: {first_line(error)}") from None


def filled(model: M, found: Named) -> M:
    """A model whose variables at some paths have the values of a file."""
    nodes = dict(tree.walk(model))
    new = {
        path: nodes[path].replace(value if isinstance(value, Dense) else jnp.asarray(value))
        for path, value in found
    }
    return tree.replace(model, new)


def matrix(stored: np.ndarray) -> Dense:
    """The weight [in, out] of what torch stores, [out, in]."""
    return Dense(jnp.asarray(stored.T))


def of_linear(source: Source, path: str, name: str, shape: tuple[int, ...]) -> Named:
    """(path, value) of a map [in, out]."""
    yield f"{path}.w", matrix(source.take(f"{name}.weight", shape[::-1]))
    yield f"{path}.b", source.take(f"{name}.bias", shape[1:])
