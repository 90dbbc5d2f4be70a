"""The encoder half of Whisper in Hugging Face directories: its config, and names of its tensors.

A directory may hold the whole model, of which the decoder is not read, or the encoder alone, as
the whole model, `WhisperModel` or `WhisperEncoder` names it. What is written has the names of
`WhisperEncoder`, and a config that says nothing of a decoder.
"""

import re
from collections.abc import Iterable, Mapping

from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats.huggingface.families import ACTIVATION_NAMES, ACTIVATIONS
from ffnlab.formats.huggingface.fields import Fields
from ffnlab.formats.huggingface.names import Names, Row
from ffnlab.formats.untrusted import quoted
from ffnlab.models.audio_encoder import AudioEncoderConfig

FAMILIES = ("whisper",)
KEYS = {
    "bands": "num_mel_bins",
    "width": "d_model",
    "hidden": "encoder_ffn_dim",
    "layers": "encoder_layers",
    "heads": "encoder_attention_heads",
    "max_positions": "max_source_positions",
}
DEFAULTS: Mapping[str, object] = {
    "num_mel_bins": 80,
    "max_source_positions": 1500,
    "activation_function": "gelu",
}
_LAYER = "layers.{n}."
_LINEARS = (
    ("self_attn.q_proj", "attn.q"),
    ("self_attn.k_proj", "attn.k"),
    ("self_attn.v_proj", "attn.v"),
    ("self_attn.out_proj", "attn.o"),
    ("fc1", "ffn.up"),
    ("fc2", "ffn.down"),
)
_NORMS = (("self_attn_layer_norm", "attn_norm"), ("final_layer_norm", "ffn_norm"))
_PREFIX = re.compile(r"(model\.)?encoder\.")
_OTHER_HALF = re.compile(r"(model\.)?decoder\..*|proj_out\..*")


def read_config(config: Mapping[str, object], *, where: str = "config.json") -> AudioEncoderConfig:
    """The parsed content of a `config.json` as an `AudioEncoderConfig`.

    Args:
      config: a JSON object with `model_type` "whisper".
      where: file name for the message.
    Raises:
      ConfigError: entries that are absurd or contradict each other; all of them are named.
    """
    fields = Fields(config, DEFAULTS, where=where)
    options: dict[str, object] = {name: fields.size(key) for name, key in KEYS.items()}
    options["activation"] = fields.choice("activation_function", ACTIVATIONS)
    fields.finish()
    try:
        return AudioEncoderConfig(**options)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def write_config(config: AudioEncoderConfig) -> dict[str, object]:
    """The `config.json` content that says what an `AudioEncoderConfig` says.

    Raises:
      ConfigError: another family, or an activation that it cannot say.
    """
    act = ACTIVATION_NAMES.get(config.activation)
    if config.family not in FAMILIES or act is None:
        raise ConfigError(
            f"family={config.family!r}, activation={config.activation!r}: a directory of "
            f"{', '.join(FAMILIES)} with one of {', '.join(ACTIVATION_NAMES)} can be written"
        )
    sizes = {key: getattr(config, name) for name, key in KEYS.items()}
    named = {"architectures": ["WhisperEncoder"], "model_type": config.family}
    return {**named, **sizes, "activation_function": act}


def names_of(config: AudioEncoderConfig) -> Names:
    """The table of one encoder, with the names of `WhisperEncoder`."""
    table = [Row("embed_positions.weight", ("positions",))]
    for name, path in (("conv1", "conv_in"), ("conv2", "conv_down")):
        table += [
            Row(f"{name}.weight", (f"{path}.w",), kernel=(3,)),
            Row(f"{name}.bias", (f"{path}.b",)),
        ]
    pairs = [(_LAYER + name, f"layers[{{n}}].{path}") for name, path in _NORMS]
    for name, path in [*pairs, ("layer_norm", "norm")]:
        table += [Row(f"{name}.weight", (f"{path}.scale",)), Row(f"{name}.bias", (f"{path}.bias",))]
    for name, path in _LINEARS:
        for end, field in (("weight", "w"), ("bias", "b")):
            table.append(Row(f"{_LAYER}{name}.{end}", (f"layers[{{n}}].{path}.{field}",)))
    return Names(config.family, table)


def found_names(names: Iterable[str]) -> dict[str, str]:
    """What a checkpoint calls each tensor of the encoder, by the name of `WhisperEncoder`.

    Args:
      names: tensor names found in a checkpoint.
    Raises:
      FormatError: two tensors are the same one of the encoder.
    """
    found: dict[str, str] = {}
    for name in names:
        if _OTHER_HALF.fullmatch(name):
            continue
        plain = _PREFIX.sub("", name, count=1)
        if plain in found:
            raise FormatError(f"{quoted(found[plain])} and {quoted(name)} are the same tensor")
        found[plain] = name
    return found
