"""The table of implementations of one public function."""

import functools

from pallas_kernels import backend as registry
from pallas_kernels.w4a8 import epilogue, refusals

TESTS = {name: registry.tested("w4a8", name) for name in ("sm90", "sm80")}  # of all functions


def reads_fragments(platform, capability):
    """Whether a device has a kernel that takes `Fragments` (others unpack them at every call).

    Args:
      platform, capability: see `pallas_kernels.backend.device`.
    """
    return any(
        backend.name in ("sm90", "sm80") and registry.unfit(backend, platform, capability) is None
        for backend in table("matmul", print, print)
    )


def table(name, xla, reference):
    """Backends of `name` ("matmul", "glu", "grouped"), fastest first.

    Args:
      name: of the public function.
      xla, reference: what runs anywhere; of "matmul" with an epilogue (`epilogue.after`).
    Returns:
      a tuple of `Backend`.
    """
    function = "followed" if name == "matmul" else name
    run = functools.partial(registry.lazy, "pallas_kernels.w4a8.calls", function)
    return (
        registry.Backend(
            "sm90",
            run(kernel="sm90"),
            platforms=("gpu",),
            refuse=refusals.sm90,
            at_least=(9, 0),
            below=(10, 0),
            test=TESTS["sm90"],
        ),
        registry.Backend(
            "sm80",
            run(kernel="sm80"),
            platforms=("gpu",),
            refuse=refusals.sm80,
            at_least=(8, 0),
            below=(9, 0),
            jax=(0, 11, 2),
            test=TESTS["sm80"],
        ),
        *(triton(name, xla) if name != "grouped" else ()),
        *(
            registry.Backend(
                f"{kernel}_interpret",
                run(kernel=kernel, interpret=True),
                refuse=refuse,
                automatic=False,
                jax=registry.INTERPRETER,
            )
            for kernel, refuse in (("sm90", refusals.sm90), ("sm80", refusals.sm80))
        ),
        *(tpu() if name == "matmul" else ()),
        registry.Backend("xla", xla),
        registry.Backend("reference", reference, automatic=False),
    )


def triton(name, plain):
    """The Triton kernel of Ampere and Ada; a gated product is two of its own (`api_glu.plain`)."""
    run = epilogue.after(registry.lazy("pallas_kernels.w4a8.triton", "matmul"))
    run = run if name == "matmul" else functools.partial(plain, run=run)
    devices = {"platforms": ("gpu",), "at_least": (8, 0), "below": (9, 0)}
    return (registry.Backend("triton", run, refuse=refusals.triton, **devices),)


def tpu():
    """The TPU kernel and its interpreted form, which every jax has."""
    run = functools.partial(registry.lazy, "pallas_kernels.w4a8.tpu", "matmul")
    kernel, interpreted = epilogue.after(run()), epilogue.after(run(interpret=True))
    return (
        registry.Backend("tpu", kernel, platforms=("tpu",), refuse=refusals.tpu),
        registry.Backend("tpu_interpret", interpreted, refuse=refusals.tpu, automatic=False),
    )
