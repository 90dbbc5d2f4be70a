"""Why the GPU kernels cannot run a call, without importing them."""

import jax.numpy as jnp

from pallas_kernels import _triton
from pallas_kernels.w4a8.packed import Fragments

TPU_ROWS = 1024  # of w in a block: 8 groups of 128, as a TPU's tiles of scales want
TRITON_GROUPS = (32, 64, 128)  # half a group is at least the 16 rows of a tensor core's product


def sm90(*, codes, group, act, treatment, narrow, **_):
    """Why the Hopper kernel cannot run a call; None when it can."""
    if not isinstance(codes, Fragments):
        return "takes codes in the order of `w4a8.pack`, these are canonical"
    if group != 128:
        return f"takes groups of 128 rows, group={group}"
    if act is None and not narrow:
        return "rounds x to e4m3, act=None"
    if treatment == "table" and codes.encoding != "tc":
        return f"treatment='table' takes codes packed as 'tc', these are {codes.encoding!r}"
    return None


def sm80(*, codes, group, act, treatment, narrow, **_):
    """Why the kernel of Ampere and Ada cannot run a call; None when it can."""
    if treatment == "table":
        return "scales partial sums, treatment='table'"
    return sm90(codes=codes, group=group, act=act, treatment=treatment, narrow=narrow)


def triton(*, group, act, treatment, narrow, **_):
    """Why the Triton kernel cannot run a call; None when it can."""
    if treatment == "table":
        return "scales partial sums, treatment='table'"
    if act is None and not narrow:
        return "rounds x to e4m3, act=None"
    if group not in TRITON_GROUPS:
        return f"takes groups of {', '.join(map(str, TRITON_GROUPS))} rows, group={group}"
    return _triton.missing()


def tpu(*, codes, group, act, treatment, narrow, dtype):
    """Why the TPU kernel cannot run a call; None when it can."""
    if isinstance(codes, Fragments):
        return "takes canonical codes, these are packed for a GPU"
    k, n = 2 * codes.shape[0], codes.shape[1]
    if treatment == "table":
        return "scales partial sums, treatment='table'"
    if act is None and not narrow and dtype != jnp.bfloat16:
        return f"multiplies in bfloat16, x is {dtype.name} and act=None"
    if group != 128 or n % 128 or (k % TPU_ROWS and k > TPU_ROWS):
        return f"takes groups of 128, n a multiple of 128, k of {TPU_ROWS} or less; k={k}, n={n}"
    return None
