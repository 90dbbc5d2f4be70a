"""A small call of each GPU kernel against its reference, before a process first relies on it.

`backend.choose` runs one where a kernel is chosen by device, once per device and backend; what
raises here is left to XLA. A kernel that faults takes the process with it all the same: that is
what `make gpu-test` is for.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import attention as attend
from pallas_kernels import grouped as groups
from pallas_kernels import quantize as rounding
from pallas_kernels import sparse as skipping
from pallas_kernels import w4a8 as int4
from pallas_kernels.numerics import E4M3, quantize_tokens

# Relative norm of the difference from the reference.
SUMS, NARROW, FP8 = 1e-3, 1e-2, 1e-1  # float32 sums; 16-bit results; exponentials in e4m3


def compare(run, bound, backend, *operands):
    """Raises ValueError unless a backend's results are near the reference's."""
    names = backend, "reference"
    found, wanted = (jax.tree.leaves(jax.jit(lambda *x, n=n: run(*x, n))(*operands)) for n in names)
    for a, b in zip(found, wanted, strict=True):
        a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        if not error <= bound:  # NaN is not
            raise ValueError(f"its results are {error:.1e} from the reference's, above {bound:.0e}")


def normal(seed, *shape, dtype=jnp.bfloat16):
    """Random numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def codes(seed, *shape):
    """Random INT4 codes -7..7, int8."""
    return jnp.asarray(np.random.default_rng(seed).integers(-7, 8, shape), jnp.int8)


def w4a8(backend):
    """The INT4 x FP8 product, both encodings."""
    x, sx = quantize_tokens(normal(0, 16, 512))
    packed, scales = int4.pack_nibbles(codes(1, 512, 128)), jnp.full((4, 128), 0.01)

    def run(x, sx, w, scales, backend):
        options = {"group": 128, "x_scale": sx, "out_dtype": jnp.float32, "backend": backend}
        return int4.matmul(x, w, scales, **options)

    for encoding in ("sm", "tc"):
        compare(run, SUMS, backend, x, sx, int4.pack(packed, encoding), scales)


def quantize(backend):
    """Rounding of tokens and of groups, to the bit."""
    x = normal(0, 4, 512)
    compare(lambda x, name: rounding.tokens(x, backend=name), 0.0, backend, x)
    compare(lambda x, name: rounding.groups(x, group=2, backend=name), 0.0, backend, x)


def sparse(backend):
    """One row over bfloat16 rows, most of them off."""
    x = jnp.where(normal(0, 1, 256, dtype=jnp.float32) > 0.5, 1.0, 0.0)
    w = normal(1, 256, 1024)

    def both(x, w, name):
        y = skipping.matvec(x, w, backend=name)
        return y, skipping.rows(y, w, x, backend=name)

    compare(both, SUMS, backend, x, w)


def grouped(backend):
    """The product over experts, one of them empty, and both gradients."""
    x, w, sizes = normal(0, 150, 128), normal(1, 3, 128, 128), jnp.array([0, 130, 15], jnp.int32)

    def run(x, w, name):
        y, pull = jax.vjp(lambda x, w: groups.matmul(x, w, sizes, backend=name), x, w)
        return y, *pull(jnp.ones_like(y))

    compare(run, NARROW, backend, x, w)


def prefill(backend):
    """A prompt over INT4 codes in both precisions."""
    q, scales = normal(0, 1, 128, 2, 64), jnp.full((1, 192, 1), 0.1).astype(E4M3)
    k, v = codes(1, 1, 192, 1, 64), codes(2, 1, 192, 1, 64)
    for precision, bound in (("float32", NARROW), ("fp8", FP8)):

        def run(q, k, v, name, precision=precision):
            options = {"k_scale": scales, "v_scale": scales, "precision": precision}
            return attend.prefill(q, k, v, **options, backend=name)

        compare(run, bound, backend, q, k, v)


def decode(backend):
    """One step over an INT4 cache with e4m3 scales."""
    q, scales = normal(0, 2, 2, 64), jnp.full((2, 1, 128), 0.1).astype(E4M3)
    k, v = (codes(seed, 2, 128, 1, 32).astype(jnp.uint8) for seed in (1, 2))
    lengths = jnp.array([128, 70], jnp.int32)

    def run(q, k, v, name):
        options = {"k_scale": scales, "v_scale": scales, "backend": name}
        return attend.decode(q, k, v, lengths, **options)

    compare(run, NARROW, backend, q, k, v)
