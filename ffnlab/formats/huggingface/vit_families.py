"""ViT and DeiT in Hugging Face directories: configs, names of tensors, and the image processor.

`preprocessor_config.json` says how image files become values: size, resampling, the middle that is
cut out, scale, mean and deviation. It becomes `ViTConfig.preprocess` and is written from there; in
a directory without it values are given to the model as they are.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats.directory import IMAGES_FILE
from ffnlab.formats.huggingface.encoder_families import read_labels
from ffnlab.formats.huggingface.families import ACTIVATION_NAMES, ACTIVATIONS, SMALLEST
from ffnlab.formats.huggingface.fields import Fields
from ffnlab.formats.huggingface.names import Names, Row
from ffnlab.formats.untrusted import inside, quoted, read_json
from ffnlab.models.vit_config import ImageInput, ViTConfig

FAMILIES = ("vit", "deit")
# The name of a class and what it has: distillation, a head.
CLASSES: dict[str, dict[str, tuple[str | None, bool]]] = {
    "vit": {"ViTModel": (None, False), "ViTForImageClassification": (None, True)},
    "deit": {
        "DeiTModel": ("token", False),
        "DeiTForImageClassification": ("token", True),
        "DeiTForImageClassificationWithTeacher": ("head", True),
    },
}
KEYS = {
    "width": "hidden_size",
    "hidden": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "channels": "num_channels",
    "patch": "patch_size",
}
DEFAULTS: Mapping[str, object] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "patch_size": 16,
    "image_size": 224,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pooler_act": "tanh",
    "qkv_bias": True,
    "num_labels": 2,
}
RESAMPLES = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
BYTE = 1 / 255
_INNER = ("embeddings.", "encoder.", "layernorm.", "pooler.")
_LAYER = "encoder.layer.{n}."
_LINEARS = (
    ("attention.attention.query", "attn.q"),
    ("attention.attention.key", "attn.k"),
    ("attention.attention.value", "attn.v"),
    ("attention.output.dense", "attn.o"),
    ("intermediate.dense", "ffn.up"),
    ("output.dense", "ffn.down"),
)
_NORMS = (("layernorm_before", "attn_norm"), ("layernorm_after", "ffn_norm"))


def read_config(config: Mapping[str, object], *, where: str = "config.json") -> ViTConfig:
    """The parsed content of a `config.json` as a `ViTConfig`.

    Args:
      config: a JSON object with `model_type` among `FAMILIES`. The first of `architectures` says
        which heads there are; without any there is none.
      where: file name for the message.
    Raises:
      ConfigError: entries that are absurd or contradict each other; all of them are named.
    """
    family = str(config["model_type"])
    fields = Fields(config, DEFAULTS, where=where)
    options: dict[str, object] = {name: fields.size(key) for name, key in KEYS.items()}
    distillation, has_head = _class(fields, family)
    options |= {
        "image": _sides(fields, "image_size"),
        "eps": fields.number("layer_norm_eps", low=SMALLEST, high=1.0),
        "activation": fields.choice("hidden_act", ACTIVATIONS),
        "qkv_bias": fields.flag("qkv_bias"),
        "distillation": distillation,
        "family": family,
    }
    if has_head:
        labels = read_labels(fields)
        count = fields.size("num_labels") if labels is None else len(labels)
        usual = labels is None or labels == _usual(count)
        options |= {"classes": count, "labels": None if usual else labels}
    else:
        options["pooler"] = fields.choice("pooler_act", ACTIVATIONS)
        inner = fields.get("pooler_output_size")
        if inner not in (None, options["width"]):
            fields.note(f"pooler_output_size={quoted(inner)}: hidden_size is accepted")
    fields.finish()
    try:
        return ViTConfig(**options)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _class(fields: Fields, family: str) -> tuple[str | None, bool]:
    known = CLASSES[family]
    listed = fields.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else listed
    if name is None or name == []:
        return next(iter(known.values()))
    if not isinstance(name, str) or name not in known:
        fields.note(f"architectures names {quoted(name)}; known: {', '.join(known)}")
        return next(iter(known.values()))
    return known[name]


def _sides(fields: Fields, name: str) -> tuple[int, int]:
    """A size that is one side of a square, a list of two, or an object of height and width."""
    value = fields.get(name)
    if isinstance(value, dict):
        value = [value.get("height"), value.get("width")]
    pair = value if isinstance(value, list) else [value, value]
    sane = all(type(side) is int and 1 <= side <= 2**16 for side in pair)
    if len(pair) != 2 or not sane:
        fields.wrong(name, "a side, or a height and a width, from 1 to 65536")
        return 224, 224
    return pair[0], pair[1]


def _usual(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(count))


def write_config(config: ViTConfig) -> dict[str, object]:
    """The `config.json` content that says what a `ViTConfig` says, its `preprocess` apart.

    Raises:
      ConfigError: the family cannot say it; the fields that would be lost are named.
    """
    known = CLASSES.get(config.family, {})
    has = (config.distillation, config.classes is not None)
    name = next((name for name, parts in known.items() if parts == has), None)
    if name is None:
        raise ConfigError(
            f"family={config.family!r} with distillation={config.distillation!r}, classes="
            f"{config.classes}: a directory of {', '.join(FAMILIES)} has no class for it"
        )
    height, width = config.image
    written: dict[str, object] = {
        "architectures": [name],
        "model_type": config.family,
        **{key: getattr(config, field) for field, key in KEYS.items()},
        "image_size": height if height == width else [height, width],
        "layer_norm_eps": config.eps,
        "hidden_act": ACTIVATION_NAMES.get(config.activation, "gelu"),
        "qkv_bias": config.qkv_bias,
    }
    if config.classes is None:
        written["pooler_act"] = ACTIVATION_NAMES.get(config.pooler or "tanh", "tanh")
    else:
        labels = config.labels or _usual(config.classes)
        written["id2label"] = {str(i): label for i, label in enumerate(labels)}
        written["label2id"] = {label: i for i, label in enumerate(labels)}
    back = read_config(written, where=f"config of family {config.family!r}")
    back = dataclasses.replace(back, preprocess=config.preprocess)
    if config.pooler is None:  # its tensors say so
        back = dataclasses.replace(back, pooler=None)
    lost = [
        f"{field.name}={getattr(config, field.name)!r} (it would be {getattr(back, field.name)!r})"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(back, field.name)
    ]
    if lost:
        raise ConfigError(f"model_type {config.family!r} cannot say " + ", ".join(lost))
    return written


def with_processor(config: ViTConfig, directory: Path) -> ViTConfig:
    """A config with what the `preprocessor_config.json` of its directory says, if there is one.

    Raises:
      ConfigError: it is absurd, or its images are of another size than the model's.
      FormatError: it is no JSON.
    """
    file = directory / IMAGES_FILE
    if not file.exists() and not file.is_symlink():
        return config
    raw = read_json(inside(directory, IMAGES_FILE))
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: an object is accepted")
    try:
        return dataclasses.replace(config, preprocess=read_processor(raw, config, where=str(file)))
    except ConfigError as error:
        raise (
            error if str(error).startswith(str(file)) else ConfigError(f"{file}: {error}")
        ) from None


def read_processor(
    raw: Mapping[str, object], config: ViTConfig, *, where: str = IMAGES_FILE
) -> ImageInput:
    """The parsed content of a `preprocessor_config.json`.

    A scale other than 1/255 is taken into mean and deviation, which are of values in [0, 1].

    Raises:
      ConfigError: entries that are absurd, or images of another size than the model's; all named.
    """
    fields = Fields(raw, {"rescale_factor": BYTE, "resample": 2}, where=where)
    switch = lambda name: raw.get(name) is None or fields.flag(name)  # noqa: E731
    scale = fields.number("rescale_factor") * 255 if switch("do_rescale") else 255.0
    count, mean, std = config.channels, (0.0,) * config.channels, (1.0,) * config.channels
    if switch("do_normalize"):
        mean = _by_channel(fields, "image_mean", count, low=-1e4)
        std = _by_channel(fields, "image_std", count, low=0.0)
    mean, std = (tuple(value / scale for value in values) for values in (mean, std))
    if (mean, std) == ((0.0,) * count, (1.0,) * count):
        mean = std = ()
    cut = fields.flag("do_center_crop") and "crop_size" in raw
    # As `transformers`: a size of one number is a square.
    resize = _sides(fields, "size") if switch("do_resize") and "size" in raw else ()
    last = _sides(fields, "crop_size") if cut else resize
    if last and last != config.image:
        fields.note(f"images of {list(last)}; config.json has image_size={list(config.image)}")
    resample = raw.get("resample", 2)
    if resample not in RESAMPLES:
        fields.wrong("resample", "one of " + ", ".join(f"{n} ({v})" for n, v in RESAMPLES.items()))
        resample = 2
    fields.finish()
    own = () if resize == config.image else resize
    return ImageInput(mean, std, own, RESAMPLES[resample])  # type: ignore[index]


def _by_channel(fields: Fields, name: str, count: int, *, low: float) -> tuple[float, ...]:
    """One number for each channel."""
    values = fields.numbers(name, low=low, high=1e4)
    if len(values) != count:
        fields.wrong(name, f"a list of {count} numbers")
        return (1.0,) * count
    return values


def write_processor(config: ViTConfig) -> dict[str, object] | None:
    """The `preprocessor_config.json` content of a config; None where values go in as they are."""
    given = config.preprocess
    if given == ImageInput():
        return None
    height, width = given.resize or config.image
    written: dict[str, object] = {
        "image_processor_type": "ViTImageProcessor" if not given.resize else "DeiTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": next(n for n, name in RESAMPLES.items() if name == given.resample),
        "do_rescale": True,
        "rescale_factor": BYTE,
        "do_normalize": bool(given.mean),
        "image_mean": list(given.mean or (0.0,) * config.channels),
        "image_std": list(given.std or (1.0,) * config.channels),
    }
    if given.resize:
        height, width = config.image
        written |= {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
    return written


def names_of(config: ViTConfig) -> Names:
    """The table of one model, with the names that `transformers` writes."""
    before = _prefix(config)
    kernel = (config.patch, config.patch)
    table = [
        Row(f"{before}embeddings.cls_token", ("class_token",), leading=2),
        Row(f"{before}embeddings.distillation_token", ("distillation_token",), leading=2),
        Row(f"{before}embeddings.position_embeddings", ("positions",), leading=1),
        Row(
            f"{before}embeddings.patch_embeddings.projection.weight", ("patches.w",), kernel=kernel
        ),
        Row(f"{before}embeddings.patch_embeddings.projection.bias", ("patches.b",)),
    ]
    norms = [(f"{before}{_LAYER}{name}", f"layers[{{n}}].{path}") for name, path in _NORMS]
    for name, path in [*norms, (f"{before}layernorm", "norm")]:
        table += [Row(f"{name}.weight", (f"{path}.scale",)), Row(f"{name}.bias", (f"{path}.bias",))]
    linears = [(f"{before}{_LAYER}{name}", f"layers[{{n}}].{path}") for name, path in _LINEARS]
    two = config.distillation == "head"
    linears += [
        (f"{before}pooler.dense", "pooler"),
        ("cls_classifier" if two else "classifier", "head"),
        ("distillation_classifier", "distilled_head"),
    ]
    for name, path in linears:
        table += [Row(f"{name}.weight", (f"{path}.w",)), Row(f"{name}.bias", (f"{path}.b",))]
    return Names(config.family, table)


def _prefix(config: ViTConfig) -> str:
    return "" if config.classes is None else f"{config.family}."


def found_names(config: ViTConfig, names: Iterable[str]) -> dict[str, str]:
    """What a checkpoint calls each tensor, by the name that `transformers` writes.

    Args:
      config: what the model is.
      names: tensor names found in a checkpoint, with the family's prefix or without.
    Raises:
      FormatError: two tensors are the same one of the model.
    """
    found: dict[str, str] = {}
    for name in names:
        plain = name.removeprefix(f"{config.family}.")
        if config.pooler is None and config.classes is not None and plain.startswith("pooler."):
            continue  # of a model whose head reads the token itself
        plain = _prefix(config) + plain if plain.startswith(_INNER) else plain
        if plain in found:
            raise FormatError(f"{quoted(found[plain])} and {quoted(name)} are the same tensor")
        found[plain] = name
    return found


def settled(config: ViTConfig, found: Iterable[str]) -> ViTConfig:
    """A model without classes has a pooler where a tensor of one is there."""
    has_pooler = any(name.startswith("pooler.") for name in found)
    return config if has_pooler else dataclasses.replace(config, pooler=None)
