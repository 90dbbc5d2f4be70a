"""Span answers by a mixture of experts on an encoder (Robust QA, arXiv 2204.09598, 2022).

Two heads on the last hidden states h of an encoder, and a linear map to the logits of an answer's
start and end:

    top2_head     y = sum of the two best experts, weighted; no residual, so a token that both drop
                  is 0. Balanced by first choices of each sequence:
                  routed(span, balance=1.0, choices=1, per_sequence=True, keyed=True)
    switch_head   blocks h + attn(norm h), h + Switch(norm h), a norm; y = p_e expert_e(x) of the
                  one best expert e: routed(span, balance=0.01 * layers)

Both are blocks behind those of the encoder, which is an `Encoder` as before: what prunes,
quantizes, stacks and saves one takes it. With `experts=1` either is the dense head of the same
width. Out of domain the paper adds augmented questions (`ffnlab.data.eda`).

Different from the authors' code (yuanzhedong/cs224n_robustqa): the router is drawn from N(0, 1 / d)
and not N(0, 1), which starts as a certain choice that learns nothing, experts from N(0, 1 / in) and
each for itself (their Switch has copies of one; `alike`). Padding is neither routed nor counted
where `valid` says which it is. What they draw anew in evaluation ("random") is "threshold" without
a key. Their loss of the top-2 head is added with weight 1, whatever `loss_coef` says, and that of
Switch is a sum over layers, `losses.routed` takes means. Blocks have no dropout.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from ffnlab import tree
from ffnlab.errors import ConfigError, at_least, check_seed
from ffnlab.layers import Attention, AttentionSpec, Block, Join, LayerNorm, Linear, MoE, MoESpec
from ffnlab.models import Encoder
from ffnlab.models.rewriting import rewriting
from ffnlab.transform import Transform

__all__ = ["evaluated", "switch_head", "top2_head"]

LEAST = 4  # tokens that an expert of the top-2 head takes, however few there are


def top2_head(
    *,
    experts: int = 16,
    hidden: int | None = None,
    capacity: float = 1.25,
    policy: str = "random",
    threshold: float = 0.2,
    seed: int = 0,
) -> Transform:
    """A mixture of experts, two for each token, and span logits on an encoder.

    Args:
      experts: how many, >= 1; the only one is a dense FFN.
      hidden: channels of an expert, 4 times the encoder's width when None.
      capacity: an expert takes capacity * tokens / experts of a sequence, and 4 at least.
      policy: which second choices stay: "all", "none", "threshold" (those of larger weight) or
        "random" (with probability weight / threshold).
      threshold: > 0.
      seed: of the draw.
    Returns:
      a transform of Encoders which observes nothing; another head goes.
    Raises:
      ConfigError: an option out of range; of a model, it is no Encoder, or routes already.

    >>> from ffnlab import transform
    >>> from ffnlab.testing import tiny_encoder
    >>> model, _ = transform.apply(top2_head(experts=4), tiny_encoder())
    >>> model(jnp.zeros((1, 5), jnp.int32)).shape, len(model.layers)
    ((1, 5, 2), 4)
    """
    check_seed(seed)
    if not capacity > 0:
        raise ConfigError(f"capacity={capacity} must be positive")
    k = min(2, experts)
    spec = MoESpec(
        experts,
        k,
        1 if hidden is None else hidden,
        gated=False,
        capacity=capacity / max(k, 1),  # of the tokens, not of all their choices
        second=policy,
        threshold=threshold,
        least=LEAST,
    )

    def blocks(model: Encoder, key: Key[Array, ""]) -> list[Block]:
        width = model.config.width
        own = sized(spec, hidden, width)
        moe = MoE(width, own, key=key, activation="leaky_relu", dtype=dtype_of(model))
        # The attention of an ordinary block is absent, as if it had been removed.
        return [Block(None, None, None, moe, joins=(Join(), Join(residual=False)))]

    return headed("top2_head", blocks, seed, norm=False)


def switch_head(
    *,
    experts: int = 16,
    hidden: int | None = None,
    layers: int = 8,
    heads: int = 8,
    capacity: float | None = None,
    straight: bool = False,
    alike: bool = False,
    seed: int = 0,
) -> Transform:
    """Transformer blocks whose FFNs are Switch layers, and span logits on an encoder.

    Args:
      experts: of each block, >= 1.
      hidden: channels of an expert, 4 times the encoder's width when None.
      layers: blocks, >= 1.
      heads: of their attention; they divide the width.
      capacity: an expert takes capacity * tokens / experts of a batch, random ones where there is a
        key and else the first; other tokens pass as they are, times the probability. None for all,
        as the authors have it.
      straight: outputs are not scaled by the probability, which learns all the same.
      alike: all experts of a block begin equal, as the authors' do.
      seed: of the draw.
    Returns:
      a transform of Encoders which observes nothing; another head goes.
    Raises:
      ConfigError: an option out of range; of a model, it is no Encoder, routes already, or has a
        width that the heads do not divide.

    >>> from ffnlab import transform
    >>> from ffnlab.testing import tiny_encoder
    >>> made = switch_head(experts=2, layers=2, heads=2)
    >>> len(transform.apply(made, tiny_encoder())[0].layers)
    5
    """
    check_seed(seed)
    at_least(1, layers=layers, heads=heads)
    spec = MoESpec(
        experts,
        1,
        1 if hidden is None else hidden,
        gated=False,
        normalize=False,
        capacity=capacity,
        router_bias=True,
        straight=straight,
        queue="batch",
        drop="random",
        passes=True,
    )

    def blocks(model: Encoder, key: Key[Array, ""]) -> list[Block]:
        width = model.config.width
        if width % heads:
            raise ConfigError(f"heads={heads} does not divide the width {width} of the model")
        own = sized(spec, hidden, width)
        return [
            switch_block(width, own, heads, alike, key=k, dtype=dtype_of(model))
            for k in jax.random.split(key, layers)
        ]

    return headed("switch_head", blocks, seed, norm=True)


def switch_block(
    width: int, spec: MoESpec, heads: int, alike: bool, *, key: Key[Array, ""], dtype: jnp.dtype
) -> Block:
    """One block: norms before attention and before the Switch layer; biases everywhere."""
    attn_key, moe_key = jax.random.split(key)
    norm = functools.partial(LayerNorm, width, eps=1e-5, dtype=dtype)
    own = AttentionSpec(heads, heads, width // heads, rope=None, causal=False)
    attn = Attention(own, width, key=attn_key, qkv_bias=True, o_bias=True, dtype=dtype)
    moe = MoE(width, spec, key=moe_key, activation="relu", bias=True, dtype=dtype)
    if alike:
        first = lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape)  # noqa: E731
        moe.experts = jax.tree.map(first, moe.experts)
    return Block(norm(), attn, norm(), moe)


def headed(
    name: str,
    blocks: Callable[[Encoder, Key[Array, ""]], Sequence[Block]],
    seed: int,
    *,
    norm: bool,
) -> Transform:
    """The transform that puts blocks behind those of an encoder, and span logits behind them."""

    def problems(model: Any) -> list[str]:
        if not isinstance(model, Encoder):
            return [f"model is a {type(model).__name__}; an Encoder is accepted"]
        there = [path for path, node in tree.walk(model) if isinstance(node, MoE)]
        if there:
            return [f"{there[:3]} route already"]
        try:
            jax.eval_shape(lambda key: blocks(model, key), jax.random.key(0))
        except ConfigError as error:
            return [str(error)]
        return []

    def change(model: Encoder) -> Encoder:
        new, dtype = tree.copy(model), dtype_of(model)
        key, head_key = jax.random.split(jax.random.key(seed))
        new.layers = nnx.List([*new.layers, *blocks(model, key)])  # type: ignore[not-iterable]
        width, axes = model.config.width, ("embed", "classes")
        if norm:
            own = LayerNorm(width, eps=1e-5, dtype=dtype)
            new.norm = nnx.data(own)
        new.head = nnx.data(Linear(width, 2, key=head_key, axes=axes, bias=True, dtype=dtype))
        new.transform, new.head_bias = nnx.data(None), nnx.data(None)
        new.config = dataclasses.replace(
            model.config, layers=len(new.layers), head="span", classes=None, labels=None
        )
        return new

    return rewriting(name, problems, change)


def sized(spec: MoESpec, hidden: int | None, width: int) -> MoESpec:
    """The spec with as many channels as are asked for, or four times the width."""
    return dataclasses.replace(spec, hidden=4 * width if hidden is None else hidden)


def dtype_of(model: Encoder) -> jnp.dtype:
    """Of what is drawn beside an encoder."""
    return model.embed.weight.dtype


def evaluated(model: Any, *, capacity: float = 2.0, policy: str = "threshold") -> Any:
    """A model with a top-2 head as it is evaluated: more room, and nothing that is drawn.

    Args:
      model: with mixtures, in a list or stacked; one with a Switch head stays what it is.
      capacity: see `top2_head`; the authors evaluate with 2.0.
      policy: of second choices; the authors draw them, which gives another answer every time.
    Raises:
      SelectionError: it has no mixture.
      ConfigError: an option out of range.
    """
    if not capacity > 0:
        raise ConfigError(f"capacity={capacity} must be positive")

    def change(moe: Any) -> MoE:
        new, spec = tree.copy(moe), moe.spec
        if spec.capacity is not None and spec.queue == "sequence":
            new.spec = dataclasses.replace(spec, capacity=capacity / spec.k, second=policy)
        return new

    return tree.map_at(model, tree.of_type(MoE), change)
