"""A copy of a module for each modality: which one a token goes through, and three ways to get it
there (Mixture-of-Transformers, arXiv 2411.04996).

    table = Modalities(ids, 2)            the modality of each token id
    facts = TokenFacts(table(tokens))
    y = through(module, x, facts)         each token by its modality's copy; by the one there is

A module of copies is a grouped one: `GroupedLinear`, `GroupedNorm`, `GroupedFFN`, known by the
class attribute `by_group`. What `TokenFacts.order` holds decides the way:

    None, `Groups`   tokens are sorted and each is multiplied by its own matrix: work as of one copy
    `Blocks`         modalities lie in blocks known beforehand, which are cut out
    `EveryCopy`      all copies run on all tokens and one result is kept: what the others must equal
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float, Int

from ffnlab.errors import ConfigError, is_known
from ffnlab.layers.context import TokenFacts
from ffnlab.layers.exchange import mixed
from ffnlab.layers.feed_forward.ffn import FFN, GatedFFN
from ffnlab.layers.feed_forward.moe import GroupedFFN
from ffnlab.layers.grouped import GroupedLinear, GroupedNorm, group
from ffnlab.layers.linear import Linear
from ffnlab.layers.norms import LayerNorm, RMSNorm
from ffnlab.layers.routers import by_modality
from ffnlab.layers.stacking import Statistic, stack_modules, with_axes
from ffnlab.weights import register, static

__all__ = ["Blocks", "EveryCopy", "Modalities", "alone", "grouped", "modality_of", "through"]

Copied = GroupedFFN | GroupedLinear | GroupedNorm
Host = Array | np.ndarray
Single = FFN | GatedFFN | LayerNorm | Linear | RMSNorm


@register
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Modalities lie in blocks, the same in every row of a batch.

    Attributes:
      blocks: (modality, tokens) of each block, in order (static).
    """

    blocks: tuple[tuple[int, int], ...] = static()


@register
@dataclasses.dataclass(frozen=True)
class EveryCopy:
    """All copies run on all tokens, which takes as many times the work as there are copies."""


class Modalities(nnx.Module):
    """The modality of each token id.

    Attributes:
      ids: Statistic [vocab] int32, in 0 .. count - 1.
      count: of modalities (static).
    """

    def __init__(self, ids: Int[Host, "v"], count: int):
        """A table.

        Raises:
          ConfigError: it holds a modality that has no copy.
        """
        if is_known(ids):
            check_modalities(ids, count)
        self.ids = Statistic(jnp.asarray(ids, jnp.int32), axes=("vocab",))
        self.count = count

    def __call__(self, tokens: Int[Array, "*b"]) -> Int[Array, "*b"]:
        """The modality of tokens; of an id outside the vocabulary, that of the one embedded."""
        return jnp.take(self.ids.get_value(), tokens, mode="clip")

    def told(self, tokens: Int[Array, "b t"] | None, facts: TokenFacts) -> TokenFacts:
        """What is known of tokens, with their modality and an order by it.

        Args:
          tokens: ids; None where there are none, and the caller tells the modality.
          facts: what the caller knows; a modality of its own is kept.
        Raises:
          ConfigError: a modality that has no copy, or blocks that are not those of the tokens.
        """
        modality = facts.modality
        if modality is not None:
            if tokens is not None and modality.shape != tokens.shape:
                raise ConfigError(
                    f"modality {modality.shape} of tokens {tokens.shape}; one for each is accepted"
                )
            check_modalities(modality, self.count)
        elif tokens is not None:
            modality = self(tokens)
        else:
            return facts
        if isinstance(facts.order, Blocks):
            check_blocks(facts.order, modality)
        order = group(modality, self.count) if facts.order is None else facts.order
        return facts._replace(modality=modality, order=order)


