"""From the operands of the public functions to a GPU kernel's padded ones, and back.

`kernel` names the file that does the work, "sm90" or "sm80": its `multiply`, and where `follows`
says so its `multiply_and_follow`.
"""

import functools
import importlib

import jax
import jax.numpy as jnp

from pallas_kernels import backend, quantize
from pallas_kernels.tiles import Padding
from pallas_kernels.w4a8 import epilogue, plan
from pallas_kernels.w4a8.packed import split_columns


def matmul(*operands, **options):
    """Same contract as `reference.matmul`, for `Fragments`; the output may be 16 bits wide.

    Args:
      *operands, **options: see `followed`.
    """
    return followed(*operands, **options)[0]


def followed(
    x,
    sx,
    codes,
    scales,
    divisor,
    *,
    kernel,
    treatment,
    out_dtype,
    residual=None,
    with_sumsq=False,
    config=None,
    interpret=False,
    **_,
):
    """`matmul` with the epilogue of `epilogue.finish`, in the kernel where that has one.

    Elsewhere the kernel leaves float32 sums, which XLA adds up with what follows them.
    """
    call = plan.Call.of("matmul", kernel, x, codes, scales, treatment, out_dtype)
    config = config or plan.pick(call, backend.cores())
    divisors = jnp.reshape(jnp.asarray(divisor, jnp.float32), 1)
    x8, unit = rounded(x, sx, divisors, config.tile_m)
    module, n, fixed = load(kernel), scales.shape[1], (treatment, interpret, call.m)
    run = functools.partial(single, config, codes, scales, *fixed, x8, unit)
    out = narrowest(out_dtype, config)
    if residual is None and not with_sumsq:
        return run(module.multiply, out=out)[:, :n], None
    if not module.follows(config, out):
        return epilogue.finish(run(module.multiply, out=jnp.float32)[:, :n], residual, with_sumsq)
    if residual is not None:
        extra = -len(residual) % config.tile_m, 64 * codes.words.shape[0] - n
        residual = jnp.pad(residual, tuple((0, more) for more in extra))
    follow = functools.partial(module.multiply_and_follow, residual=residual, with_sumsq=with_sumsq)
    y, squares = run(follow, out=out)
    return y[:, :n], squares


def glu(
    x,
    sx,
    codes,
    scales,
    divisors,
    *,
    kernel,
    treatment,
    out_dtype,
    config=None,
    interpret=False,
    **_,
):
    """Same contract as `api_glu.plain`, for one joined matrix; the output may be 16 bits wide.

    Few tokens are cut along k, and what follows the sums is left to XLA.
    """
    call = plan.Call.of("glu", kernel, x, codes, scales, treatment, out_dtype)
    config = config or plan.pick(call, backend.cores())
    whole = config.split_k == 1
    by = divisors if whole else jnp.ones(1, jnp.float32)
    x8, unit = rounded(x, sx, by, config.tile_m)
    fixed = treatment, interpret, call.m
    run = functools.partial(single, config, codes, scales, *fixed, x8, unit)
    multiply = load(kernel).multiply
    if whole:
        return run(multiply, glu=True, out=narrowest(out_dtype, config))
    gate, up = split_columns(run(multiply, out=jnp.float32))
    return jax.nn.silu(gate / divisors[0]) * (up / divisors[1])


def load(kernel):
    """The module of a kernel, which imports Pallas."""
    return importlib.import_module(f"pallas_kernels.w4a8.{kernel}")


def rounded(x, sx, divisors, tile_m=1):
    """x as e4m3 and its scales by each divisor [d, m]: x and scales [m, 1] as given, or by the
    rounding kernel of this device, which leaves whole tiles of tokens."""
    if sx is not None:
        return x, sx.T / divisors[:, None]
    return quantize.divided(x, divisors, rows=-(-x.shape[0] // tile_m) * tile_m)


def single(config, codes, scales, treatment, interpret, m, x8, unit, multiply, *, out, glu=False):
    """`multiply` of m tokens by one matrix, padded to whole tiles and cut off again."""
    extra = -x8.shape[0] % config.tile_m
    found = multiply(
        jnp.pad(x8, ((0, extra), (0, 0))),
        jnp.pad(unit, ((0, 0), (0, extra))),
        codes.words[None],
        padded_scales(scales[None], codes),
        jnp.zeros((-(-m // config.tile_m),), jnp.int32),
        config=config,
        encoding=codes.encoding,
        glu=glu,
        treatment=treatment,
        out=out,
        interpret=interpret,
    )
    return jax.tree.map(lambda array: array[:m], found)


def grouped(
    x,
    sx,
    codes,
    scales,
    divisors,
    group_sizes,
    *,
    kernel,
    treatment,
    out_dtype,
    config=None,
    interpret=False,
    **_,
):
    """Same contract as `api_grouped.plain`, for `Fragments`; the output may be 16 bits wide."""
    x8, unit = rounded(x, sx, jnp.ones(1, jnp.float32))
    call = plan.Call.of("grouped", kernel, x8, codes, scales, treatment, out_dtype)
    config = config or plan.pick(call, backend.cores())
    padding = Padding.of(group_sizes, call.m, config.tile_m)
    y = load(kernel).multiply(
        x8[padding.token],
        (unit[0] / divisors[padding.expert])[padding.token][None],
        codes.words,
        padded_scales(scales, codes),
        padding.tile_group,
        config=config,
        encoding=codes.encoding,
        glu=False,
        treatment=treatment,
        out=narrowest(out_dtype, config),
        interpret=interpret,
    )
    y = y[padding.place, : scales.shape[2]]
    return jnp.where(padding.used[:, None], y, jnp.zeros((), y.dtype))


def padded_scales(scales, codes):
    """Scales [e, k / 128, n] with the columns that `pack` added."""
    return jnp.pad(scales, ((0, 0), (0, 0), (0, 64 * codes.words.shape[-4] - scales.shape[-1])))


def narrowest(out_dtype, config):
    """The dtype to write: 16 bits where that is asked for and sums are whole."""
    narrow = config.split_k == 1 and jnp.dtype(out_dtype).itemsize == 2
    return out_dtype if narrow else jnp.float32
