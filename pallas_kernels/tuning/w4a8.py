"""What is tried for the INT4 x FP8 kernels: configurations that fit, the call, its reference."""

import functools
import itertools

import jax
import jax.numpy as jnp

from pallas_kernels import w4a8
from pallas_kernels.bench.measure import Work
from pallas_kernels.bench.rows import fragments, sizes
from pallas_kernels.numerics import quantize_tokens
from pallas_kernels.tuning.search import Task
from pallas_kernels.w4a8 import calls, plan

FEW = 64  # tokens up to which memory sets the time
# Relative norm of the difference from the reference: a bfloat16 result is rounded once (1.7e-3);
# float32 sums differ by what an FP8 tensor core drops of 128 products.
BOUNDS = {"bfloat16": 4e-3, "float16": 4e-3, "float32": 1e-3}
PUBLIC = {"matmul": w4a8.matmul, "glu": w4a8.glu, "grouped": w4a8.grouped}


def candidates(call, cores=132):
    """The configurations that fit a call and that could be the fastest.

    Few tokens: one tile of tokens, loads of several depths, and rows of w split where that fills
    the GPU. Many: the two largest tiles. See `plan.refuse` for what does not fit.

    Args:
      call: a `plan.Call`.
      cores: multiprocessors of the GPU.
    Returns:
      a list of `plan.Config`.
    """
    hopper, share = call.kernel == "sm90", -(-call.m // call.experts)
    few, largest = share <= FEW, plan.LIMITS[call.kernel]["largest"]
    fitting = next((size for size in (8, 16, 32, 64) if share <= size), 64)
    # With half the tokens of a tile Ampere and Ada have registers to read more words ahead.
    tokens = (fitting,) if hopper or fitting == 8 else (fitting, fitting // 2)
    grid = itertools.product(
        tokens if few else (largest // 2, largest),
        (64, 128),
        (plan.LIMITS[call.kernel]["groups"],),
        ((4, 6) if few else (3, 4, 6)) if hopper else (4,),
        (1, 2, 4) if few else (1, 2),
        (1, 2, 3, 4, 8) if few else (1, 2, 4),
        (1,) if few else (1, 2),
    )
    found = [plan.Config(*sizes, cores=cores) for sizes in grid]
    return [c for c in found if plan.refuse(c, call) is None and fills(c, call)]


def fills(config, call):
    """Whether rows are not split further than two waves of blocks, nor stages than steps."""
    steps = call.k // 128 // config.k_tiles // config.split_k
    blocks = -(-call.m // config.tile_m) * call.n // (config.columns * config.groups)
    crowded = config.split_k > 1 and blocks * config.split_k > 2 * config.cores
    return not crowded and (steps >= config.stages or config.stages == 4)


def task(call, cores=132, *, interpret=False):
    """The `Task` of a call.

    Args:
      call: a `plan.Call` of padded sizes.
      cores: multiprocessors of the GPU.
      interpret: run the kernel's body in the interpreter.
    """
    weights = fragments(
        call.k,
        call.n,
        experts=(call.experts,) if call.op == "grouped" else (),
        encoding=call.encoding,
        dtype=jnp.dtype(call.scales),
    )
    x = jax.random.normal(jax.random.key(99), (call.m, call.k), jnp.bfloat16)
    common = (*quantize_tokens(x), sizes(call.experts, call.m))
    expected = functools.cache(lambda: jax.jit(functools.partial(reference, call))(common, own()))
    own = functools.cache(lambda: jax.jit(weights)(jax.random.key(0)))

    def work(config):
        run = functools.partial(product, call, config, interpret)
        matrix = call.experts * call.n * call.k
        nbytes = matrix / 2 + matrix / 128 * jnp.dtype(call.scales).itemsize
        nbytes += call.m * (call.k + 2 * call.n)
        return Work(run, common, weights, nbytes, 2 * call.m * call.n * call.k, True)

    def error(config):
        y = jax.jit(work(config).run)(common, own()).astype(jnp.float32)
        return float(jnp.linalg.norm(y - expected()) / jnp.linalg.norm(expected()))

    first = plan.heuristic(call, cores)
    tried = candidates(call, cores)
    op, bound = f"w4a8.{call.op}", BOUNDS[call.out]
    return Task(title(call), op, call.m, call.facts, first, tried, named, work, error, bound)


def named(config):
    """A configuration's numbers as they are kept."""
    return {name: getattr(config, name) for name in plan.TUNED}


def title(call):
    """What a line of the table calls a task."""
    experts = f"{call.experts} experts, " if call.op == "grouped" else ""
    n = call.n // 2 if call.op == "glu" else call.n
    return f"w4a8 {call.op}, {experts}{call.m} tokens, {call.k} x {n}"


def product(call, config, interpret, common, weights):
    """The kernel with a configuration, on tokens that are rounded already."""
    (x, sx, group_sizes), (codes, scales) = common, weights
    divisors = {"matmul": 1.0, "glu": jnp.ones(2), "grouped": jnp.ones(call.experts)}
    operands = (
        x,
        sx,
        codes,
        scales,
        divisors[call.op],
        *((group_sizes,) if call.op == "grouped" else ()),
    )
    options = {"kernel": call.kernel, "treatment": call.treatment, "config": config}
    out_dtype = jnp.dtype(call.out)
    return getattr(calls, call.op)(*operands, out_dtype=out_dtype, interpret=interpret, **options)


def reference(call, common, weights):
    """The same by the plain form, float32."""
    (x, sx, group_sizes), (codes, scales) = common, weights
    operands = x, codes, scales, *((group_sizes,) if call.op == "grouped" else ())
    options = {"group": 128, "treatment": call.treatment, "backend": "reference"}
    return PUBLIC[call.op](*operands, x_scale=sx, out_dtype=jnp.float32, **options)
