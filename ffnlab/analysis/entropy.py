"""Plug-in entropies of joint states, exact at any width.

    H(T) = -sum_s p(s) log p(s),   p(s) = share of rows whose d codes are s
    I(T;Y) = H(T) - sum_y p(y) H(T | Y = y)

in nats. A state of d units of B cells is one of B^d, beyond int64 at 13 units of 30 cells, and a
hash alone is no proof: rows are compared whole. On the host they are viewed as opaque bytes and
sorted once; `information` packs them into words and sorts those, inside jit and under vmap.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from ffnlab.errors import ConfigError, NumericalError, at_least, is_known

__all__ = [
    "Information",
    "check_finite",
    "check_rows",
    "entropy",
    "information",
    "joint_states",
    "mutual_information",
]

Host = Array | np.ndarray

WORD = 31  # bits of an int32 that is not negative


def joint_states(codes: Integer[np.ndarray, "n d"]) -> Int[np.ndarray, "n"]:
    """A number for each row, equal where rows are; on the host.

    Args:
      codes: small whole numbers >= 0, of d units.
    Raises:
      ConfigError: negative codes, or no rows or units.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or not codes.size:
        raise ConfigError(f"codes has shape {codes.shape}; rows [n, d] of one or more are needed")
    if codes.min() < 0:
        raise ConfigError(f"codes has {codes.min()}; whole numbers from 0 on are accepted")
    small = np.ascontiguousarray(codes.astype(np.min_scalar_type(int(codes.max()))))
    rows = small.view(np.dtype((np.void, small.shape[1] * small.dtype.itemsize)))[:, 0]
    return np.unique(rows, return_inverse=True)[1]


def entropy(states: Integer[np.ndarray, "n"]) -> float:
    """H in nats of what rows are, each as likely."""
    counts = np.unique(states, return_counts=True)[1]
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def mutual_information(states: Integer[np.ndarray, "n"], labels: Integer[np.ndarray, "m"]) -> float:
    """I in nats of two columns of states: H(T) - sum_y p(y) H(T | y).

    Raises:
      ConfigError: columns of other lengths.
    """
    if len(states) != len(labels):
        raise ConfigError(f"states has {len(states)} rows, labels {len(labels)}")
    inside = sum(
        count / len(labels) * entropy(states[labels == label])
        for label, count in zip(*np.unique(labels, return_counts=True), strict=True)
    )
    return entropy(states) - inside


class Information(NamedTuple):
    """What a layer knows, in nats.

    Attributes:
      x: I(X;T).
      y: I(T;Y).
    """

    x: Float[Array, ""]
    y: Float[Array, ""]


def information(
    codes: Integer[Host, "n d"],
    labels: Integer[Host, "n"],
    cells: int,
    inputs: Integer[Host, "n"] | None = None,
) -> Information:
    """Both informations of a layer, jitted and under vmap; `mutual_information` to rounding.

    Args:
      codes: of d units, in 0 .. cells - 1.
      labels: of each row, >= 0.
      cells: how many codes there are, >= 2.
      inputs: a number for each distinct input; None where all rows are distinct inputs, so that
        H(T | X) is 0.
    Raises:
      ConfigError: fewer than two cells, codes beyond them, no rows or units, labels or inputs that
        are not a whole number (int32) for each row.
    """
    at_least(2, cells=cells)
    check_rows("codes", codes, labels=labels, inputs=inputs)
    if is_known(codes):
        told = np.asarray(codes)
        if not (0 <= told.min() and told.max() < cells):
            raise ConfigError(
                f"codes are {told.min()} to {told.max()}; cells={cells} are numbered from 0"
            )
    words = packed(codes, cells)
    whole = words_entropy(words)
    known = words_entropy([labels])
    y = whole + known - words_entropy([*words, labels])
    if inputs is None:
        return Information(whole, y)
    return Information(whole + words_entropy([inputs]) - words_entropy([*words, inputs]), y)


def check_rows(name: str, rows: Host, **columns: Host | None) -> None:
    """Checks rows, and numbers that each has; None stands for none.

    Args:
      name: of the rows.
      rows: [n, d] of one or more rows and units.
      columns: by name, [n] whole numbers that int32 holds: beyond, different ones become equal.
    Raises:
      ConfigError: another shape, or other numbers.
    """
    if np.ndim(rows) != 2 or not np.size(rows):
        raise ConfigError(
            f"{name} has shape {np.shape(rows)}; rows [n, d] of one or more are needed"
        )
    for column, found in columns.items():
        if found is None:
            continue
        dtype = np.asarray(found).dtype if is_known(found) else found.dtype
        if np.shape(found) != np.shape(rows)[:1] or dtype.kind not in "iub":
            raise ConfigError(
                f"{column} is {dtype}{list(np.shape(found))}; a whole number for each of the "
                f"{np.shape(rows)[0]} rows is needed"
            )
        if is_known(found) and np.abs(np.asarray(found, np.float64)).max() >= 2**WORD:
            raise ConfigError(
                f"{column} has numbers of 2^{WORD} and more, which int32 does not tell apart; "
                "np.unique(…, return_inverse=True) gives small ones"
            )


def check_finite(name: str, values: Host) -> None:
    """Raises NumericalError for values that are known and not finite, of which no cell is told."""
    if is_known(values) and not np.isfinite(np.asarray(values)).all():
        raise NumericalError(f"{name} has NaN or infinity")


def packed(codes: Integer[Host, "n d"], cells: int) -> list[Int[Array, "n"]]:
    """Rows as words, as many codes in each as it holds."""
    bits = max(1, math.ceil(math.log2(cells)))
    each = WORD // bits
    columns = codes.astype(jnp.int32)
    words = []
    for begin in range(0, columns.shape[1], each):
        part = columns[:, begin : begin + each]
        shifts = jnp.arange(part.shape[1], dtype=jnp.int32) * bits
        words.append((part << shifts).sum(1))
    return words


def words_entropy(words: Sequence[Integer[Host, "n"]]) -> Float[Array, ""]:
    """H in nats of rows that are several words."""
    n = words[0].shape[0]
    found = jax.lax.sort([jnp.asarray(word, jnp.int32) for word in words], num_keys=len(words))
    is_new = jnp.zeros(n, bool).at[0].set(True)
    for word in found:
        is_new = is_new | jnp.concatenate([jnp.ones(1, bool), word[1:] != word[:-1]])
    counts = jax.ops.segment_sum(jnp.ones(n), jnp.cumsum(is_new) - 1, n, indices_are_sorted=True)
    p = counts / n
    return -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0))
