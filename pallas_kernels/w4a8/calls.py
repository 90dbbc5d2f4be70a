"""From the operands of the public functions to a GPU kernel's padded ones, and back.

`kernel` names the file that does the work, "sm90" or "sm80", whose `multiply` is called.
"""

import importlib

import jax
import jax.numpy as jnp

from pallas_kernels import quantize
from pallas_kernels.tiles import Padding
from pallas_kernels.w4a8 import plan
from pallas_kernels.w4a8.packed import split_columns


def matmul(
    x,
    sx,
    codes,
    scales,
    divisor,
    *,
    kernel,
    treatment,
    out_dtype,
    config=None,
    interpret=False,
    **_,
):
    """Same contract as `reference.matmul`, for `Fragments`; the output may be 16 bits wide."""
    x8, sx = rounded(x, sx)
    call = plan.Call.of("matmul", kernel, x8, codes, scales, treatment, out_dtype)
    config = config or plan.pick(call, cores())
    run = single(load(kernel), config, codes, scales, treatment, interpret)
    y = run(x8, sx.T / divisor, glu=False, out=narrowest(out_dtype, config))
    return y[:, : scales.shape[1]]


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
    x8, sx = rounded(x, sx)
    call = plan.Call.of("glu", kernel, x8, codes, scales, treatment, out_dtype)
    config = config or plan.pick(call, cores())
    run = single(load(kernel), config, codes, scales, treatment, interpret)
    if config.split_k == 1:
        return run(x8, sx.T / divisors[:, None], glu=True, out=narrowest(out_dtype, config))
    gate, up = split_columns(run(x8, sx.T, glu=False, out=jnp.float32))
    return jax.nn.silu(gate / divisors[0]) * (up / divisors[1])


def load(kernel):
    """The module of a kernel, which imports Pallas."""
    return importlib.import_module(f"pallas_kernels.w4a8.{kernel}")


def rounded(x, sx):
    """x as e4m3 and its scales [m, 1]: given, or by the rounding kernel of this device."""
    return quantize.tokens(x) if sx is None else (x, sx)


def single(kernel, config, codes, scales, treatment, interpret):
    """`multiply` by one matrix, with tokens padded to whole tiles and cut off again."""

    def run(x8, sx, *, glu, out):
        m, extra = x8.shape[0], -x8.shape[0] % config.tile_m
        return kernel.multiply(
            jnp.pad(x8, ((0, extra), (0, 0))),
            jnp.pad(sx, ((0, 0), (0, extra))),
            codes.words[None],
            padded_scales(scales[None], codes),
            jnp.zeros(((m + extra) // config.tile_m,), jnp.int32),
            config=config,
            encoding=codes.encoding,
            glu=glu,
            treatment=treatment,
            out=out,
            interpret=interpret,
        )[:m]

    return run


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
    x8, sx = rounded(x, sx)
    call = plan.Call.of("grouped", kernel, x8, codes, scales, treatment, out_dtype)
    config = config or plan.pick(call, cores())
    padding = Padding.of(group_sizes, call.m, config.tile_m)
    y = load(kernel).multiply(
        x8[padding.token],
        (sx[:, 0] / divisors[padding.expert])[padding.token][None],
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


def cores():
    """Multiprocessors of the device that is traced for."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract.num_cores or 132
    return getattr(jax.devices()[0], "core_count", None) or 132
