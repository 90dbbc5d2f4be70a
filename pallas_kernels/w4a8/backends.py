"""The table of implementations of one public function."""

from pallas_kernels import backend as registry
from pallas_kernels.w4a8 import refusals


def table(name, xla, reference):
    """Backends of `name` ("matmul", "glu", "grouped"), fastest first.

    Args:
      name: the function's name in the files of the GPU kernels.
      xla, reference: what runs anywhere.
    Returns:
      a tuple of `Backend`.
    """
    return (
        registry.Backend(
            "sm90",
            registry.lazy("pallas_kernels.w4a8.sm90", name),
            platforms=("gpu",),
            refuse=refusals.sm90,
            at_least=(9, 0),
            below=(10, 0),
        ),
        registry.Backend(
            "sm90_interpret",
            registry.lazy("pallas_kernels.w4a8.sm90", name, interpret=True),
            refuse=refusals.sm90,
            automatic=False,
            jax=registry.INTERPRETER,
        ),
        registry.Backend("xla", xla),
        registry.Backend("reference", reference, automatic=False),
    )
