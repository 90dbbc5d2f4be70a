"""Models in and out of directories, of whichever format: `load` and `save`."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax

from ffnlab import tree
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats.directory import CONFIG_FILE
from ffnlab.formats.huggingface import load as huggingface_load
from ffnlab.formats.huggingface import save as huggingface_save
from ffnlab.formats.huggingface.dialects import read_beside, read_config, write_config
from ffnlab.formats.kinds import KINDS, check_kind, kind_of
from ffnlab.formats.native import read, write
from ffnlab.formats.stream import Placement
from ffnlab.formats.untrusted import inside, read_json
from ffnlab.storage.files import StrPath
from ffnlab.weights import FACTORED

__all__ = [
    "config_of",
    "for_others",
    "format_for",
    "format_of",
    "is_factored",
    "kind_at",
    "load",
    "save",
]

Format = Literal["dense", "compressed-tensors", "ffnlab"]
FORMATS = (*huggingface_save.FORMATS, "ffnlab")


def load(
    directory: StrPath,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    sharding: Placement = None,
    max_positions: int | None = None,
    check_finite: bool = True,
    extras: bool = True,
    progress: bool = True,
    kinds: tuple[str, ...] | None = None,
) -> Any:
    """Loads a model directory: one of our native format, else a Hugging Face one.

    The latter holds a Decoder (Llama, Mistral, Mixtral, Qwen 2/3 and 3 MoE, Gemma 2/3 (text),
    Phi-3), an Encoder (BERT, MiniLM, DistilBERT), an AudioEncoder (Whisper's encoder) or a ViT
    (ViT, DeiT; what their preprocessor_config.json says of images is honoured).

    Args:
      directory: with ffnlab_model.json, else with config.json and an `ffnlab.json` that is
        honoured; and with model.safetensors, or shards with their index.
      dtype: of the dense parameters, a float type; of a native directory of what learning changes.
        As stored when None, in a Hugging Face directory as its embedding.
      sharding: where parameters go: one sharding for all, or a function of (path, logical axes,
        shape) that returns one; the default device when None.
      max_positions: of Hugging Face directories, see `ffnlab.formats.huggingface.load.load`.
      check_finite: refuse NaN and infinity among the dense parameters.
      extras: honour `ffnlab.json`; False gives the model that tools see which do not know it.
      progress: draw a bar where someone watches.
      kinds: names of the kinds of model that are asked for; any when None.
    Returns:
      the model.
    Raises:
      FormatError: files are missing, damaged or hostile.
      ConfigError: the configuration is absurd, the model is of another kind, or an option is not of
        this format.
    """
    directory = Path(directory)
    common = {"dtype": dtype, "sharding": sharding, "progress": progress}
    common["check_finite"] = check_finite
    if not read.is_native(directory):
        if kinds is not None:
            check_kind(KINDS[huggingface_kind(directory)].model, kinds, directory)
        return huggingface_load.load(
            directory, max_positions=max_positions, extras=extras, **common
        )
    if max_positions is not None or not extras:
        raise ConfigError(
            f"{directory} is in ffnlab's native format, which takes neither max_positions nor "
            "extras=False: it says itself what the model is"
        )
    if kinds is not None:
        check_kind(read.root_type(directory), kinds, directory)
    return read.load(directory, **common)


def save(
    model: Any,
    directory: StrPath,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    max_shard_bytes: int = huggingface_save.MAX_SHARD_BYTES,
    format: Format = "dense",
) -> tuple[str, ...]:
    """Writes a model directory; `load` gives the model back.

    The directory appears as a whole, or stays as it was; files in it that are not of a model
    (a tokenizer, notes) are kept.

    Args:
      model: a Decoder, an Encoder, an AudioEncoder or a ViT, its blocks in a list or stacked; with
        format "ffnlab" any tree of the modules, weights and configurations that ffnlab exports.
      directory: where to.
      dtype: of the dense tensors, float32, bfloat16 or float16; see the two formats for None.
      max_shard_bytes: size above which the tensors are split over several files.
      format: "dense" for a directory that `transformers` loads, "compressed-tensors" for one with
        packed weights that vLLM reads too, "ffnlab" for the native one: the model as it is, bit for
        bit, for ffnlab alone.
    Returns:
      what tools that read only the Hugging Face files will not do, or may stumble on, one sentence
      each; nothing of the native format.
    Raises:
      ConfigError: the format is unknown, no Hugging Face family can say the model (the part is
        named), dtype is none of the three, or there is nothing to pack.
      FormatError: a part that the format cannot say, or numbers that are not finite.
    """
    if format not in FORMATS:
        raise ConfigError(f"format={format!r}; accepted: {', '.join(map(repr, FORMATS))}")
    if format == "ffnlab":
        write.save(model, directory, dtype=dtype, max_shard_bytes=max_shard_bytes)
        return ()
    if format_for(type(model)) == "ffnlab":
        raise ConfigError(
            f"model is a {type(model).__name__}, for which there is no Hugging Face family; "
            f"{huggingface_save.NATIVE}"
        )
    return huggingface_save.save(
        model, directory, dtype=dtype, max_shard_bytes=max_shard_bytes, format=format
    )


def format_for(model: type, config: object = None) -> Format:
    """The format that a class of models is saved in where nothing else is asked for.

    Args:
      model: the class.
      config: of one of them; it is in the native format where no family can say this.

    >>> from ffnlab.models import ConvNet, Decoder, Encoder, EncoderConfig
    >>> format_for(Decoder), format_for(ConvNet)
    ('dense', 'ffnlab')
    >>> rotary = EncoderConfig(64, 16, 32, layers=1, heads=2, head_dim=8, positions="rotary")
    >>> format_for(Encoder, rotary)
    'ffnlab'
    """
    kind = kind_of(model)
    if kind is None or not KINDS[kind].families:
        return "ffnlab"
    try:
        if config is not None:
            write_config(config)  # type: ignore[arg-type]
    except ConfigError:
        return "ffnlab"
    return "dense"


def format_of(model: Any) -> Format:
    """The format that says most of a model as it is to most tools.

    Packed where something of it can be, else dense; the native one where no Hugging Face family can
    say it: a sublayer was replaced by one that no family has, or a matrix by factors of it, which
    would be multiplied out.

    >>> from ffnlab.layers import MLP
    >>> format_of(MLP((2, 3), key=jax.random.key(0)))
    'ffnlab'
    """
    if format_for(type(model), getattr(model, "config", None)) == "ffnlab":
        return "ffnlab"
    if is_factored(model):
        return "ffnlab"
    try:
        return "compressed-tensors" if huggingface_save.is_packable(model) else "dense"
    except (ConfigError, FormatError):
        return "ffnlab"


def is_factored(model: Any) -> bool:
    """Whether a matrix of a model is kept as factors, which a dense format multiplies out."""
    return any(isinstance(node, FACTORED) for _, node in tree.walk(model))


def kind_at(directory: StrPath) -> str | None:
    """The kind of model in a directory, which is not loaded; None for a tree that is of no kind.

    Raises:
      FormatError: no model directory, or damaged JSON.
    """
    directory = Path(directory)
    if read.is_native(directory):
        return kind_of(read.root_type(directory))
    return huggingface_kind(directory)


def huggingface_kind(directory: Path) -> str:
    """The kind of model in a Hugging Face directory; "decoder" where no kind has its family.

    Raises:
      FormatError: no model directory, or damaged JSON.
    """
    if not directory.is_dir():
        raise FormatError(f"{directory}: not a directory")
    raw = read_json(inside(directory, CONFIG_FILE))
    family = raw.get("model_type") if isinstance(raw, dict) else None
    return next((name for name, kind in KINDS.items() if family in kind.families), "decoder")


def config_of(directory: StrPath, kinds: tuple[str, ...] = ("decoder",)) -> Any:
    """The configuration of the model in a directory; no array is looked at.

    Args:
      directory: of either format.
      kinds: names of the kinds that are asked for.
    Raises:
      ConfigError: another kind of model, or an absurd configuration.
      FormatError: no model directory, or damaged JSON.
    """
    directory = Path(directory)
    if read.is_native(directory):
        check_kind(read.root_type(directory), kinds, directory)
        return read.root_config(directory)
    file = inside(directory, CONFIG_FILE)
    check_kind(KINDS[huggingface_kind(directory)].model, kinds, directory)
    return read_beside(read_config(read_json(file), where=str(file)), directory)


def loaded_config(directory: StrPath, kinds: tuple[str, ...] = ("decoder",)) -> Any:
    """The configuration that the model in a directory has once it is loaded.

    Tensors say what a configuration of Hugging Face leaves open: whether there is a pooler, and
    whether a head is the embedding.

    Args, Raises: as `config_of`; FormatError too for tensors that are missing or damaged, as far as
    their headers tell.
    """
    found = config_of(directory, kinds)
    return found if read.is_native(directory) else huggingface_load.settled_config(directory)


@contextlib.contextmanager
def for_others(directory: StrPath) -> Iterator[Path]:
    """A directory with the same Decoder that other tools load: itself, or a copy for a while.

    Args:
      directory: of either format; of a native one a dense Hugging Face directory is made.
    Raises:
      ConfigError, FormatError: another kind of model, or one that no family can say.
    """
    directory = Path(directory)
    if not read.is_native(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory() as folder:
        save(load(directory, kinds=("decoder",)), folder)
        yield Path(folder)
