"""What every public kernel keeps: jit, vmap, the same bits twice, gradients of its formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, grouped, quantize, sparse, w4a8
from pallas_kernels.backend import INTERPRETER, JAX_VERSION
from tests.w4a8_operands import weights

CODES, _, SCALES = weights(6, 256)
_, FRAGMENTS, FRAGMENT_SCALES = weights(128, 256)
EXPERTS, _, EXPERT_SCALES = weights(6, 128, experts=(3,))
SIZES = jnp.array([2, 0, 3], jnp.int32)
ROUNDED = sparse.pack(jax.random.normal(jax.random.key(3), (9, 128)))
BYTES = jnp.arange(2 * 7 * 2 * 4, dtype=jnp.uint8).reshape(2, 7, 2, 4)


def steps(q, k_scale, v_scale):
    """Single steps over INT4."""
    lengths = jnp.array([7, 4], jnp.int32)
    return attention.decode(q, BYTES, BYTES, lengths, k_scale=k_scale, v_scale=v_scale)


def prompt(q, k, v):
    """A prompt with a window."""
    return attention.prefill(q, k, v, tile=4, window=3)


# Each function of its floating-point operands, and their shapes.
FUNCTIONS = {
    "w4a8.matmul": (lambda x, s: w4a8.matmul(x, CODES, s, group=128), ((3, 256), SCALES.shape)),
    "w4a8.glu": (
        lambda x, s: w4a8.glu(x, *w4a8.join(FRAGMENTS, FRAGMENTS, s, s)),
        ((3, 256), FRAGMENT_SCALES.shape),
    ),
    "w4a8.grouped": (
        lambda x, s: w4a8.grouped(x, EXPERTS, s, SIZES),
        ((5, 128), EXPERT_SCALES.shape),
    ),
    "grouped.matmul": (lambda x, w: grouped.matmul(x, w, SIZES), ((6, 4), (3, 4, 5))),
    "sparse.matvec": (sparse.matvec, ((1, 9), (9, 4))),
    "sparse.matvec, INT4": (lambda x: sparse.matvec(x, ROUNDED), ((1, 9),)),
    "sparse.take": (
        lambda x, w: sparse.take(x, w, jnp.array([7, 2, 2], jnp.int32), jnp.int32(2)),
        ((1, 9), (9, 4)),
    ),
    "sparse.rows": (sparse.rows, ((1, 4), (9, 4), (1, 9))),
    "sparse.glu": (sparse.glu, ((1, 9), (9, 4), (9, 5), (1, 4))),
    "attention.prefill": (prompt, ((1, 6, 2, 4), (1, 7, 1, 4), (1, 7, 1, 4))),
    "attention.decode": (steps, ((2, 4, 8), (2, 2, 7), (2, 2, 7))),
    "quantize.tokens": (quantize.tokens, ((3, 16),)),
    "quantize.groups": (functools.partial(quantize.groups, group=2), ((4, 6),)),
}
SMOOTH = [name for name in FUNCTIONS if not name.startswith(("w4a8", "quantize"))]


def operands(name, lead=()):
    """Random operands; a third of the numbers are 0."""
    random = np.random.default_rng(0)
    shapes = [(*lead, *shape) for shape in FUNCTIONS[name][1]]
    kept = [random.random(shape) > 1 / 3 for shape in shapes]
    return [jnp.asarray(random.normal(size=x.shape) * x, jnp.float32) for x in kept]


def bits(tree):
    """The bytes of a tree's arrays."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_equals_one_after_the_other_and_repeats(name):
    run, args = jax.jit(FUNCTIONS[name][0]), operands(name, (2,))
    batched = jax.jit(jax.vmap(FUNCTIONS[name][0]))(*args)
    for i in range(2):
        one = run(*(x[i] for x in args))
        assert bits(one) == bits(run(*(x[i] for x in args)))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(batched), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b[i], np.float64)
            # Sums in another order.
            np.testing.assert_allclose(a, b, atol=1e-6 * max(np.abs(a).max(), 1))


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_by_finite_differences(name):
    """Along a random direction; those of w4a8 take rounding as the identity, see its own tests."""
    run, args = FUNCTIONS[name][0], operands(name)
    random = np.random.default_rng(1)
    weight = random.normal(size=jax.eval_shape(run, *args).shape)
    loss = jax.jit(lambda *x: (run(*x) * jnp.float32(weight)).sum())
    gradients = jax.jit(jax.grad(loss, tuple(range(len(args)))))(*args)
    step = [jnp.float32(1e-2 * random.normal(size=x.shape)) for x in args]
    ends = [loss(*(x + sign * d for x, d in zip(args, step, strict=True))) for sign in (1, -1)]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, step, strict=True))
    # The third derivative times the cube of the step, and rounding of float32.
    np.testing.assert_allclose((ends[0] - ends[1]) / 2, slope, rtol=3e-3, atol=1e-4)


# Each kernel's call, and its operands with a leading axis of two.
BATCHES = {
    "attention.prefill": (
        functools.partial(attention.prefill, backend="sm90_interpret", tile=64),
        [(2, 1, 8, 1, 64)] * 3,
    ),
    "attention.decode": (
        lambda q, k, v: attention.decode(
            q, k, v, jnp.array([50], jnp.int32), backend="sm90_interpret"
        ),
        [(2, 1, 1, 64), *[(2, 1, 64, 1, 64)] * 2],
    ),
    "grouped.matmul": (
        lambda x, w: grouped.matmul(x, w, SIZES, backend="sm90_interpret"),
        [(2, 6, 128), (2, 3, 128, 128)],
    ),
    "quantize.tokens": (
        functools.partial(quantize.tokens, backend="mosaic_interpret"),
        [(2, 2, 256)],
    ),
    "quantize.groups": (
        functools.partial(quantize.groups, group=2, backend="mosaic_interpret"),
        [(2, 4, 256)],
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(
    JAX_VERSION < INTERPRETER, reason=f"jax {jax.__version__} has no interpreter for GPU kernels"
)
@pytest.mark.parametrize("name", BATCHES)
def test_vmap_of_a_kernel_gives_the_same_bits(name):
    run, shapes = BATCHES[name]
    random = np.random.default_rng(0)
    args = [jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in shapes]
    batched = jax.vmap(run)(*args)
    for i in range(2):
        assert bits(run(*(x[i] for x in args))) == bits(jax.tree.map(lambda x, i=i: x[i], batched))
