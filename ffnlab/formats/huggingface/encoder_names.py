"""The tables from Hugging Face tensor names to paths in an `Encoder`: one row per kind.

A model without a head has the names as they are here; in one with a head those of its encoder
begin with the family's prefix ("bert.", "distilbert."). Checkpoints are read in either form.
"""

import re
from collections.abc import Iterable, Mapping

from ffnlab.errors import FormatError
from ffnlab.formats.huggingface.encoder_families import family
from ffnlab.formats.huggingface.names import Names, Row
from ffnlab.formats.untrusted import quoted
from ffnlab.models.encoder_config import EncoderConfig

# Within a layer, and around them: (name, path) of linear maps and of norms.
_LAYERS = {
    "bert": (
        "encoder.layer.{n}.",
        [
            ("attention.self.query", "attn.q"),
            ("attention.self.key", "attn.k"),
            ("attention.self.value", "attn.v"),
            ("attention.output.dense", "attn.o"),
            ("intermediate.dense", "ffn.up"),
            ("output.dense", "ffn.down"),
        ],
        [("attention.output.LayerNorm", "attn_norm"), ("output.LayerNorm", "ffn_norm")],
    ),
    "distilbert": (
        "transformer.layer.{n}.",
        [
            ("attention.q_lin", "attn.q"),
            ("attention.k_lin", "attn.k"),
            ("attention.v_lin", "attn.v"),
            ("attention.out_lin", "attn.o"),
            ("ffn.lin1", "ffn.up"),
            ("ffn.lin2", "ffn.down"),
        ],
        [("sa_layer_norm", "attn_norm"), ("output_layer_norm", "ffn_norm")],
    ),
}
_MASKED = {  # (map, norm) of the transform, (weight, bias) of the logits
    "bert": (
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder.weight",
        "cls.predictions.bias",
    ),
    "distilbert": (
        "vocab_transform",
        "vocab_layer_norm",
        "vocab_projector.weight",
        "vocab_projector.bias",
    ),
}
_POOLERS = {"bert": "pooler.dense", "distilbert": "pre_classifier"}
_WORDS = "embeddings.word_embeddings.weight"
# `transformers` has the bias of BERT's masked head under two names, which are one parameter.
_BIAS, _SECOND_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"
# What the encoder itself consists of; a prefix stands before these.
_INNER = re.compile(r"(embeddings|encoder|transformer|pooler)\..*")
# Buffers that old checkpoints carry and that follow from the config, and the head that tells
# whether one sentence follows another, which no head of ours is.
_LEFT_OUT = re.compile(r"embeddings\.(position_ids|token_type_ids)|cls\.seq_relationship\..*")
_OLDER = ((".gamma", ".weight"), (".beta", ".bias"))


def names_of(config: EncoderConfig) -> Names:
    """The table of one encoder, with the names that `transformers` writes."""
    return Names(config.family, rows(config))


def rows(config: EncoderConfig) -> list[Row]:
    """The rows of one encoder; those of parts that it does not have do no harm."""
    layer, linears, norms = _LAYERS[config.family]
    before = _prefix(config)
    dense, norm, weight, bias = _MASKED[config.family]
    head = "qa_outputs" if config.head == "span" else "classifier"
    pooler = _POOLERS[config.family]
    pooler = before + pooler if _INNER.fullmatch(pooler) else pooler
    table = [
        Row(before + _WORDS, ("embed.w",)),
        Row(f"{before}embeddings.position_embeddings.weight", ("position_embed.w",)),
        Row(f"{before}embeddings.token_type_embeddings.weight", ("type_embed.w",)),
        *_norm(f"{before}embeddings.LayerNorm", "embed_norm"),
        *_linear(pooler, "pooler"),
    ]
    for name, path in linears:
        table += _linear(f"{before}{layer}{name}", f"layers[{{n}}].{path}")
    for name, path in norms:
        table += _norm(f"{before}{layer}{name}", f"layers[{{n}}].{path}")
    if config.head == "masked":
        table += [*_linear(dense, "transform.dense"), *_norm(norm, "transform.norm")]
        table += [Row(weight, ("head.w",)), Row(bias, ("head_bias",))]
    else:
        table += _linear(head, "head")
    return table


def _linear(name: str, path: str) -> list[Row]:
    return [Row(f"{name}.weight", (f"{path}.w",)), Row(f"{name}.bias", (f"{path}.b",))]


def _norm(name: str, path: str) -> list[Row]:
    return [Row(f"{name}.weight", (f"{path}.scale",)), Row(f"{name}.bias", (f"{path}.bias",))]


def _prefix(config: EncoderConfig) -> str:
    return "" if config.head is None else family(config.family).prefix


def embed_and_head(config: EncoderConfig) -> tuple[str, str]:
    """Names of the embedding, and of the matrix of the masked head that may be tied to it."""
    return _prefix(config) + _WORDS, _MASKED[config.family][2]


def found_names(config: EncoderConfig, names: Iterable[str]) -> dict[str, str]:
    """What a checkpoint calls each tensor, by the name that `transformers` writes.

    Left out is what the model does not need: buffers, the head for the next sentence, and a pooler
    that the model's class does not have.

    Args:
      config: what the model is.
      names: tensor names found in a checkpoint.
    Raises:
      FormatError: two tensors are the same one of the model.
    """
    found: dict[str, str] = {}
    for name in names:
        plain = _plain(config, name)
        if plain is None:
            continue
        if plain in found:
            raise FormatError(f"{quoted(found[plain])} and {quoted(name)} are the same tensor")
        found[plain] = name
    for second, first in second_names(config).items():
        if second in found:  # the one that is computed with, should they differ
            found[first] = found.pop(second)
    return found


def _plain(config: EncoderConfig, name: str) -> str | None:
    plain = name.removeprefix(family(config.family).prefix)
    for older, newer in _OLDER:
        plain = plain.removesuffix(older) + newer if plain.endswith(older) else plain
    is_unused_pooler = config.pooler is None and plain.startswith("pooler.")
    if _LEFT_OUT.fullmatch(plain) or is_unused_pooler:
        return None
    return _prefix(config) + plain if _INNER.fullmatch(plain) else plain


def second_names(config: EncoderConfig) -> Mapping[str, str]:
    """Second names of tensors in `transformers`: second -> first. Of a head that is tied to the
    embedding it writes the first alone."""
    is_bert = config.family == "bert" and config.head == "masked"
    return {_SECOND_BIAS: _BIAS} if is_bert else {}


def is_pooler(config: EncoderConfig, name: str) -> bool:
    """Whether this is the name of a tensor of the pooler."""
    return name.startswith(f"{_POOLERS[config.family]}.")
