"""A choice of one among unlike sublayers for each token (Duo-LLM, arXiv 2410.10846)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.layers.context import Context, LayerInputs
from ffnlab.layers.linear import Linear
from ffnlab.layers.routers import Routing, fixed, softmax_top_k

__all__ = ["ByChoice"]


class ByChoice(nnx.Module):
    """y = branch_c(x) of the choice c of each token; of a soft choice, sum_c P_c branch_c(x).

    The choice of a token is what `LayerInputs.choice` says; without, that of the router; without
    one, the first branch. A choice past the last is none and adds nothing, and so is that of a
    router whose logits hold a NaN. One token by itself runs its own branch only (`lax.switch`),
    and more of them run all; what it does not run is not read either where blocks are in a list: a
    scan over a stack takes out the weights of whole layers.

    Attributes:
      branches: nnx.List of modules [b, t, d] -> [b, t, d].
      router: Linear [d, choices], or None.
      temperature: [] float32; the router's choice is soft, P = softmax(logits / temperature), and
        gradients reach it. None, as in a model that is saved: the largest logit decides.
      skip: whether there is one more choice, the last, that adds nothing (static).
    """

    informed = True

    def __init__(
        self, branches: Sequence[nnx.Module], *, skip: bool = False, router: Linear | None = None
    ):
        self.branches = nnx.List(list(branches))
        self.skip = skip
        if self.choices < 2:
            raise ConfigError(f"branches: {len(branches)}, skip={skip}: there is nothing to choose")
        if router is not None and router.weight.shape[1] != self.choices:
            raise ConfigError(
                f"router has {router.weight.shape[1]} columns for {self.choices} choices"
            )
        self.router = nnx.data(router)
        self.temperature: Float[Array, "*n"] | None = nnx.data(None)

    @property
    def choices(self) -> int:
        """How many there are."""
        return len(self.branches) + self.skip

    def __call__(
        self, x: Float[Array, "b t d"], context: Context, inputs: LayerInputs
    ) -> tuple[Float[Array, "b t d"], Routing]:
        """Returns (y, the choice of each token, k = 1)."""
        valid = None if context.tokens is None else context.tokens.valid
        if inputs.choice is None and self.router is not None:
            logits = self.router(x).astype(jnp.float32)
            soft = 1.0 if self.temperature is None else self.temperature
            routing = softmax_top_k(logits / soft, 1, valid=valid)
            if self.temperature is not None:
                parts = [routing.scores[..., i, None] * f(x) for i, f in enumerate(self.branches)]
                return sum(parts[1:], parts[0]).astype(x.dtype), routing
        else:
            first = jnp.zeros(x.shape[:2], jnp.int32)
            choice = first if inputs.choice is None else inputs.choice
            routing = fixed(choice, self.choices, valid=valid)
        chosen = routing.chosen[..., 0]
        if chosen.size == 1:
            nothing = [jnp.zeros_like] * (1 + self.skip)
            return jax.lax.switch(chosen.reshape(()), [*self.branches, *nothing], x), routing
        y = jnp.zeros_like(x)
        for i, branch in enumerate(self.branches):
            y = jnp.where((chosen == i)[..., None], branch(x), y)
        return y, routing

    def softened(self, temperature: Float[Array, ""] | None) -> "ByChoice":
        """This layer with a soft choice at a temperature; None makes it hard again.

        Raises:
          ConfigError: there is no router to choose softly.
        """
        if temperature is not None and self.router is None:
            raise ConfigError("this layer has no router; `ffnlab.routing.with_routers` adds one")
        new = jax.tree.map(lambda leaf: leaf, self)
        if temperature is not None:  # a stacked layer has one for each of its layers
            ahead = jax.tree.leaves(self.router)[0].shape[:-2]
            temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), ahead)
        new.temperature = nnx.data(temperature)
        return new

    def runs(self, share: Sequence[float] | None) -> dict[str, float]:
        """How often a token runs each branch, by path (`ffnlab.models.account`).

        Args:
          share: of tokens that take each choice; all take the first when None.
        Raises:
          ConfigError: not one share in [0, 1] for each choice, or they do not add up to 1.
        """
        share = [1.0, *[0.0] * (self.choices - 1)] if share is None else list(share)
        good = all(0 <= x <= 1 for x in share) and abs(sum(share) - 1) < 1e-6
        if len(share) != self.choices or not good:
            raise ConfigError(
                f"share={share}: one share for each of {self.choices} choices, 1 together, is "
                "accepted"
            )
        return {f"branches[{i}]": share[i] for i in range(len(self.branches))}
