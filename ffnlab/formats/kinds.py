"""The kinds of model: for each its configuration, class, families and files, in one table.

Files are opened, training files read and commands checked by it. A new kind is one line of `KINDS`;
docs/extending.md says what else a kind of model is made of.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax
import optax

from ffnlab.errors import ConfigError, FormatError, first_line
from ffnlab.formats.directory import CONFIG_FILE, NATIVE_FILE, SIDECAR_FILE
from ffnlab.formats.huggingface import audio_families, encoder_families, vit_families
from ffnlab.formats.huggingface.families import FAMILIES
from ffnlab.formats.least_input import (
    denoise,
    find_noise,
    frame,
    image,
    moment,
    of_first_task,
    on_grid,
    on_one_edge,
    on_one_node,
    on_one_point,
    one_node,
    row,
    sequence,
    tokens,
    whole_image,
    window,
)
from ffnlab.layers import MLP
from ffnlab.models import (
    ICGNN,
    AudioEncoder,
    AudioEncoderConfig,
    AutoencoderConfig,
    ConvAutoencoder,
    ConvNet,
    ConvNetConfig,
    Decoder,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    GraphNetwork,
    GraphNetworkConfig,
    GroupNetwork,
    GroupNetworkConfig,
    Hypernet,
    HypernetConfig,
    ICGNNConfig,
    MetaNetwork,
    MetaNetworkConfig,
    MLPConfig,
    NoPropConfig,
    NoPropNet,
    OneForecast,
    OneForecastConfig,
    PhysicalConfig,
    PhysicalNet,
    ResNet,
    ResNetConfig,
    RevCol,
    RevColConfig,
    SequenceConfig,
    SequenceTransformer,
    SMamba,
    SMambaConfig,
    UViT,
    UViTConfig,
    ViT,
    ViTConfig,
    keep_invertible,
)

__all__ = ["KINDS", "Config", "Kind", "check_kind", "check_runs", "kind_of", "reads_of"]

Reads = (
    Literal["tokens", "rows", "images", "frames", "sequences"]
    | Literal["graphs", "networks", "channels", "fields", "series", "target"]
)


@runtime_checkable
class Config(Protocol):
    """The configuration of a model: a frozen dataclass of plain fields, of any kind."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of model.

    Attributes:
      config: frozen dataclass of plain fields.
      model: class of the model.
      make: (config, key=, dtype=) -> the model, drawn.
      reads: what it is called with: "tokens" int [b, t], "rows" [b, d], "images" [b, h, w, c],
        "frames" [b, t, c] of sounds, "sequences" [b, n, d] of numbers, "graphs", rows [n, d] of the
        nodes of one, "networks", nodes and edges of theirs, "channels", grids [b, ..., d] of users
        or links, "fields" [h, w, c] of a moment, or "target", what the model reads whose weights
        it gives (`reads_of`).
      example: (model) -> the least input that it takes, abstract.
      classes: (config) -> how many classes its scores tell apart, None for a configuration without;
        None where the kind has no scores.
      families: values of `model_type` in Hugging Face directories that hold this kind.
      files: names beside the tensors, in the order in which formats are tried.
      call: (model, input) -> output.
      projection: () -> the end of an optimizer's chain that keeps parameters where the model is
        defined; None where it is everywhere.
    """

    config: type
    model: type
    make: Callable[..., Any]
    reads: Reads
    example: Callable[[Any], jax.ShapeDtypeStruct]
    classes: Callable[[Any], int | None] | None = None
    families: tuple[str, ...] = ()
    files: tuple[str, ...] = (NATIVE_FILE,)
    call: Callable[[Any, Any], Any] = lambda model, x: model(x)
    projection: Callable[[], optax.GradientTransformation] | None = None


def of_target(model: Hypernet) -> jax.ShapeDtypeStruct:
    """The least input of the model whose weights are given.

    Raises:
      ConfigError: that is of no kind.
    """
    if model.config is None:
        raise ConfigError("the target of this hypernetwork is of no kind, or was rewritten")
    kind, config = KINDS[kind_of(model.config.target) or ""], model.config.target
    target = jax.eval_shape(lambda key: kind.make(config, key=key), jax.random.key(0))
    return kind.example(target)


def classes_of_target(config: HypernetConfig) -> int | None:
    """How many classes the model tells apart whose weights are given."""
    classes = KINDS[kind_of(config.target) or ""].classes
    return None if classes is None else classes(config.target)


# A line for each; what a new kind is made of beside it, docs/extending.md says.
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "decoder": Kind(
            DecoderConfig,
            Decoder,
            Decoder,
            "tokens",
            tokens,
            families=tuple(FAMILIES),
            files=(NATIVE_FILE, CONFIG_FILE, SIDECAR_FILE),
        ),
        "encoder": Kind(
            EncoderConfig,
            Encoder,
            Encoder,
            "tokens",
            tokens,
            lambda c: c.classes,
            families=tuple(encoder_families.FAMILIES),
            files=(NATIVE_FILE, CONFIG_FILE, SIDECAR_FILE),
        ),
        "audio": Kind(
            AudioEncoderConfig,
            AudioEncoder,
            AudioEncoder,
            "frames",
            frame,
            families=audio_families.FAMILIES,
            files=(NATIVE_FILE, CONFIG_FILE, SIDECAR_FILE),
        ),
        "vit": Kind(
            ViTConfig,
            ViT,
            ViT,
            "images",
            whole_image,
            lambda c: c.classes,
            families=vit_families.FAMILIES,
            files=(NATIVE_FILE, CONFIG_FILE, SIDECAR_FILE),
        ),
        "resnet": Kind(ResNetConfig, ResNet, ResNet, "images", whole_image, lambda c: c.classes),
        "uvit": Kind(UViTConfig, UViT, UViT, "images", whole_image, call=find_noise),
        "revcol": Kind(
            RevColConfig,
            RevCol,
            RevCol,
            "images",
            whole_image,
            lambda c: c.classes,
            projection=keep_invertible,
        ),
        "mlp": Kind(MLPConfig, MLP, MLPConfig.make, "rows", row, lambda c: c.sizes[-1]),
        "convnet": Kind(
            ConvNetConfig, ConvNet, ConvNetConfig.make, "images", image, lambda c: c.classes
        ),
        "autoencoder": Kind(
            AutoencoderConfig, ConvAutoencoder, AutoencoderConfig.make, "images", image
        ),
        "graph": Kind(
            GraphNetworkConfig,
            GraphNetwork,
            GraphNetworkConfig.make,
            "graphs",
            row,
            lambda c: c.sizes[-1] if c.form == "scores" else None,
            call=on_one_node,
        ),
        "groups": Kind(
            GroupNetworkConfig,
            GroupNetwork,
            GroupNetworkConfig.make,
            "rows",
            row,
            lambda c: c.classes,
        ),
        "noprop": Kind(
            NoPropConfig,
            NoPropNet,
            NoPropConfig.make,
            "rows",
            row,
            lambda c: c.classes,
            call=denoise,
        ),
        "hypernet": Kind(
            HypernetConfig,
            Hypernet,
            HypernetConfig.make,
            "target",
            of_target,
            classes_of_target,
            call=of_first_task,
        ),
        "meta": Kind(
            MetaNetworkConfig,
            MetaNetwork,
            MetaNetworkConfig.make,
            "networks",
            row,
            call=on_one_edge,
        ),
        "icgnn": Kind(ICGNNConfig, ICGNN, ICGNNConfig.make, "channels", one_node, call=on_grid),
        "physical": Kind(
            PhysicalConfig,
            PhysicalNet,
            PhysicalConfig.make,
            "rows",
            row,
            lambda c: c.classes,
        ),
        "oneforecast": Kind(
            OneForecastConfig,
            OneForecast,
            OneForecastConfig.make,
            "fields",
            moment,
            call=on_one_point,
        ),
        "s_mamba": Kind(SMambaConfig, SMamba, SMambaConfig.make, "series", window),
        "sequence": Kind(
            SequenceConfig, SequenceTransformer, SequenceConfig.make, "sequences", sequence
        ),
    }
)


def kind_of(thing: object) -> str | None:
    """The kind of a model, a configuration, or the class of one; None where there is none.

    >>> kind_of(MLPConfig((2, 3))), kind_of(Decoder), kind_of(3)
    ('mlp', 'decoder', None)
    """
    cls = thing if isinstance(thing, type) else type(thing)
    return next((name for name, kind in KINDS.items() if cls in (kind.config, kind.model)), None)


def reads_of(thing: object) -> Reads:
    """What a model is called with, or the model of a configuration; see `Kind.reads`.

    Raises:
      ConfigError: it is of no kind, or gives the weights of a model that is of none.
    """
    kind = kind_of(thing)
    if kind is None:
        raise ConfigError(f"a {type(thing).__name__} is no model of a kind and no configuration")
    if KINDS[kind].reads != "target":
        return KINDS[kind].reads
    config = thing.config if isinstance(thing, Hypernet) else thing
    if not isinstance(config, HypernetConfig):
        raise ConfigError("the target of this hypernetwork is of no kind, or was rewritten")
    return reads_of(config.target)


def check_kind(found: type, accepted: Sequence[str], where: object) -> None:
    """Checks that a model is of a kind that something can be done with.

    Args:
      found: class of the model, or of its configuration.
      accepted: names of kinds.
      where: it lies, for the message.
    Raises:
      ConfigError: it is of another kind, or of none.

    >>> check_kind(MLP, ("decoder",), "runs/a")
    Traceback (most recent call last):
    ffnlab.errors.ConfigError: runs/a holds a model of kind 'mlp'; accepted here: 'decoder'
    """
    kind = kind_of(found)
    if kind not in accepted:
        what = f"a model of kind {kind!r}" if kind else f"a {found.__name__}, no kind of model"
        raise ConfigError(f"{where} holds {what}; accepted here: {', '.join(map(repr, accepted))}")


def check_runs(model: object, where: Path) -> None:
    """Checks that a model of a known kind takes an input; it is traced and not run.

    A file may describe a tree of the right types that is no model: without an embedding, with maps
    of sizes that do not meet.

    Raises:
      FormatError: calling it fails.
    """
    kind = kind_of(model)
    if kind is None:
        return
    try:
        jax.eval_shape(KINDS[kind].call, model, KINDS[kind].example(model))
    except Exception as error:  # noqa: BLE001 - of a tree from outside, which may lack anything
        what = f"{type(error).__name__}: {first_line(error)}"
        raise FormatError(f"{where}: no {kind} that can be run: {what}") from None
