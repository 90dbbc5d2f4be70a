"""Mixture-of-Transformers: a copy of a block's weights for each modality, and one attention.

A stream mixes text, image and other tokens. What is not attention itself (queries, keys, values and
outputs, the FFN, the norms) has a copy for each modality, and a token goes through that of its own,
which its id tells: a table over the vocabulary is part of the model, so that it trains, decodes and
is saved like any other. Operations of a token stay those of one copy.

    model, _ = transform.apply(untie(starts=(256,)), model)    # ids from 256 on are images
    model.modalities(tokens)                                   # 0 or 1 of each

What differs from the authors' code, and why:
- Theirs is an FFN and an attention of torch with masks as arguments; `modality_of` makes of masks
  what `TokenFacts.modality` takes. Its merge of more than one modality raises an error, and its
  attention cannot be built; both are read as the paper says.
- Their norm stands after a sublayer, before the sum: `norm="output"`. By default it stays where the
  decoder has it, so that tied copies are the dense model exactly.
- The final norm, embeddings and head stay shared.

Source: Mixture-of-Transformers (arXiv 2411.04996) and the authors' repository.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ffnlab.errors import ConfigError, at_least, check_seed
from ffnlab.layers import FFN, Block, GatedFFN, LayerNorm, Linear, Modalities, RMSNorm
from ffnlab.layers.modality import grouped, modality_of
from ffnlab.models import Decoder
from ffnlab.models.decoder import make_block
from ffnlab.models.rewriting import key_of, rewriting
from ffnlab.transform import Transform

__all__ = ["PARTS", "modality_of", "untie"]

Part = Literal["ffn", "attn_qkv", "attn_o", "norms"]
PARTS: tuple[Part, ...] = get_args(Part)
# Where each part lies in a block, and what of it has copies.
PLACES: dict[str, tuple[str, ...]] = {
    "ffn": ("ffn",),
    "attn_qkv": ("attn.q", "attn.k", "attn.v"),
    "attn_o": ("attn.o",),
    "norms": (
        *("attn_norm", "ffn_norm", "post_attn_norm", "post_ffn_norm"),
        *("attn.q_norm", "attn.k_norm"),
    ),
}
KINDS: dict[str, tuple[type, ...]] = {
    "ffn": (FFN, GatedFFN),
    "attn_qkv": (Linear,),
    "attn_o": (Linear,),
    "norms": (RMSNorm, LayerNorm),
}


def untie(
    *,
    starts: tuple[int, ...] | None = None,
    table: Array | np.ndarray | None = None,
    modalities: int | None = None,
    parts: tuple[Part, ...] = PARTS,
    copies: Literal["tied", "drawn"] = "tied",
    norm: Literal["output"] | None = None,
    seed: int = 0,
) -> Transform:
    """A copy of a decoder's weights for each modality of its tokens.

    Args:
      starts: first token id of modality 1, of modality 2 and so on, ascending; modality 0 has those
        before. No numbers: one modality.
      table: [vocab] modality of each id, where they are not in ranges, instead of `starts`.
      modalities: how many, where it is more than these have.
      parts: of a block that get copies: "ffn", "attn_qkv", "attn_o", "norms" (those of queries and
        keys too).
      copies: "tied" are alike at first, so that the model computes the same; "drawn" ones are
        drawn each for itself, but for modality 0, whose copy is what stood there.
      norm: "output" puts the norm of a sublayer after it, before the sum, as the authors do; None
        leaves it where it is.
      seed: of what is drawn.
    Returns:
      a transform that observes nothing; of a model, `Decoder.modalities` becomes the table.
    Raises:
      ConfigError: neither starts nor table or both, other parts, a table with a modality that has
        no copy; of a model, it is no decoder or has a table already, the table is of another
        vocabulary, or a part is nothing that has a form of copies.

    >>> untie(starts=(32,)).name
    'untie'
    """
    if (starts is None) == (table is None):
        raise ConfigError(f"starts={starts} and table: exactly one of them is accepted")
    if not parts or not set(parts) <= set(PARTS):
        raise ConfigError(f"parts={parts}: one or more of {list(PARTS)} are accepted")
    if copies not in ("tied", "drawn") or norm not in ("output", None):
        raise ConfigError(
            f"copies={copies!r}, norm={norm!r}: 'tied' or 'drawn', and 'output' or None"
        )
    at_least(1, modalities=modalities)
    check_seed(seed)
    count = counted(starts, table, modalities)

    def problems(model: Any) -> list[str]:
        if not isinstance(model, Decoder):
            return [f"model is a {type(model).__name__}; a Decoder is accepted"]
        if model.modalities is not None:
            return ["the model has copies for modalities already"]
        return [
            *misfit(starts, table, model.config.vocab),
            *(f for i, b in enumerate(model.blocks()) for f in unfit(b, f"layers[{i}]", parts)),
            *(["norm='output': the decoder has norms there already"] * sandwiched(model, norm)),
        ]

    def change(model: Decoder) -> Decoder:
        new = jax.tree.map(lambda leaf: leaf, model)
        ids = table_of(starts, table, model.config.vocab)
        for i, block in enumerate(new.layers):
            others = [] if copies == "tied" else drawn(model, i, count - 1, seed)
            new.layers[i] = with_copies(block, others, count, parts)
            if norm is not None:
                joins = tuple(dataclasses.replace(join, norm=norm) for join in block.joins)
                new.layers[i].joins = joins
        new.modalities = Modalities(ids, count)
        return new

    return rewriting("untie", problems, change)


def counted(
    starts: Sequence[int] | None, table: Array | np.ndarray | None, modalities: int | None
) -> int:
    """How many modalities there are.

    Raises:
      ConfigError: ranges that are none, a table that is none, or more modalities than copies.
    """
    if starts is not None:
        if any(b <= a for a, b in zip((0, *starts), starts, strict=False)):
            raise ConfigError(f"starts={starts}: ascending numbers above 0 are accepted")
        found = len(starts) + 1
    else:
        table = np.asarray(table)
        if table.ndim != 1 or not np.issubdtype(table.dtype, np.integer) or not table.size:
            raise ConfigError(f"table is {table.shape} {table.dtype}; [vocab] integers are taken")
        if table.min() < 0:
            raise ConfigError(f"table holds {table.min()}; modalities are 0, 1, …")
        found = int(table.max()) + 1
    if modalities is not None and modalities < found:
        raise ConfigError(
            f"modalities={modalities}: a token is of modality {found - 1}, which has no copy"
        )
    return modalities or found


def table_of(
    starts: Sequence[int] | None, table: Array | np.ndarray | None, vocab: int
) -> Int[Array, "v"]:
    """The modality of each id."""
    if starts is None:
        return jnp.asarray(table, jnp.int32)
    return jnp.asarray(np.searchsorted(np.asarray(starts, int), np.arange(vocab), "right"))


def misfit(starts: Sequence[int] | None, table: Array | np.ndarray | None, vocab: int) -> list[str]:
    """What is wrong with a table for a vocabulary."""
    if starts is None:
        wrong = len(np.asarray(table)) != vocab
        return [f"table is of {len(np.asarray(table))} ids, the vocabulary of {vocab}"] * wrong
    wrong = bool(starts) and starts[-1] >= vocab
    return [f"starts={tuple(starts)}: the vocabulary has {vocab} ids"] * wrong


def unfit(block: Any, path: str, parts: Sequence[str]) -> list[str]:
    """Which parts of a block have no form of copies."""
    if not isinstance(block, Block):
        return [f"{path} is a {type(block).__name__}; a Block is accepted"]
    found = []
    for part in parts:
        for place in PLACES[part]:
            node = at(block, place)
            if node is not None and not isinstance(node, KINDS[part]):
                kinds = " or ".join(kind.__name__ for kind in KINDS[part])
                found.append(f"{path}.{place} is a {type(node).__name__}; {kinds} are accepted")
    return found


def sandwiched(model: Decoder, norm: str | None) -> bool:
    """Whether a norm is to be put where there is one."""
    posts = (getattr(b, f"post_{name}_norm") for b in model.blocks() for name in ("attn", "ffn"))
    return norm is not None and any(post is not None for post in posts)


def at(block: Block, place: str) -> Any:
    """What stands at a place of a block; None where nothing does."""
    node: Any = block
    for name in place.split("."):
        node = getattr(node, name, None)
    return node


def drawn(model: Decoder, layer: int, count: int, seed: int) -> list[Block]:
    """Further blocks as the one of a layer, drawn each for itself."""
    key, dtype = key_of(seed, f"layers[{layer}]"), model.embed.weight.dtype
    keys = jax.random.split(key, count) if count else []
    return [make_block(model.config, layer, key=one, dtype=dtype) for one in keys]


def with_copies(block: Block, others: Sequence[Block], count: int, parts: Sequence[str]) -> Block:
    """A block with copies of its parts: of itself, or of itself and others.

    Raises:
      ConfigError: others that differ from it.
    """
    new = jax.tree.map(lambda leaf: leaf, block)
    for place in (place for part in parts for place in PLACES[part]):
        node = at(block, place)
        if node is None:
            continue
        same = [node] * count if not others else [node, *(at(other, place) for other in others)]
        if jax.tree.structure(same[-1]) != jax.tree.structure(node):
            raise ConfigError(
                f"copies='drawn': {place} is not as the decoder's configuration makes it; draw "
                "before other changes, or use copies='tied'"
            )
        holder, _, name = place.rpartition(".")
        setattr(at(new, holder) if holder else new, name, grouped(same))
    return new
