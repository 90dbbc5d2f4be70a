"""Operands of the sparse products, small and random, and what the products are in float64."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels import sparse
from pallas_kernels.sparse.packed import values

KINDS = ("float32", "bfloat16", "float16", "int4")


def operands(name, kind, *, m, f, units, sparsity=0.5, seed=0):
    """Operands of the product `name`.

    Args:
      kind: dtype of the weights, or "int4".
      m: rows of x.
      f: rows of the weights.
      units: columns of the weights, in 128 words.
      sparsity: share of zeros.
      seed: of the random numbers.
    """
    rng = np.random.default_rng(seed)
    d = units * 128 * (8 if kind == "int4" else 1)
    gate = np.where(rng.random((m, f)) < sparsity, 0.0, rng.normal(size=(m, f)))
    gate, x = (jnp.asarray(a, jnp.float32) for a in (gate, rng.normal(size=(m, d))))
    weights = [jnp.asarray(rng.normal(size=(f, d)), jnp.float32) for _ in range(2)]
    up, down = (sparse.pack(w) if kind == "int4" else w.astype(kind) for w in weights)
    ids = jnp.asarray(rng.permutation(f), jnp.int32)
    return {
        "matvec": (gate, down),
        "take": (gate, down, ids, jnp.int32(f - f // 3)),
        "rows": (x, up, gate),
        "glu": (gate, up, down, x),
    }[name]


def call(name, args, **options):
    """The product `name` by the public function."""
    return getattr(sparse, name)(*args, **options)


def expected(name, args):
    """The product `name` by numpy in float64."""
    args = [np.asarray(values(a), np.float64) for a in args]
    if name == "matvec":
        return args[0] @ args[1]
    if name == "take":
        x, w, ids, count = args
        live = ids[: int(count)].astype(int)
        return x[:, live] @ w[live]
    if name == "rows":
        x, w_rows, gate = args
        return gate * (x @ w_rows.T)
    gate, up, down, x = args
    return (gate * (x @ up.T)) @ down
