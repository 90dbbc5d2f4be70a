"""What the public functions share: from their arguments to a backend and its operands."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import backend as registry
from pallas_kernels.numerics import E4M3
from pallas_kernels.w4a8.checks import check_tokens, check_weights


class Arguments(NamedTuple):
    """Checked arguments of a product.

    Attributes:
      rows: [m, k], x with its leading axes as one and zeros in missing columns.
      sx: [m, 1] float32, the scale of rows that are already e4m3; else None.
      run: the backend's function.
      options: its options, a tuple of pairs (name, value).
      out_dtype: of the result.
    """

    rows: jax.Array
    sx: jax.Array | None
    run: Callable[..., Any]
    options: tuple[tuple[str, object], ...]
    out_dtype: jnp.dtype

    @classmethod
    def of(
        cls, table, x, codes, scales, *, group, act, treatment, x_scale, out_dtype, backend, stack=0
    ):
        """Checks arguments and chooses who runs them.

        Args:
          table: the function's backends.
          x, codes, scales, group, act, treatment, x_scale, out_dtype, backend: see `api.matmul`.
          stack: leading axes of codes and scales.
        Raises:
          ValueError: see `api.matmul`.
        """
        k = check_weights(codes, scales, group=group, stack=stack)
        check_tokens(x, k, group=group, act=act, treatment=treatment, x_scale=x_scale)
        narrow = x.dtype == E4M3
        facts = {"group": group, "act": act, "treatment": treatment}
        seen = {"codes": codes, "narrow": narrow, "dtype": x.dtype}
        chosen = registry.choose(table, backend, **seen, **facts)
        out_dtype = jnp.dtype(out_dtype or (jnp.float32 if narrow else x.dtype))
        m = math.prod(x.shape[:-1])
        rows = jnp.pad(x.reshape(m, x.shape[-1]), ((0, 0), (0, k - x.shape[-1])))
        sx = None if x_scale is None else x_scale.reshape(m, 1).astype(jnp.float32)
        return cls(rows, sx, chosen.run, (*facts.items(), ("out_dtype", out_dtype)), out_dtype)
