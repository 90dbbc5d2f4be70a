"""Hugging Face configs of BERT and its kin, as `EncoderConfig` and back.

One `EncoderFamily` per `model_type`: the names of its keys, what an absent key means, and which
class of `transformers` has which head. MiniLM is a BERT. What a family cannot say is found by
reading back what was written: `write_config` compares the two and refuses to lose anything.
"""

import dataclasses
from collections.abc import Mapping

from ffnlab.errors import ConfigError
from ffnlab.formats.huggingface.families import ACTIVATION_NAMES, ACTIVATIONS, SMALLEST
from ffnlab.formats.huggingface.fields import SIZE_LIMITS, Fields
from ffnlab.formats.untrusted import quoted
from ffnlab.models.encoder_config import EncoderConfig

EPS = 1e-12


@dataclasses.dataclass(frozen=True)
class EncoderFamily:
    """What is peculiar to one `model_type`.

    Attributes:
      stem: what the names of its classes begin with.
      prefix: what the names of tensors begin with in a model that has a head.
      keys: what its config calls the sizes of `EncoderConfig`, and the activation.
      defaults: value of a key that is absent.
      poolers: activation of the pooler, by what the name of a class ends in.
      eps: of the layer norms where the config does not say it, else None.
      types: its tokens have types.
    """

    stem: str
    prefix: str
    keys: Mapping[str, str]
    defaults: Mapping[str, object]
    poolers: Mapping[str, str]
    eps: float | None = None
    types: bool = True


# What the name of a class ends in, and the head that it has.
CLASSES: dict[str, str | None] = {
    "Model": None,
    "ForMaskedLM": "masked",
    "ForQuestionAnswering": "span",
    "ForSequenceClassification": "classes",
    "ForTokenClassification": "tokens",
}
PRETRAINING = "ForPreTraining"  # the masked head, and one for the next sentence that is left out
_COMMON: dict[str, object] = {
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "num_labels": 2,
}
FAMILIES: dict[str, EncoderFamily] = {
    "bert": EncoderFamily(
        "Bert",
        "bert.",
        {
            "width": "hidden_size",
            "hidden": "intermediate_size",
            "layers": "num_hidden_layers",
            "heads": "num_attention_heads",
            "activation": "hidden_act",
        },
        _COMMON | {"hidden_act": "gelu", "type_vocab_size": 2, "layer_norm_eps": EPS},
        {"Model": "tanh", "ForSequenceClassification": "tanh"},
    ),
    "distilbert": EncoderFamily(
        "DistilBert",
        "distilbert.",
        {
            "width": "dim",
            "hidden": "hidden_dim",
            "layers": "n_layers",
            "heads": "n_heads",
            "activation": "activation",
        },
        _COMMON | {"activation": "gelu"},
        {"ForSequenceClassification": "relu"},
        eps=EPS,
        types=False,
    ),
}


