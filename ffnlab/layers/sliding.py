"""Windows that slide over the dimensions of a grid: what convolution and pooling have in common."""

import operator
from collections.abc import Sequence

from ffnlab.errors import ConfigError

__all__ = ["Padding", "pads", "per_dimension"]

Padding = str | int | Sequence[int | Sequence[int]]
NAMES = ("SAME", "VALID", "causal")


def per_dimension(name: str, value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """A setting of every dimension, from one of all or one of each.

    Raises:
      ConfigError: another number of them, or one below 1; `name` is the argument's.
    """
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims or not all(is_size(v, 1) for v in values):
        raise ConfigError(f"{name}={value!r} must be one positive integer, or {dims} of them")
    return values


def is_size(value: object, least: int) -> bool:
    """Whether a value is an integer, not a bool, and not below `least`."""
    try:
        return not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        return False


def named_padding(padding: Padding, dims: int) -> str | tuple[tuple[int, int], ...]:
    """A padding as its name, or as (before, after) of every dimension.

    Raises:
      ConfigError: an unknown name, another number of dimensions, or a negative amount.
    """
    if padding in NAMES:
        return padding
    each = (padding,) * dims if isinstance(padding, int) else padding
    if not isinstance(each, str) and len(each) == dims:
        pairs = tuple((p, p) if isinstance(p, int) else tuple(p) for p in each)
        if all(len(pair) == 2 and all(is_size(p, 0) for p in pair) for pair in pairs):
            return pairs
    raise ConfigError(
        f"padding={padding!r} must be one of {NAMES}, one integer, or for each of {dims} "
        "dimensions an integer or (before, after)"
    )


def pads(
    padding: str | tuple[tuple[int, int], ...],
    sizes: Sequence[int],
    reach: Sequence[int],
    stride: Sequence[int],
) -> tuple[tuple[int, int], ...]:
    """How many positions are added (before, after) each dimension.

    Args:
      padding: as `named_padding` gives it. "SAME" makes ceil(size / stride) windows, an odd one of
        the positions added comes after, as in torch and TensorFlow; "causal" adds only before, so
        that no window of stride 1 reaches beyond the position it stands for.
      sizes: of the grid.
      reach: positions from the first to the last of a window, both counted.
      stride: from window to window.
    Raises:
      ValueError: a window does not fit.
    """
    if padding == "VALID":
        found = tuple((0, 0) for _ in sizes)
    elif padding == "causal":
        found = tuple((r - 1, 0) for r in reach)
    elif padding == "SAME":
        missing = [
            max((-(-n // s) - 1) * s + r - n, 0)
            for n, r, s in zip(sizes, reach, stride, strict=True)
        ]
        found = tuple((m // 2, m - m // 2) for m in missing)
    else:
        found = padding
    padded = [n + before + after for n, (before, after) in zip(sizes, found, strict=True)]
    if any(n < r for n, r in zip(padded, reach, strict=True)):
        raise ValueError(
            f"windows that reach over {tuple(reach)} positions do not fit a grid of {tuple(sizes)} "
            f"with padding={padding!r}"
        )
    return found