def check_modalities(modality: Int[Array, "*b"], count: int) -> None:
    """Raises ConfigError for a modality outside 0 .. count - 1.

    Of values that are not known yet `jax.experimental.checkify` tells, where the caller has it.
    """
    if is_known(modality):
        found = np.asarray(modality)
        wrong = found[(found < 0) | (found >= count)]
        if wrong.size:
            raise ConfigError(
                f"modality {int(wrong[0])} of {wrong.size} tokens has no copy; 0 to {count - 1} are"
            )
        return
    is_good = jnp.all((modality >= 0) & (modality < count))
    checkify.debug_check(is_good, f"a modality outside 0 .. {count - 1} has no copy")


def check_blocks(order: Blocks, modality: Int[Array, "b t"]) -> None:
    """Raises ConfigError unless blocks say of every row what the tokens do."""
    said = np.repeat([m for m, _ in order.blocks], [n for _, n in order.blocks])
    if len(said) != modality.shape[-1]:
        raise ConfigError(
            f"blocks={order.blocks} are of {len(said)} tokens, the rows of {modality.shape[-1]}"
        )
    if is_known(modality) and (np.asarray(modality) != said).any():
        raise ConfigError(f"blocks={order.blocks} are not the modalities of the tokens")


def modality_of(masks: Sequence[Bool[Host, "*b"]] | Bool[Host, "m *b"]) -> Int[Array, "*b"]:
    """The modality of each token, of one mask per modality.

    Args:
      masks: whether a token is of each modality; a partition.
    Returns:
      the number of the one mask that holds, int32.
    Raises:
      ConfigError: no masks, masks of several shapes or that are not bool; masks that overlap or
        leave a token out, of which checkify tells where they are not known yet.

    >>> modality_of(jnp.array([[True, False, True], [False, True, False]]))
    Array([0, 1, 0], dtype=int32)
    """
    each = [jnp.asarray(mask) for mask in masks]
    if len({mask.shape for mask in each}) != 1 or any(mask.dtype != bool for mask in each):
        found = [f"{mask.dtype} {mask.shape}" for mask in each]
        raise ConfigError(f"masks are {found}; bool of one shape, for each modality, are accepted")
    masks = jnp.stack(each)
    held = jnp.sum(masks, axis=0)
    if is_known(held):
        twice, never = int((held > 1).sum()), int((held == 0).sum())
        if twice or never:
            raise ConfigError(
                f"masks: {twice} tokens are in several, {never} in none; a partition is accepted"
            )
    else:
        checkify.debug_check(jnp.all(held == 1), "masks are no partition of the tokens")
    return jnp.argmax(masks, axis=0).astype(jnp.int32)


def through(
    module: nnx.Module, x: Float[Array, "b t *h d"], facts: TokenFacts | None
) -> Float[Array, "b t *h out"]:
    """module(x); of a module of copies, each token by the copy of its modality.

    Args:
      module: any module of one argument, or a grouped one.
      x: tokens; of a norm there may be heads before the last axis.
      facts: of the tokens, asked for only by modules of copies.
    Raises:
      ConfigError: a module of copies, and the modality of the tokens is not known or has no copy.
    """
    if not getattr(module, "by_group", False):
        return module(x)
    facts = TokenFacts() if facts is None else facts
    if isinstance(facts.order, Blocks):
        return by_blocks(module, x, facts.order)
    if facts.modality is None:
        raise ConfigError(
            "this model has a copy of its modules for each modality, and that of the tokens is not "
            "known: it takes token ids, or facts=TokenFacts(modality=...), [b, t] int"
        )
    if facts.order is None:
        check_modalities(facts.modality, module.groups)
    if isinstance(facts.order, EveryCopy):
        return selected(module, x, facts.modality)
    if isinstance(module, GroupedNorm):
        return module.each(x, facts.modality)
    # Padding is treated as any token, as everywhere else in a model.
    routing = by_modality(TokenFacts(facts.modality), module.groups)
    return mixed(module, x, routing, groups=facts.order)