def family(name: str) -> EncoderFamily:
    """The family of a `model_type`.

    Raises:
      ConfigError: it is not one of `FAMILIES`.
    """
    if name not in FAMILIES:
        raise ConfigError(f"no encoder: model_type={quoted(name)}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def read_config(config: Mapping[str, object], *, where: str = "config.json") -> EncoderConfig:
    """The parsed content of a `config.json` as an `EncoderConfig`.

    Args:
      config: a JSON object with `model_type` among `FAMILIES`. The first of `architectures` says
        which head there is; without any there is none.
      where: file name for the message.
    Returns:
      a checked config; nothing of its size has been allocated. Whether a model without a head has
      a pooler is seen in its tensors only: here it has.
    Raises:
      ConfigError: entries that are absurd, contradict each other or ask for what `Encoder` cannot
        do; all of them are named.
    """
    name = str(config.get("model_type"))
    kind = family(name)
    fields = Fields(config, kind.defaults, where=where)
    options = _sizes(fields, kind) | _head(fields, kind)
    options |= {
        "eps": kind.eps or fields.number("layer_norm_eps", low=SMALLEST, high=1.0),
        "activation": fields.choice(kind.keys["activation"], ACTIVATIONS),
        "tie_embeddings": fields.flag("tie_word_embeddings"),
        "family": name,
    }
    _refuse(fields)
    fields.finish()
    try:
        return EncoderConfig(**options)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _sizes(fields: Fields, kind: EncoderFamily) -> dict[str, object]:
    sizes = {name: fields.size(kind.keys[name]) for name in ("width", "hidden", "layers", "heads")}
    width, heads, vocab = sizes["width"], sizes["heads"], fields.size("vocab_size")
    if width % heads:
        fields.note(
            f"{kind.keys['width']}={width} is not a multiple of {kind.keys['heads']}={heads}"
        )
    return sizes | {
        "vocab": vocab,
        "head_dim": max(width // heads, 1),
        "max_positions": fields.size("max_position_embeddings"),
        "types": fields.size("type_vocab_size") if kind.types else 0,
        "pad": next(iter(fields.ids("pad_token_id", vocab)), None),
    }


def _head(fields: Fields, kind: EncoderFamily) -> dict[str, object]:
    end = _class_end(fields, kind)
    head = CLASSES[end]
    options: dict[str, object] = {"head": head, "pooler": kind.poolers.get(end)}
    if head in ("classes", "tokens"):
        labels = read_labels(fields)
        count = fields.size("num_labels") if labels is None else len(labels)
        usual = labels is None or labels == tuple(f"LABEL_{i}" for i in range(count))
        options |= {"classes": count, "labels": None if usual else labels}
    return options


def _class_end(fields: Fields, kind: EncoderFamily) -> str:
    """What the class that a config names ends in, a key of `CLASSES`."""
    listed = fields.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else listed
    if name is None or name == []:
        return "Model"
    end = name.removeprefix(kind.stem) if isinstance(name, str) else ""
    if end == PRETRAINING:
        return "ForMaskedLM"
    if end not in CLASSES or name == end:
        known = ", ".join(kind.stem + end for end in (*CLASSES, PRETRAINING))
        fields.note(f"architectures names {quoted(name)}; known: {known}")
        return "Model"
    return end


def read_labels(fields: Fields) -> tuple[str, ...] | None:
    """The names of classes in `id2label`, in order; None where there are none."""
    found = fields.entries("id2label")
    if not found:
        return None
    numbers = {str(i): i for i in range(len(found))}
    names = list(found.values())
    named = all(isinstance(name, str) for name in names)
    if set(found) != set(numbers) or not named or len(found) > SIZE_LIMITS["num_labels"]:
        fields.wrong("id2label", 'an object of names under "0", "1", …')
        return None
    return tuple(str(found[number]) for number in numbers)


def _refuse(fields: Fields) -> None:
    """Notes switches that would change the result and that `Encoder` does not have."""
    for name in ("is_decoder", "add_cross_attention", "is_encoder_decoder"):
        if fields.flag(name):
            fields.note(f"{name}=true: encoders alone are supported")
    kind = fields.get("position_embedding_type")
    if kind not in (None, "absolute"):
        fields.note(f"position_embedding_type={quoted(kind)}: 'absolute' is accepted")


def write_config(config: EncoderConfig) -> dict[str, object]:
    """The `config.json` content that says what an `EncoderConfig` says.

    Args:
      config: its `family` decides the form.
    Returns:
      a JSON object that transformers 4 and 5 both read; without dtype.
    Raises:
      ConfigError: the family cannot say it; the fields that would be lost are named.
    """
    written = _written(config, family(config.family))
    back = read_config(written, where=f"config of family {config.family!r}")
    if config.head is None and config.pooler is None:  # its tensors say so
        back = dataclasses.replace(back, pooler=None)
    lost = [
        f"{field.name}={getattr(config, field.name)!r} (it would be {getattr(back, field.name)!r})"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(back, field.name)
    ]
    if lost:
        raise ConfigError(f"model_type {config.family!r} cannot say " + ", ".join(lost))
    return written


def _written(config: EncoderConfig, kind: EncoderFamily) -> dict[str, object]:
    end = next(end for end, head in CLASSES.items() if head == config.head)
    written: dict[str, object] = {
        "architectures": [kind.stem + end],
        "model_type": config.family,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.max_positions,
        "pad_token_id": config.pad,
        "tie_word_embeddings": config.tie_embeddings,
        **{key: getattr(config, name) for name, key in kind.keys.items() if name != "activation"},
        kind.keys["activation"]: ACTIVATION_NAMES.get(config.activation, "gelu"),
    }
    if kind.eps is None:
        written["layer_norm_eps"] = config.eps
    if kind.types:
        written["type_vocab_size"] = config.types
    if config.classes is not None:
        labels = config.labels or tuple(f"LABEL_{i}" for i in range(config.classes))
        written["id2label"] = {str(i): label for i, label in enumerate(labels)}
        written["label2id"] = {label: i for i, label in enumerate(labels)}
    return written
