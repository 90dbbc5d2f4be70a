"""Pallas as the kernels use it: every difference between jax versions is here.

Importing this module imports Pallas, which takes a second: only the files that hold a GPU or TPU
kernel do, and they are imported when their kernel is chosen.
"""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import JAX_VERSION

INTERPRETER = getattr(plgpu, "InterpretGPUParams", None)  # jax 0.11 and newer
HAS_INTERPRET = INTERPRETER is not None
MMA = getattr(plgpu, "mma", None)  # the tensor cores below Hopper, jax 0.11.2 and newer


def mma(total, a, b):
    """total + a @ b in registers, by the tensor cores of Ampere and Ada.

    Raises:
      ValueError: a jax that does not know them.
    """
    if MMA is None:
        raise ValueError(f"mma needs jax 0.11.2, this is {jax.__version__}")
    return MMA(total, a, b)


def mma_layouts(dtype):
    """Register layouts of `mma`: its left operand, right operand and accumulator."""
    names = ("MMA_LHS", "MMA_RHS", "MMA_ACC")
    return tuple(getattr(plgpu.Layout, name)(dtype) for name in names)


def load(ref, **options):
    """`plgpu.load` of a whole reference; options: layout, optimized."""
    region = ((),) if JAX_VERSION < (0, 11) else ()
    return plgpu.load(ref, *region, **options)


def store(ref, value):
    """Writes registers of any layout to a reference, without asking for wide stores."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def kernel(body, *, out_type, interpret=False, approx_math=False, **options):
    """`plgpu.kernel` for a whole warp group at a time.

    Args:
      body: the kernel, called with references to inputs, outputs and scratch.
      out_type: a tree of `jax.ShapeDtypeStruct`.
      interpret: run it in the interpreter (any device); memory nobody wrote is NaN.
      approx_math: exponentials by the hardware's approximate instruction.
      **options: scratch_types, grid, grid_names, cluster, cluster_names, num_threads, thread_name.
    Returns:
      a function of the inputs.
    Raises:
      ValueError: `interpret` on a jax without an interpreter for GPU kernels.
    """
    params = plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=approx_math
    )
    if interpret:
        if INTERPRETER is None:
            raise ValueError(f"interpreting a GPU kernel needs jax 0.11, this is {jax.__version__}")
        options["interpret"] = INTERPRETER()
    options["kernel_name"] = name_of(body)
    return plgpu.kernel(body, out_type=out_type, compiler_params=params, **options)


def name_of(body):
    """What profilers call a kernel: its package, file and function, "w4a8_sm90_body"."""
    function = getattr(body, "func", body)  # of a partial
    return "_".join([*function.__module__.split(".")[1:], function.__qualname__.split(".")[0]])