def selected(module: Copied, x: Array, modality: Int[Array, "b t"]) -> Array:
    """Every copy's result, of which each token keeps its own."""
    each = jnp.stack([alone(module, i)(x) for i in range(module.groups)])
    chosen = modality == jnp.arange(module.groups).reshape(-1, *(1,) * modality.ndim)
    chosen = chosen.reshape(*chosen.shape, *(1,) * (x.ndim - modality.ndim))
    return jnp.sum(jnp.where(chosen, each, jnp.zeros((), each.dtype)), axis=0)


def by_blocks(module: Copied, x: Array, order: Blocks) -> Array:
    """Each block by its modality's copy."""
    sizes = [n for _, n in order.blocks]
    wrong = [m for m, _ in order.blocks if not 0 <= m < module.groups]
    if wrong or sum(sizes) != x.shape[1]:
        raise ConfigError(
            f"blocks={order.blocks}: {x.shape[1]} tokens of modalities 0 to {module.groups - 1} "
            "are accepted"
        )
    parts = jnp.split(x, np.cumsum(sizes)[:-1], axis=1)
    copies = {m: alone(module, m) for m, _ in order.blocks}
    pairs = zip(order.blocks, parts, strict=True)
    return jnp.concatenate([copies[m](part) for (m, _), part in pairs], axis=1)


def grouped(modules: Sequence[Single], *, group_axis: str = "expert") -> Copied:
    """Alike modules as one of copies, the first for modality 0; the opposite of `alone`.

    Args:
      modules: `Linear`s, norms or FFNs, all of one kind, size and format.
      group_axis: logical name of the axis of copies.
    Raises:
      ConfigError: none, one that has no grouped form, or modules that differ.
    """
    first = modules[0] if len(modules) else None
    if not isinstance(first, Single):
        raise ConfigError(f"{type(first).__name__} has no form of copies; {Single} have")
    if len({(jax.tree.structure(m), shapes(m)) for m in modules}) > 1:
        raise ConfigError("modules differ in kind, size or format; alike ones are accepted")
    if isinstance(first, RMSNorm | LayerNorm):
        return GroupedNorm(modules, group_axis=group_axis)
    if isinstance(first, Linear):
        return as_grouped(modules, group_axis)
    new = bare(lambda key: GroupedFFN(1, 1, 1, key=key, activation=first.activation))
    for name in ("gate", "up", "down"):
        parts = [getattr(m, name, None) for m in modules]
        setattr(new, name, nnx.data(None if parts[0] is None else as_grouped(parts, group_axis)))
    return new


def as_grouped(linears: Sequence[Linear], group_axis: str) -> GroupedLinear:
    """Linear maps as one grouped one."""
    stacked = with_axes(stack_modules(list(linears)), lambda axes: (group_axis, *axes[1:]))
    new = bare(lambda key: GroupedLinear(1, 1, 1, key=key, axes=("", "")))
    new.w, new.b = stacked.w, nnx.data(stacked.b)
    return new


def alone(module: Copied, i: int) -> Single:
    """One of the copies, as a module of its own."""
    if isinstance(module, GroupedNorm):
        return of_group(module.norms, i)
    if isinstance(module, GroupedLinear):
        own = of_group(module, i)
        new = bare(lambda key: Linear(1, 1, key=key, axes=("", "")))
        new.w, new.b = own.w, nnx.data(own.b)
        return new
    kind = FFN if module.gate is None else GatedFFN
    new = bare(lambda key: kind(1, 1, key=key, activation=module.activation))
    for name in ("gate", "up", "down"):
        if getattr(module, name) is not None:
            setattr(new, name, alone(getattr(module, name), i))
    return new


def of_group(module: nnx.Module, i: int) -> nnx.Module:
    """The i-th of what every array of a module has on its first axis."""
    return jax.tree.map(lambda leaf: leaf[i], with_axes(module, lambda axes: axes[1:]))


def bare(make: Callable[[Array], nnx.Module]) -> nnx.Module:
    """A module whose arrays are still to be put in."""
    return jax.eval_shape(make, jax.random.key(0))


def shapes(module: nnx.Module) -> tuple:
    """Shape and dtype of every array."""
    return tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(module))
