"""Triton kernels as jax calls them: every difference between versions of jax-triton is here.

jax-triton is a part of the extra 'gpu' and imported only where a kernel is called: 0.3 even raises
on import without a GPU. 0.4.1 removes unused outputs by a rule that jax 0.12 calls with one more
argument; `jax_triton` adapts it.

A kernel is a plain function over `tl`, a name that its module gets when it is compiled. Not for
Hopper: Triton 3.9 writes PTX 9.4 there, which CUDA 13.0 cannot assemble.
"""

import functools
import importlib.util
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backend


def missing() -> str | None:
    """Why Triton kernels cannot run here: jax-triton is not installed; None when it is."""
    if importlib.util.find_spec("jax_triton") is not None:
        return None
    return "jax-triton is not installed, a part of the extra 'gpu': pip install 'ffnlab[gpu]'"


@functools.cache
def jax_triton():
    """The package, adapted to jax 0.12.

    Raises:
      ImportError: it is not installed.
    """
    try:
        import jax_triton
    except ImportError as error:
        raise ImportError(f"the Triton kernels cannot run: {missing() or error}") from error
    from jax._src.interpreters import partial_eval

    rules, primitive = partial_eval.dce_rules, jax_triton.triton_lib.triton_kernel_call_p
    old: Any = rules.get(primitive)
    if backend.JAX_VERSION >= (0, 12) and old and len(inspect.signature(old).parameters) == 2:
        rules[primitive] = lambda used, *rest: old(used, rest[-1])
    return jax_triton


@functools.cache
def compiled(kernel):
    """A function over `tl` as a Triton kernel."""
    import triton
    import triton.language

    kernel.__globals__["tl"] = triton.language
    return triton.jit(kernel)


def launch(kernel, shape, grid, *args, warps=4, stages=1, **constants):
    """Calls a kernel that writes one float32 array; under `vmap` once per element.

    Args:
      kernel: a function over `tl` of `args`, the output and `constants`.
      shape: of the output.
      grid: blocks along each axis, at most 3.
      *args: arrays.
      warps, stages: of a block, and of its pipeline of loads.
      **constants: the kernel's constants.
    Returns:
      [*shape] float32.
    """
    call = jax_triton().triton_call
    parameters, capability = inspect.signature(call).parameters, backend.device()[1]
    result = "out_type" if "out_type" in parameters else "out_shape"
    options = {result: jax.ShapeDtypeStruct(shape, jnp.float32), **constants}
    if "compute_capability" in parameters and capability is not None:
        options |= {"compute_capability": 10 * capability[0] + capability[1]}
    if "backend_options" in parameters:  # Triton 3.9 warns where its default is not asked for
        options |= {"backend_options": {"enable_fp_fusion": True}}
    options |= {"kernel": compiled(kernel), "grid": grid, "num_warps": warps, "num_stages": stages}
    # Its primitive has no rule for batches.
    return jax.custom_batching.sequential_vmap(lambda *arrays: call(*arrays, **options))(*args)
