"""Mixtures of experts: a router sends each token to a few of many feed-forward networks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.layers import routers
from ffnlab.layers.activations import ACTIVATIONS, check_activation
from ffnlab.layers.context import Context, LayerInputs, TokenFacts
from ffnlab.layers.feed_forward.dispatch import mixed
from ffnlab.layers.feed_forward.ffn import FFN, GatedFFN
from ffnlab.layers.grouped import GroupedLinear, Groups
from ffnlab.layers.linear import Linear
from ffnlab.layers.routers import Routing
from ffnlab.weights import cost

__all__ = ["GroupedFFN", "MoE", "MoESpec"]

SCORES = {"softmax": routers.softmax_top_k, "sigmoid": routers.sigmoid_top_k}


@dataclasses.dataclass(frozen=True)
class MoESpec:
    """What a mixture is, beside its width.

    Attributes:
      experts: how many (e).
      k: experts of a token.
      hidden: channels of an expert.
      gated: experts are gated FFNs, else plain ones.
      score: "softmax" or "sigmoid", what the logits of the router become.
      normalize: the weights of a token's experts sum to 1.
      shared: channels of an FFN that every token takes, beside its experts; None for none.
      capacity: an expert takes capacity * k * tokens / experts of a sequence at most; None for all.
      router_bias: the router has a bias.
    """

    experts: int
    k: int
    hidden: int
    gated: bool = True
    score: str = "softmax"
    normalize: bool = True
    shared: int | None = None
    capacity: float | None = None
    router_bias: bool = False

    def __post_init__(self) -> None:
        routers.check_k(self.k, self.experts)
        if self.hidden < 1 or (self.shared is not None and self.shared < 1):
            raise ConfigError(f"hidden={self.hidden} and shared={self.shared} must be positive")
        if self.score not in SCORES:
            raise ConfigError(f"score={self.score!r} is not one of {sorted(SCORES)}")
        if self.capacity is not None and not self.capacity > 0:
            raise ConfigError(f"capacity={self.capacity} must be positive, or None")


class GroupedFFN(nnx.Module):
    """Feed-forward networks of alike sizes, one for each group of rows.

    Attributes:
      gate: GroupedLinear [e, width, hidden], or None where they are plain.
      up: likewise; down: [e, hidden, width].
      activation: name of the non-linearity (static).
    """

    by_group = True

    def __init__(
        self,
        groups: int,
        width: int,
        hidden: int,
        *,
        key: Array,
        gated: bool = True,
        activation: str = "silu",
        bias: bool = False,
        out_scale: float = 1.0,
        dtype: DTypeLike = jnp.float32,
    ):
        check_activation(activation)
        keys, common = jax.random.split(key, 3), {"bias": bias, "dtype": dtype}
        into = lambda key: GroupedLinear(  # noqa: E731
            groups, width, hidden, key=key, axes=("embed", "mlp"), **common
        )
        self.gate = nnx.data(into(keys[0]) if gated else None)
        self.up = into(keys[1])
        self.down = GroupedLinear(
            groups, hidden, width, key=keys[2], axes=("mlp", "embed"), scale=out_scale, **common
        )
        self.activation = activation

    @property
    def groups(self) -> int:
        """How many networks there are (e)."""
        return self.up.groups

    def __call__(self, x: Float[Array, "m d"], groups: Groups) -> Float[Array, "m d"]:
        act = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(act(self.up(x, groups)), groups)
        return self.down(act(self.gate(x, groups)) * self.up(x, groups), groups)


class MoE(nnx.Module):
    """y = sum over a token's experts of weight * expert(x), + shared(x).

    Called `moe(x, context, inputs)` it gives (y, Routing), which a block puts among its reports.
    Padding and a token whose scores hold a NaN have no expert: their y is 0, or shared(x).

    Attributes:
      router: Linear [width, e], of float32 logits.
      experts: GroupedFFN.
      shared: FFN, GatedFFN or None.
      spec: static.
    """

    informed = True

    def __init__(
        self,
        width: int,
        spec: MoESpec,
        *,
        key: Array,
        activation: str = "silu",
        bias: bool = False,
        out_scale: float = 1.0,
        dtype: DTypeLike = jnp.float32,
    ):
        """Draws router and experts, every expert for itself.

        Args:
          width: of tokens (d).
          spec: sizes and rule.
          key: of the draw.
          activation: of the experts.
          bias: whether their maps have biases.
          out_scale: of what their `down` is drawn with.
          dtype: of the parameters.
        """
        router, experts, shared = jax.random.split(key, 3)
        options: dict[str, Any] = {"activation": activation, "bias": bias, "dtype": dtype}
        options["out_scale"] = out_scale
        names = ("embed", "router")  # not "expert": every device routes by all of it
        self.router = Linear(
            width, spec.experts, key=router, axes=names, bias=spec.router_bias, dtype=dtype
        )
        self.experts = GroupedFFN(
            spec.experts, width, spec.hidden, key=experts, gated=spec.gated, **options
        )
        kind = GatedFFN if spec.gated else FFN
        self.shared = nnx.data(
            None if spec.shared is None else kind(width, spec.shared, key=shared, **options)
        )
        self.spec = spec

    def __call__(
        self,
        x: Float[Array, "b t d"],
        context: Context | None = None,
        inputs: LayerInputs | None = None,
    ) -> tuple[Float[Array, "b t d"], Routing]:
        """Returns (y, routing).

        Args:
          x: tokens.
          context: whose `tokens.valid` says which of them are padding.
          inputs: not asked for.
        """
        facts = TokenFacts() if context is None or context.tokens is None else context.tokens
        routing = self.route(x, facts)
        y = mixed(self.experts, x, routing)
        return (y if self.shared is None else y + self.shared(x)), routing

    def route(self, x: Float[Array, "b t d"], facts: TokenFacts | None = None) -> Routing:
        """Where tokens go."""
        spec, valid = self.spec, None if facts is None else facts.valid
        logits = self.router(x.astype(jnp.float32))
        routing = SCORES[spec.score](logits, spec.k, normalize=spec.normalize, valid=valid)
        if spec.capacity is None:
            return routing
        tokens = x.shape[-2] * spec.k
        return routers.limited(routing, routers.capacity_of(tokens, spec.experts, spec.capacity))

    def flops_per_token(self, share: float | None = None) -> float:
        """Operations for a token: the router, k experts, the shared FFN.

        Args:
          share: of the k that are kept on average, where some are dropped; 1 when None.
        """
        kept = self.spec.k * (1.0 if share is None else share)
        always = cost.flops(self.router.weight)
        always += 0 if self.shared is None else flops_of(self.shared)
        return always + kept * flops_of(self.experts)


def flops_of(ffn: nnx.Module) -> int:
    """Operations of one row through an FFN; of a grouped one, through one of its groups."""
    parts = (getattr(ffn, name, None) for name in ("gate", "up", "down"))
    return sum(cost.flops(part.weight) for part in parts if part is not None)
