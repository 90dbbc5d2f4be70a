"""Rounding that gives the same bits on every backend, shared by the kernels.

XLA turns `x / 7` into `x * (1 / 7)`, which differs from the quotient in the last bit for half of
all x; a cast to e4m3 gives NaN above 464. Both matter where codes are compared bit for bit.
"""

import jax
import jax.numpy as jnp
import numpy as np

E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9  # the smallest positive e4m3 number, a subnormal


def known(array):
    """Whether an array's values can be looked at here (not traced, all on this host)."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


def is_finite(array):
    """Whether no value of an array is a NaN or an infinity, as far as its values are `known`.

    >>> is_finite(jnp.array([1.0, jnp.inf]))
    False
    """
    return not known(array) or bool(np.isfinite(np.asarray(array)).all())


def divide(x, constant):
    """x / constant, correctly rounded, also under jit.

    Args:
      x: any float array.
      constant: a Python number.
    Returns:
      x's shape and dtype. NaN stays NaN.

    >>> import jax
    >>> float(jax.jit(divide, static_argnums=1)(jnp.float32(0.3), 7)) == 0.04285714402794838
    True
    """
    # A divisor that depends on x is not a constant to the compiler, and x == x cannot be folded.
    return x / jnp.where(x == x, jnp.asarray(constant, x.dtype), x)


def quotient(x, y):
    """x / y, correctly rounded, also where y is broadcast.

    XLA on a CPU multiplies by 1 / y where y has fewer elements than x: then 3 quotients in 10,000
    round to another e4m3 code.

    Args:
      x, y: float32 arrays that broadcast to x's shape.
    Returns:
      x's shape. NaN stays NaN.

    >>> import jax, numpy as np
    >>> x, y = np.float32([-0.59765625, 1.0]), np.float32([0.17075893])
    >>> bool((jax.jit(quotient)(x, y) == x / y).all())
    True
    """
    return x / jnp.where(x == x, y, x)  # a divisor of x's own shape


def to_e4m3(x):
    """x rounded to float8_e4m3fn, half to even, saturating at 448; NaN stays NaN.

    Args:
      x: any shape, float32 or bfloat16.
    Returns:
      same shape, float8_e4m3fn.
    """
    return jnp.clip(x, -E4M3_MAX, E4M3_MAX).astype(E4M3)


def quantize_tokens(x):
    """Rounds each row of x to e4m3 with its own scale: x is close to codes * scale.

    scale = absmax / 448 (1 for an all-zero row);  codes = e4m3(x / scale)

    Args:
      x: [..., k], any float dtype.
    Returns:
      codes [..., k] float8_e4m3fn, scale [..., 1] float32. A NaN makes its row NaN.
    Source:
      FireQ (arXiv 2505.20839), dynamic per-token activation quantization.
    """
    x = x.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = divide(absmax, E4M3_MAX)
    # Also where absmax / 448 underflows: 0 / 0 would be NaN.
    scale = jnp.where(scale == 0, jnp.float32(1), scale)
    return to_e4m3(quotient(x, scale)), scale
