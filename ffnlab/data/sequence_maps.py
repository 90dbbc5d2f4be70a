"""Maps between sequences of numbers, by name and from files, for regression."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ffnlab.errors import ConfigError, FormatError, at_least, check_seed, first_line

__all__ = ["SEQUENCE_MAPS", "SequencePairs", "drawn_pairs", "read_pairs"]

Rows = Float[np.ndarray, "b n d"]


class SequencePairs(NamedTuple):
    """Sequences, and what they are mapped to.

    Attributes:
      x: [b, n, inputs] float32.
      y: [b, n, outputs] float32.
    """

    x: np.ndarray
    y: np.ndarray


def waves(x: Rows) -> Float[np.ndarray, "b n 1"]:
    """sin(3 x_i) x_(i+1), and |x_n - x_1| of the last place: every place hangs on another."""
    a = x[..., 0]
    apart = np.abs(a[:, -1:] - a[:, :1])
    return np.concatenate([np.sin(3 * a[:, :-1]) * a[:, 1:], apart], 1)[..., None]


def first(x: Rows) -> Float[np.ndarray, "b n 1"]:
    """x_1 of the first place and 0 of the others: a map that is not equivariant."""
    found = np.zeros((*x.shape[:2], 1), x.dtype)
    found[:, 0, 0] = x[:, 0, 0]
    return found


SEQUENCE_MAPS: Mapping[str, Callable[[Rows], np.ndarray]] = MappingProxyType(
    {"waves": waves, "first": first}
)


def drawn_pairs(
    name: str,
    count: int,
    length: int,
    inputs: int = 1,
    *,
    low: float = -1.0,
    high: float = 1.0,
    seed: int = 0,
) -> SequencePairs:
    """Uniform draws in a box and what a map by name gives of them.

    Raises:
      ConfigError: another name, a size below 1, fewer than two places, an empty or endless box,
        or a seed out of range.
    """
    check_seed(seed)
    at_least(1, count=count, inputs=inputs)
    at_least(2, length=length)
    if name not in SEQUENCE_MAPS:
        raise ConfigError(f"unknown map {name!r}; there are: {', '.join(SEQUENCE_MAPS)}")
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"low={low} must lie below high={high}, and both be finite")
    x = np.random.default_rng(seed).uniform(low, high, (count, length, inputs))
    return SequencePairs(x.astype(np.float32), SEQUENCE_MAPS[name](x).astype(np.float32))


def read_pairs(path: str | Path) -> SequencePairs:
    """The tensors "x" [b, n, inputs] and "y" [b, n, outputs] of a safetensors file, as float32.

    Raises:
      FormatError: no such file, a damaged one, or tensors of other names, shapes or numbers.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path} cannot be read: {first_line(error)}") from None
    if missing := {"x", "y"} - found.keys():
        raise FormatError(f"{path} has no tensor {sorted(missing)}; it has {sorted(found)}")
    x, y = found["x"], found["y"]
    if x.ndim != 3 or y.ndim != 3 or x.shape[:2] != y.shape[:2] or not min(*x.shape, *y.shape):
        raise FormatError(
            f"{path}: x {list(x.shape)} and y {list(y.shape)} must be [b, n, numbers]"
        )
    pairs = SequencePairs(x.astype(np.float32), y.astype(np.float32))
    for name, part in pairs._asdict().items():
        if not np.isfinite(part).all():
            raise FormatError(f"{path}: {name} has NaN or infinity")
    return pairs
