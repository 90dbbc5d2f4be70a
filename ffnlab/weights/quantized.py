"""What the weights of codes and scales share."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ffnlab.weights.activations import fake_e4m3
from ffnlab.weights.base import Weight
from ffnlab.weights.dense import Dense


class Quantized(Weight):
    """A matrix of codes with scales, whose values are float32.

    Attributes:
      act: None, or "e4m3": `matmul` first rounds x to e4m3 with one scale per row (static).
    """

    act: str | None

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float32)

    def matmul_grouped(
        self, x: Float[Array, "m in"], sizes: Int[Array, "e"]
    ) -> Float[Array, "m out"]:
        return super().matmul_grouped(fake_e4m3(x) if self.act == "e4m3" else x, sizes)

    def trains(self, field: str) -> bool:
        return False  # a step of an optimizer on codes or scales has no meaning

    def prepare(self, backend: str) -> Weight:
        # XLA on a CPU writes the dequantized matrix at every call; do it once.
        return Dense(self.dense(), self.act) if backend == "cpu" else self
