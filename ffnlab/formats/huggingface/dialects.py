"""How each kind of model stands in a Hugging Face directory: all that `load` and `save` ask.

A `Dialect` is the answers for one kind: decoders (`families`, `names`), encoders
(`encoder_families`, `encoder_names`), encoders of sound (`audio_families`) and vision transformers
(`vit_families`). The `model_type` of a file says which, and the type of a config.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from ffnlab.errors import ConfigError
from ffnlab.formats.directory import IMAGES_FILE
from ffnlab.formats.huggingface import (
    audio_families,
    encoder_families,
    encoder_names,
    families,
    names,
    vit_families,
)
from ffnlab.formats.huggingface.names import Names
from ffnlab.formats.safetensors import Checkpoint
from ffnlab.formats.stream import equal
from ffnlab.formats.untrusted import quoted
from ffnlab.layers import FFN, GatedFFN, MoE, SparseGatedFFN
from ffnlab.models import audio_encoder, decoder, encoder, vit
from ffnlab.models.audio_encoder import AudioEncoder, AudioEncoderConfig
from ffnlab.models.config import DecoderConfig
from ffnlab.models.decoder import Decoder
from ffnlab.models.encoder import Encoder
from ffnlab.models.encoder_config import EncoderConfig
from ffnlab.models.vit import ViT
from ffnlab.models.vit_config import ViTConfig

__all__ = ["Config", "Dialect", "Model", "dialect_of", "read_beside", "read_config", "write_config"]

Model = Decoder | Encoder | AudioEncoder | ViT
Config = DecoderConfig | EncoderConfig | AudioEncoderConfig | ViTConfig


@dataclasses.dataclass(frozen=True)
class Dialect:
    """One kind of model in Hugging Face directories.

    Attributes:
      config: the class of its configs.
      abstract: config -> the model without arrays, float32.
      write_config: config -> what its config.json holds.
      names: config -> its table of tensors.
      found: (config, names in a checkpoint, its parsed config.json) -> what the checkpoint calls
        each tensor, by its plain name; what the model leaves out is not there.
      settle: (config, checkpoint, found) -> what the tensors say of the config; a copy of the
        embedding is taken out of `found`.
      head: config -> plain name of a head that its index may list and its files lack, or None.
      ffns: the kinds of FFN that can be written.
      second: config -> second names under which tensors are written too.
      beside: config -> what is written beside its config.json, by name; None for no such file.
    """

    config: type
    abstract: Callable[[Any], Any]
    write_config: Callable[[Any], dict[str, object]]
    names: Callable[[Any], Names]
    found: Callable[[Any, Iterable[str], Mapping[str, object]], dict[str, str]]
    settle: Callable[[Any, Checkpoint, dict[str, str]], Any]
    head: Callable[[Any], str | None]
    ffns: tuple[type[nnx.Module], ...]
    second: Callable[[Any], Mapping[str, str]]
    beside: Callable[[Any], Mapping[str, object]] = lambda config: {}


def dialect_of(config: Config) -> Dialect:
    """The dialect of a config."""
    return next(kind for kind in DIALECTS if isinstance(config, kind.config))


def read_config(config: object, *, where: str = "config.json") -> Config:
    """The parsed content of a `config.json`, of any family that is known.

    Raises:
      ConfigError: not an object, an unknown architecture, or entries that are absurd, contradict
        each other or ask for what the models here cannot do; all of them are named.
    """
    name = config.get("model_type") if isinstance(config, dict) else None
    if isinstance(name, str) and name in encoder_families.FAMILIES:
        return encoder_families.read_config(config, where=where)
    if isinstance(name, str) and name in audio_families.FAMILIES:
        return audio_families.read_config(config, where=where)
    if isinstance(name, str) and name in vit_families.FAMILIES:
        return vit_families.read_config(config, where=where)
    if isinstance(config, dict) and not (isinstance(name, str) and name in DECODERS):
        others = encoder_families.FAMILIES, audio_families.FAMILIES, vit_families.FAMILIES
        known = ", ".join((*families.FAMILIES, *(name for each in others for name in each)))
        raise ConfigError(
            f"{where}: unknown architecture: model_type={quoted(name)}; known: {known} (and gemma3 "
            "for its text model)"
        )
    return families.read_config(config, where=where)


def read_beside(config: Config, directory: Path) -> Config:
    """A config that says what other files of its directory say.

    Raises:
      ConfigError, FormatError: they are absurd, or damaged.
    """
    return (
        vit_families.with_processor(config, directory) if isinstance(config, ViTConfig) else config
    )


def write_config(config: Config) -> dict[str, object]:
    """The `config.json` content that says what a config says.

    Raises:
      ConfigError: its family cannot say it; the fields that would be lost are named.
    """
    return dialect_of(config).write_config(config)


def _text_names(
    config: DecoderConfig, found: Iterable[str], raw: Mapping[str, object]
) -> dict[str, str]:
    return names.text_names(found, wrapped=raw.get("model_type") == "gemma3")


def _settle_decoder(
    config: DecoderConfig, checkpoint: Checkpoint, found: dict[str, str]
) -> DecoderConfig:
    return _settle_head(config, checkpoint, found, names.EMBED, names.HEAD)


def _settle_encoder(
    config: EncoderConfig, checkpoint: Checkpoint, found: dict[str, str]
) -> EncoderConfig:
    """A model without a head has a pooler where a tensor of one is there."""
    pooled = any(encoder_names.is_pooler(config, name) for name in found)
    if config.head is None and not pooled:
        config = dataclasses.replace(config, pooler=None)
    if config.head != "masked":
        return config
    return _settle_head(config, checkpoint, found, *encoder_names.embed_and_head(config))


def _settle_head(
    config: Any, checkpoint: Checkpoint, found: dict[str, str], embed: str, head: str
) -> Any:
    """The config of a tied model with a stored head: untied, as transformers does, if it differs.

    A copy of the embedding is taken out of `found`.
    """
    if not config.tie_embeddings or head not in found:
        return config
    if embed in found and equal(checkpoint, found[embed], found[head]):
        del found[head]
        return config
    return dataclasses.replace(config, tie_embeddings=False)


def _encoder_head(config: EncoderConfig) -> str | None:
    is_tied = config.head == "masked" and config.tie_embeddings
    return encoder_names.embed_and_head(config)[1] if is_tied else None


DECODERS = (*families.FAMILIES, "gemma3")
DIALECTS = (
    Dialect(
        config=DecoderConfig,
        abstract=decoder.abstract,
        write_config=families.write_config,
        names=lambda config: Names(config.family),
        found=_text_names,
        settle=_settle_decoder,
        head=lambda config: names.HEAD if config.tie_embeddings else None,
        ffns=(GatedFFN, SparseGatedFFN, MoE),
        second=lambda config: {},
    ),
    Dialect(
        config=EncoderConfig,
        abstract=encoder.abstract,
        write_config=encoder_families.write_config,
        names=encoder_names.names_of,
        found=lambda config, found, raw: encoder_names.found_names(config, found),
        settle=_settle_encoder,
        head=_encoder_head,
        ffns=(FFN,),
        second=lambda config: {} if config.tie_embeddings else encoder_names.second_names(config),
    ),
    Dialect(
        config=AudioEncoderConfig,
        abstract=audio_encoder.abstract,
        write_config=audio_families.write_config,
        names=audio_families.names_of,
        found=lambda config, found, raw: audio_families.found_names(found),
        settle=lambda config, checkpoint, found: config,
        head=lambda config: None,
        ffns=(FFN,),
        second=lambda config: {},
    ),
    Dialect(
        config=ViTConfig,
        abstract=vit.abstract,
        write_config=vit_families.write_config,
        names=vit_families.names_of,
        found=lambda config, found, raw: vit_families.found_names(config, found),
        settle=lambda config, checkpoint, found: vit_families.settled(config, found),
        head=lambda config: None,
        ffns=(FFN,),
        second=lambda config: {},
        beside=lambda config: {IMAGES_FILE: vit_families.write_processor(config)},
    ),
)
