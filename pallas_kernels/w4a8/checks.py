"""What the public functions refuse before any work."""

import jax.numpy as jnp

from pallas_kernels.numerics import E4M3, is_finite
from pallas_kernels.w4a8.packed import ENCODINGS, PAIR, TILE_ROWS, Fragments

X_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, E4M3)
SCALE_DTYPES = (jnp.float32, jnp.bfloat16, E4M3)
TREATMENTS = ("promote", "table")


def check_weights(codes, scales, *, group, stack=0):
    """Raises ValueError unless codes, scales and group fit each other.

    Args:
      codes: [*stack, k / 2, n] uint8 or `Fragments`.
      scales: [*stack, k / group, n].
      group: rows that share a scale.
      stack: number of leading axes.
    Returns:
      k.
    """
    axes = "e, " * stack
    if isinstance(codes, Fragments):
        k = check_fragments(codes, scales, stack)
    else:
        if codes.ndim != 2 + stack or codes.dtype != jnp.uint8:
            raise ValueError(
                f"codes must be [{axes}k / 2, n] uint8 or packed by `w4a8.pack`, "
                f"got {codes.shape} {codes.dtype}"
            )
        k = 2 * codes.shape[-2]
    if not isinstance(group, int) or group < 1 or k == 0 or k % group:
        raise ValueError(f"group={group!r} does not divide k={k}, the rows that codes hold")
    columns = scales.shape[-1] if isinstance(codes, Fragments) else codes.shape[-1]
    lead = codes.words.shape[:stack] if isinstance(codes, Fragments) else codes.shape[:stack]
    if scales.shape != (*lead, k // group, columns):
        raise ValueError(
            f"scales must be [{axes}k / group, n] = {(*lead, k // group, columns)}, "
            f"got {tuple(scales.shape)}"
        )
    if scales.dtype not in SCALE_DTYPES:
        raise ValueError(f"scales have dtype {scales.dtype}; accepted: {names(SCALE_DTYPES)}")
    if not is_finite(scales):
        raise ValueError("scales hold a NaN or an infinity; a weight of them would be one too")
    return k


def check_fragments(codes, scales, stack):
    """k of packed codes; raises ValueError unless they are whole and fit the scales."""
    words = codes.words
    if words.ndim != 4 + stack or words.dtype != jnp.int32 or words.shape[-2:] != (8, 128):
        raise ValueError(
            f"packed codes must be [{'e, ' * stack}n / 64, k / 128, 8, 128] int32, "
            f"got {words.shape} {words.dtype}"
        )
    if codes.encoding not in ENCODINGS:
        raise ValueError(
            f"encoding={codes.encoding!r}; accepted: {', '.join(map(repr, ENCODINGS))}"
        )
    wanted = -(-scales.shape[-1] // PAIR) * 2 if scales.ndim else 0
    if words.shape[-4] != wanted:
        raise ValueError(
            f"packed codes hold {words.shape[-4]} tiles of 64 columns, scales of shape "
            f"{tuple(scales.shape)} need {wanted}; were they cut or packed for another matrix?"
        )
    return words.shape[-3] * TILE_ROWS


def check_tokens(x, k, *, group, act, treatment, x_scale):
    """Raises ValueError unless x and the options fit a matrix of k rows."""
    if x.dtype not in X_DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; accepted: {names(X_DTYPES)}")
    if x.ndim < 1 or not k - group < x.shape[-1] <= k:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; its last axis must be k={k}, "
            f"or at most group={group} - 1 shorter"
        )
    if act not in (None, "e4m3"):
        raise ValueError(f"act={act!r}; accepted: None, 'e4m3'")
    if treatment not in TREATMENTS:
        raise ValueError(f"treatment={treatment!r}; accepted: {', '.join(map(repr, TREATMENTS))}")
    if (x_scale is None) == (x.dtype == E4M3):
        raise ValueError(
            "x_scale belongs to an x of dtype float8_e4m3fn and only to it; "
            f"got x of dtype {x.dtype} and x_scale={'None' if x_scale is None else 'an array'}"
        )
    if x_scale is not None and x_scale.shape != (*x.shape[:-1], 1):
        raise ValueError(f"x_scale must be {(*x.shape[:-1], 1)}, got {tuple(x_scale.shape)}")


def check_residual(residual, shape, dtype):
    """Raises ValueError unless a residual has the shape and dtype of the result."""
    if residual.shape != shape or residual.dtype != dtype:
        raise ValueError(
            f"residual must be {shape} {jnp.dtype(dtype).name} like the result, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )


def names(dtypes):
    """Dtype names for a message."""
    return ", ".join(jnp.dtype(d).name for d in dtypes)
