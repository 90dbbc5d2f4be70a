"""Mixtures of experts: a router sends each token to a few of many feed-forward networks."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ffnlab.errors import ConfigError
from ffnlab.layers import routers
from ffnlab.layers.activations import ACTIVATIONS, check_activation
from ffnlab.layers.context import Context, LayerInputs, TokenFacts
from ffnlab.layers.exchange import mixed
from ffnlab.layers.feed_forward.ffn import FFN, GatedFFN
from ffnlab.layers.grouped import GroupedLinear, Groups
from ffnlab.layers.linear import Linear
from ffnlab.layers.routers import Routing
from ffnlab.storage.structure import later
from ffnlab.weights import cost

__all__ = ["GroupedFFN", "MoE", "MoESpec"]

SCORES = {"softmax": routers.softmax_top_k, "sigmoid": routers.sigmoid_top_k}
CHOICES = {
    "second": routers.POLICIES,
    "queue": ("sequence", "batch"),
    "drop": routers.DROPS,
}


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
      capacity: an expert takes capacity * k * tokens / experts of a queue at most; None for all.
      router_bias: the router has a bias.
      second: which of a token's choices after its first stay (`routers.thinned`): "all", "none",
        "threshold" or "random"; what is drawn needs a key, and is "threshold" without one.
      threshold: of their weight.
      straight: the weight of the one choice is 1, with the gradient of its probability.
      least: tokens that an expert takes whatever `capacity` says.
      queue: who competes for an expert, the tokens of a "sequence" or of the "batch".
      drop: which of them go (`routers.limited`): the "last", the "lightest" or, where there is a
        key, "random" ones.
      passes: a choice that is dropped for capacity gives the token itself instead of nothing.
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
    second: str = later("all")
    threshold: float = later(0.2)
    straight: bool = later(False)
    least: int = later(1)
    queue: str = later("sequence")
    drop: str = later("last")
    passes: bool = later(False)

    def __post_init__(self) -> None:
        routers.check_k(self.k, self.experts)
        if self.hidden < 1 or (self.shared is not None and self.shared < 1):
            raise ConfigError(f"hidden={self.hidden} and shared={self.shared} must be positive")
        if self.score not in SCORES:
            raise ConfigError(f"score={self.score!r} is not one of {sorted(SCORES)}")
        if self.capacity is not None and not 0 < self.capacity < math.inf:
            raise ConfigError(f"capacity={self.capacity} must be positive, or None for no limit")
        for name, accepted in CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {accepted}")
        if not self.threshold > 0 or self.least < 1:
            raise ConfigError(f"threshold={self.threshold} and least={self.least} must be positive")
        if self.straight and (self.k > 1 or self.normalize):
            raise ConfigError(
                f"straight: with k={self.k} and normalize={self.normalize} a weight has no "
                "gradient of its own; k=1 and normalize=False are accepted"
            )


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
          context: whose `tokens.valid` says which of them are padding, and whose `tokens.key` is
            of what is drawn where the inputs have none.
          inputs: whose `key` is of what is drawn in this layer.
        """
        facts = TokenFacts() if context is None or context.tokens is None else context.tokens
        key = facts.key if inputs is None or inputs.key is None else inputs.key
        asked = self.asked(x, facts.valid, key)
        routing = self.within(asked, key)
        y = mixed(self.experts, x, routing)
        if self.spec.passes:
            lost = jnp.sum(asked.weight - routing.weight, axis=-1, keepdims=True)
            # Not 0 * x: what has no expert may hold a NaN.
            y = y + lost.astype(x.dtype) * jnp.where(lost > 0, x, 0)
        return (y if self.shared is None else y + self.shared(x)), routing

    def asked(
        self, x: Float[Array, "b t d"], valid: Bool[Array, "b t"] | None, key: Array | None
    ) -> Routing:
        """Where tokens ask to go, whatever the capacity."""
        spec = self.spec
        logits = self.router(x.astype(jnp.float32))
        routing = SCORES[spec.score](logits, spec.k, normalize=spec.normalize, valid=valid)
        routing = routers.straight(routing) if spec.straight else routing
        policy = "threshold" if spec.second == "random" and key is None else spec.second
        drawn = jax.random.fold_in(key, 0) if policy == "random" else None
        return routers.thinned(routing, policy, threshold=spec.threshold, key=drawn)

    def within(self, routing: Routing, key: Array | None) -> Routing:
        """Where they go: `asked`, without what is beyond capacity."""
        spec = self.spec
        if spec.capacity is None:
            return routing
        b, t, k = routing.chosen.shape
        is_whole = spec.queue == "batch"
        tokens = t * k * (b if is_whole else 1)
        capacity = routers.capacity_of(tokens, spec.experts, spec.capacity, least=spec.least)
        drop = "last" if spec.drop == "random" and key is None else spec.drop
        drawn = jax.random.fold_in(key, 1) if drop == "random" else None
        if not is_whole:
            return routers.limited(routing, capacity, drop=drop, key=drawn)
        in_a_row = jax.tree.map(lambda leaf: leaf.reshape(b * t, *leaf.shape[2:]), routing)
        found = routers.limited(in_a_row, capacity, drop=drop, key=drawn)
        return jax.tree.map(lambda leaf: leaf.reshape(b, t, *leaf.shape[1:]), found)

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
