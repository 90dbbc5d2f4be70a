"""Kernels inside `shard_map`: four devices equal one, and on four H200 each runs its kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from pallas_kernels import attention, grouped, quantize, sparse
from pallas_kernels.aot import topology
from pallas_kernels.backend import JAX_VERSION

AXIS = "tp"
COLUMNS, ROWS, HEADS = P(None, AXIS), P(AXIS), P(None, None, AXIS)


def add(run):
    """`run` on a share of what is summed over."""
    return lambda *operands: lax.psum(run(*operands), AXIS)


def local_experts(x, w, sizes):
    """Tokens sorted by expert, of which each device holds some: its tokens come first."""
    first = lax.axis_index(AXIS) * w.shape[0]
    before = jnp.where(jnp.arange(len(sizes)) < first, sizes, 0).sum()
    mine = lax.dynamic_slice_in_dim(sizes, first, w.shape[0])
    y = grouped.matmul(jnp.roll(x, -before, axis=0), w, mine)
    return lax.psum(jnp.roll(y, before, axis=0), AXIS)


def normal(*shape, dtype=jnp.bfloat16):
    """What a case's operand is made of: a shape, and how to fill it on a CPU."""
    return jax.ShapeDtypeStruct(shape, dtype)


def int4(k, n):
    """Rows of INT4."""
    return jax.eval_shape(sparse.pack, normal(k, n, dtype=jnp.float32))


def attention_operands(large, *, packed):
    """q, k, v (and scales) of a prompt or of single steps over packed codes."""
    heads, kv, d, s = (32, 8, 128, 1024) if large else (8, 4, 8, 12)
    if not packed:
        return (normal(1, s, heads, d), *(normal(1, s, kv, d),) * 2)
    codes, scale = normal(2, s, kv, d // 2, dtype=jnp.uint8), normal(2, kv, s)
    return normal(2, heads, d), codes, codes, normal(2, dtype=jnp.int32), scale, scale


def packed_steps(q, k, v, lengths, k_scale, v_scale):
    """`attention.decode` with its scales in order."""
    return attention.decode(q, k, v, lengths, k_scale=k_scale, v_scale=v_scale)


def case(run, specs, out, operands, *, whole=None, kernels=1):
    """One way to split a call; `whole` is the call on one device where that is another one."""
    return run, specs, out, operands, whole or run, kernels


def ffn(large):
    """Channels and width of a feed-forward network."""
    return (14336, 4096) if large else (32, 16)


CASES = {
    "sparse.matvec, columns": case(
        sparse.matvec,
        (P(), COLUMNS),
        COLUMNS,
        lambda large: (normal(1, ffn(large)[0]), normal(*ffn(large))),
    ),
    "sparse.matvec, rows": case(
        add(sparse.matvec),
        (COLUMNS, ROWS),
        P(),
        lambda large: (normal(1, ffn(large)[0]), normal(*ffn(large))),
        whole=sparse.matvec,
    ),
    "sparse.take, columns": case(
        sparse.take,
        (P(), COLUMNS, P(), P()),
        COLUMNS,
        lambda large: (
            *(normal(1, ffn(large)[0]), normal(*ffn(large))),
            *(normal(8, dtype=jnp.int32), normal(dtype=jnp.int32)),
        ),
    ),
    "sparse.rows, rows": case(
        sparse.rows,
        (P(), ROWS, COLUMNS),
        COLUMNS,
        lambda large: (normal(1, ffn(large)[1]), normal(*ffn(large)), normal(1, ffn(large)[0])),
    ),
    "sparse.glu, channels in INT4": case(
        add(sparse.glu),
        (COLUMNS, ROWS, ROWS, P()),
        P(),
        lambda large: (
            normal(1, 28672 if large else 32),
            *(int4(28672 if large else 32, 4096 if large else 128),) * 2,
            normal(1, 4096 if large else 128),
        ),
        whole=sparse.glu,
    ),
    "grouped.matmul, experts": case(
        local_experts,
        (P(), ROWS, P()),
        P(),
        lambda large: (
            *(normal(40, 256 if large else 5), normal(8, *(256, 384) if large else (5, 6))),
            normal(8, dtype=jnp.int32),
        ),
        whole=grouped.matmul,
    ),
    "attention.prefill, heads": case(
        attention.prefill,
        (HEADS,) * 3,
        HEADS,
        functools.partial(attention_operands, packed=False),
    ),
    "attention.decode, heads": case(
        packed_steps,
        (COLUMNS, HEADS, HEADS, P(), COLUMNS, COLUMNS),
        COLUMNS,
        functools.partial(attention_operands, packed=True),
        kernels=int(JAX_VERSION >= (0, 11)),
    ),
    "quantize.tokens, rows": case(
        quantize.tokens,
        (ROWS,),
        (ROWS, ROWS),
        lambda large: (normal(8, 4096 if large else 16),),
    ),
    "quantize.groups, columns": case(
        functools.partial(quantize.groups, group=4),
        (COLUMNS,),
        (COLUMNS, COLUMNS),
        lambda large: (normal(64, 4096 if large else 16),),
    ),
}


def filled(shapes):
    """Random operands; half of a vector is 0, integers are 1 to 4."""
    random = np.random.default_rng(0)

    def fill(x):
        values = random.normal(size=x.shape) * (random.random(x.shape) < 0.5)
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(values, x.dtype)
        high = 5 if x.dtype == jnp.int32 and x.ndim < 2 else 255
        return jnp.asarray(random.integers(1, high, x.shape), x.dtype)

    return jax.tree.map(fill, shapes)


@pytest.mark.parametrize("name", CASES)
def test_four_devices_equal_one(name):
    run, specs, out, operands, whole, _ = CASES[name]
    mesh = jax.make_mesh((4,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    values = filled(operands(False))
    found, wanted = jax.jit(split)(*values), jax.jit(whole)(*values)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        # A sum of four parts of 8 significant bits; all else is the same sum.
        np.testing.assert_allclose(a, b, atol=2.0**-7 * np.abs(b).max())


@pytest.mark.parametrize("name", CASES)
def test_each_of_four_gpus_runs_the_kernel(name):
    run, specs, out, operands, _, kernels = CASES[name]
    with topology.abstract_mesh("h200", 4, AXIS):
        split = jax.shard_map(run, in_specs=specs, out_specs=out, check_vma=False)
        lowered = jax.jit(split).trace(*operands(True)).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == kernels
    assert ("all_reduce" in text) == (out == P())
