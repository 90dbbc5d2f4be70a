"""Rematerialization: blocks that are computed again in the backward pass instead of stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from ffnlab.errors import ConfigError

if TYPE_CHECKING:
    from ffnlab.layers import Block
    from ffnlab.models.decoder import Decoder

__all__ = ["POLICIES", "remat", "run_block"]

# What a block keeps for its backward pass, besides its input.
POLICIES: dict[str, Callable[..., Any]] = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat(model: Decoder, policy: str | None) -> Decoder:
    """The same decoder, whose blocks keep less for the backward pass.

    Args:
      model: stacked or not.
      policy: "nothing" keeps only each block's input; "products" also the results of its matrix
        products with parameters; None everything.
    Raises:
      ConfigError: another policy.
    """
    if policy is not None and policy not in POLICIES:
        raise ConfigError(f"policy={policy!r} is not one of {[*POLICIES, None]}")
    new = jax.tree.map(lambda leaf: leaf, model)
    new.remat = policy
    return new


def run_block(
    block: Block, policy: str | None, h: jax.Array, context: Any, **options: Any
) -> tuple:
    """A block's output and cache, by a policy; a block with a cache is not differentiated."""
    if policy is None or options.get("cache") is not None:
        return block(h, context, **options)
    again = jax.checkpoint(lambda b, h, c, o: b(h, c, **o), policy=POLICIES[policy])
    return again(block, h, context, options)
