"""Small trainable parts on a model that stays as it is (parameter-efficient fine-tuning).

Each is a transform; `TRAINS` has the selector of what it trains, for `learning.backprop`:

    small, _ = transform.apply(adapters.lora(rank=8), model)
    rule = learning.backprop(trainable=adapters.TRAINS["lora"])

`merge` folds low-rank updates into plain matrices. They take any model of blocks, in a list or
stacked, and quantized weights stay what they are. Directories are read and written by
`ffnlab.formats.peft`.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers import FFN, Attention, Block, Linear
from ffnlab.layers.activations import check_activation
from ffnlab.models.encoder_config import EncoderConfig
from ffnlab.models.rewriting import key_of, rewriting
from ffnlab.transform import Transform
from ffnlab.tree import Predicate, Selector
from ffnlab.weights import Dense, LoRA, SparseInput, Weight

__all__ = ["TRAINS", "adapter", "biases", "head", "lora", "merge", "prompts"]

inside_blocks = tree.at("layers**") & tree.of_type(Linear)
INSERTED = "adapter"  # slots of inserted networks are called "attn_adapter", "ffn_adapter"

TRAINS: Mapping[str, Selector] = MappingProxyType(
    {
        "lora": tree.of_type(LoRA),
        "adapter": tree.at(f"layers**_{INSERTED}**"),
        "prompts": tree.at("layers**.prefix"),
        "biases": tree.of_type(nnx.Param) & (tree.at("layers**.b") | tree.at("layers**.bias")),
        "head": tree.at("head"),
    }
)


def lora(
    *, rank: int = 8, alpha: float = 16.0, where: Predicate = inside_blocks, seed: int = 0
) -> Transform:
    """Low-rank updates beside the matrices of linear maps.

    w + (alpha / rank) a b,  a drawn from N(0, 1 / in), b zero: the model computes the same

    Args:
      rank: columns of a and rows of b, >= 1 and at most the smaller side of each matrix.
      alpha: scale of the update.
      where: which `Linear` layers get one, by their paths in the list form.
      seed: of the draw.
    Returns:
      a transform that observes nothing; the matrices themselves, of any format, do not train.
    Raises:
      ConfigError: rank < 1; of a model, a rank that a matrix has not, or an update that is there.
    Source:
      LoRA (arXiv 2106.09685), section 4.1.

    >>> lora(rank=4).observe is None
    True
    """
    check_count("rank", rank)

    def problems(model: Any) -> list[str]:
        found = tree.select(model, chosen(where))
        there = [path for path, m in found.items() if isinstance(m.weight, LoRA)]
        thin = [path for path, m in found.items() if rank > min(m.weight.shape)]
        said = [f"{there[:3]} have low-rank updates already"] if there else []
        return said + ([f"rank={rank} is more than {thin[:3]} have"] if thin else [])

    def change(model: Any) -> Any:
        return tree.map_at_path(
            model,
            chosen(where),
            lambda path, m: m.replace(LoRA.init(m.weight, rank, key_of(seed, path), alpha=alpha)),
        )

    return rewriting("lora", problems, change)


def adapter(*, bottleneck: int = 16, activation: str = "gelu", seed: int = 0) -> Transform:
    """A small network after attention and FFN of every block, on the residual stream.

    h <- h + up(act(down(h))), up zero: the model computes the same

    Args:
      bottleneck: channels between the two maps, >= 1.
      activation: see `ffnlab.layers`.
      seed: of the draw.
    Returns:
      a transform that observes nothing; the networks are slots "attn_adapter" and "ffn_adapter".
    Raises:
      ConfigError: an option out of range, or a model that has adapters.
    Source:
      Adapter modules (arXiv 1902.00751), their bottleneck; in series, as there, but with the skip
      around each alone.
    """
    check_count("bottleneck", bottleneck)
    check_activation(activation)

    def problems(model: Any) -> list[str]:
        there = [path for path, block in blocks(model).items() if with_adapters(block)]
        return [f"{there[:3]} have adapters already"] if there else []

    def inserted(path: str, block: Block) -> Block:
        width = width_of(block)
        for slot in block.slots:
            name = f"{slot}_{INSERTED}"
            key = key_of(seed, f"{path}.{name}")
            network = FFN(width, bottleneck, key=key, activation=activation, out_scale=0.0)
            block = block.with_slot(name, network, after=slot)
        return block

    def change(model: Any) -> Any:
        return tree.replace(model, {p: inserted(p, b) for p, b in blocks(model).items()})

    return rewriting("adapter", problems, change)


def prompts(*, tokens: int = 20, seed: int = 0) -> Transform:
    """Keys and values of further positions before those of every self-attention (deep prompts).

    Args:
      tokens: positions, >= 1.
      seed: of the draw, from N(0, 0.02^2).
    Returns:
      a transform that observes nothing. The model changes at once: every query attends to the new
      positions too.
    Raises:
      ConfigError: tokens < 1, or a model that has prompts, or no attention.
    Source:
      Prefix-tuning (arXiv 2101.00190) without its network; P-tuning v2 (arXiv 2110.07602).
    """
    check_count("tokens", tokens)

    def problems(model: Any) -> list[str]:
        there = [path for path, m in attentions(model).items() if m.prefix is not None]
        return [f"{there[:3]} have prompts already"] if there else []

    def prefixed(path: str, attention: Attention) -> Attention:
        new, spec = tree.copy(attention), attention.spec
        shape = (2, tokens, spec.kv_heads, spec.head_dim)
        values = 0.02 * jax.random.normal(key_of(seed, path), shape, jnp.float32)
        new.prefix = nnx.data(nnx.Param(values, axes=(None, None, "kv_heads", "head_dim")))
        return new

    def change(model: Any) -> Any:
        return tree.replace(model, {p: prefixed(p, m) for p, m in attentions(model).items()})

    return rewriting("prompts", problems, change)


def biases(*, where: Predicate = inside_blocks) -> Transform:
    """Biases, zero at the start, for the linear maps that have none; to train them alone.

    Args:
      where: which `Linear` layers.
    Raises:
      ConfigError: of a model, none of them is without a bias: train `TRAINS["biases"]` as it is.
    Source:
      BitFit (arXiv 2106.10199).
    """

    def without(model: Any) -> dict[str, Linear]:
        return {p: m for p, m in tree.select(model, chosen(where)).items() if m.b is None}

    def problems(model: Any) -> list[str]:
        return [] if without(model) else ["every selected map has a bias; train them as they are"]

    def change(model: Any) -> Any:
        zero = lambda m: m.replace(m.weight, jnp.zeros(m.weight.shape[1], jnp.float32))  # noqa: E731
        return tree.replace(model, {path: zero(m) for path, m in without(model).items()})

    return rewriting("biases", problems, change)


def head() -> Transform:
    """An output head of its own for a model whose head is its embedding, to be trained alone.

    It begins as a copy of the embedding: the model computes the same.

    Raises:
      ConfigError: of a model, it has a head of its own: train `TRAINS["head"]` as it is.
    """

    def problems(model: Any) -> list[str]:
        # An Encoder's config says which head it has; only a masked one can be its embedding.
        kind = getattr(getattr(model, "config", None), "head", "masked")
        tied = getattr(model, "head", 0) is None and hasattr(model, "embed") and kind == "masked"
        own = 'one of its own trains as it is, by TRAINS["head"]'
        return [] if tied else [f"the model has no head that is its embedding; {own}"]

    def change(model: Any) -> Any:
        new, embedding = tree.copy(model), model.embed.weight.dense()
        untied = Linear(
            model.config.width, model.config.vocab, key=jax.random.key(0), axes=("embed", "vocab")
        )
        new.head = nnx.data(untied.replace(Dense(embedding.T)))
        new.config = dataclasses.replace(model.config, tie_embeddings=False)
        return new

    return rewriting("head", problems, change)


def classifier(*, classes: int, seed: int = 0) -> Transform:
    """A new head that tells texts apart, in place of what head an encoder has.

    It reads the first token, through the pooler where there is one.

    Args:
      classes: >= 1.
      seed: of the draw of its matrix.
    Returns:
      a transform that observes nothing; the head trains by `TRAINS["head"]`.
    Raises:
      ConfigError: classes < 1; of a model, it is no encoder.
    """
    check_count("classes", classes)

    def problems(model: Any) -> list[str]:
        is_encoder = isinstance(getattr(model, "config", None), EncoderConfig)
        return [] if is_encoder else [f"model is a {type(model).__name__}; an Encoder is accepted"]

    def change(model: Any) -> Any:
        new, axes = tree.copy(model), ("embed", "classes")
        size, dtype = (model.config.width, classes), model.embed.weight.dtype
        key = key_of(seed, "head")
        new.head = nnx.data(Linear(*size, key=key, axes=axes, bias=True, dtype=dtype))
        new.transform, new.head_bias = nnx.data(None), nnx.data(None)
        new.config = dataclasses.replace(model.config, head="classes", classes=classes, labels=None)
        return new

    return rewriting("classifier", problems, change)


def merge(model: Any) -> Any:
    """The model with every low-rank update added to its matrix, which becomes a dense one.

    Args:
      model: stacked or not.
    Returns:
      a model that computes the same, up to the order of sums and the base's own dtype.
    Raises:
      SelectionError: there is no low-rank update.
      ConfigError: one whose base rounds or cuts its input, which no dense matrix does.
    """
    found = {
        path: node
        for path, node in tree.select(model, tree.of_type(Linear)).items()
        if isinstance(node.weight, LoRA)
    }
    if not found:
        tree.select(model, tree.of_type(LoRA))  # names what there is
    odd = [path for path, node in found.items() if changes_input(node.weight.base)]
    if odd:
        raise ConfigError(
            f"the inputs of {odd[:3]} are rounded or cut before the matrix and not before its "
            "update: no dense matrix says both"
        )
    return tree.replace(
        model, {path: node.replace(Dense(node.weight.dense())) for path, node in found.items()}
    )


def changes_input(weight: Weight) -> bool:
    """Whether a weight multiplies something else than its input."""
    return isinstance(weight, SparseInput) or getattr(weight, "act", None) is not None


def chosen(where: Predicate) -> Selector:
    """The `Linear` layers among what a selection names."""
    name = getattr(where, "name", "where")
    return Selector(name, lambda path, node: isinstance(node, Linear) and where(path, node))


def blocks(model: Any) -> dict[str, Block]:
    """The blocks of a model by path."""
    return tree.select(model, tree.of_type(Block))


def attentions(model: Any) -> dict[str, Attention]:
    """The attention layers that read their own input, by path."""
    own = tree.where(lambda _, node: isinstance(node, Attention) and not node.spec.memory)
    return tree.select(model, own)


def with_adapters(block: Block) -> bool:
    """Whether a block has inserted networks."""
    return any(slot.endswith(f"_{INSERTED}") for slot in block.slots)


def width_of(block: Block) -> int:
    """Channels of the residual stream, as the first map of a block reads it."""
    return next(n.weight.shape[0] for _, n in tree.walk(block) if isinstance(n, Linear))


def check_count(name: str, value: object) -> None:
    """Raises ConfigError unless an option is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r}; a whole number of at least 1 is accepted")
