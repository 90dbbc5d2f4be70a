"""The kinds of model that a hypernetwork of a configuration generates, and where it begins."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ffnlab import tree
from ffnlab.compat import eagerly
from ffnlab.errors import ConfigError, is_known
from ffnlab.layers import MLP
from ffnlab.models.config import DecoderConfig
from ffnlab.models.convnet import AutoencoderConfig, ConvAutoencoder, ConvNet, ConvNetConfig
from ffnlab.models.decoder import Decoder
from ffnlab.models.encoder import Encoder
from ffnlab.models.encoder_config import EncoderConfig
from ffnlab.models.hypernet.frame import Frame
from ffnlab.models.mlp import MLPConfig
from ffnlab.models.resnet import ResNet, ResNetConfig
from ffnlab.models.vit import ViT
from ffnlab.models.vit_config import ViTConfig

__all__ = [
    "TARGETS",
    "Start",
    "TargetConfig",
    "check_target",
    "drawn",
    "frame_of",
    "start_of",
    "start_with",
]

TargetConfig = (
    MLPConfig
    | ConvNetConfig
    | AutoencoderConfig
    | DecoderConfig
    | EncoderConfig
    | ViTConfig
    | ResNetConfig
)
# By the name of their kind: those that are called with one input.
TARGETS: Mapping[str, type] = MappingProxyType(
    {
        "mlp": MLPConfig,
        "convnet": ConvNetConfig,
        "autoencoder": AutoencoderConfig,
        "decoder": DecoderConfig,
        "encoder": EncoderConfig,
        "vit": ViTConfig,
        "resnet": ResNetConfig,
    }
)
MAKERS: Mapping[type, Callable[..., nnx.Module]] = MappingProxyType(
    {
        MLPConfig: MLPConfig.make,
        ConvNetConfig: ConvNetConfig.make,
        AutoencoderConfig: AutoencoderConfig.make,
        DecoderConfig: Decoder,
        EncoderConfig: Encoder,
        ViTConfig: ViT,
        ResNetConfig: ResNet,
    }
)
# Of modules that do not hold their configuration.
SAID: Mapping[type, Callable[[Any], Any]] = MappingProxyType(
    {
        MLP: lambda m: MLPConfig(tuple(m.sizes), m.activation, m.maps[0].b is not None),
        ConvNet: lambda m: ConvNetConfig(tuple(m.sizes[:-1]), m.sizes[-1]),
        ConvAutoencoder: lambda m: AutoencoderConfig(tuple(m.sizes[: len(m.down) + 1])),
    }
)


def check_target(config: object) -> None:
    """Raises ConfigError for what is no configuration of a target."""
    if type(config) not in MAKERS:
        kinds = [kind.__name__ for kind in MAKERS]
        raise ConfigError(
            f"target is a {type(config).__name__}; one of {kinds} is accepted, and any module by "
            "Hypernet(spec, module)"
        )


def drawn(config: TargetConfig, *, key: Array) -> Any:
    """A target of a configuration, float32."""
    return MAKERS[type(config)](config, key=key)


@functools.lru_cache(maxsize=64)
def frame_of(config: TargetConfig) -> Frame:
    """The frame of a configuration's target; its arrays have the dtype of the vector."""
    make = lambda key: drawn(config, key=key)  # noqa: E731
    return Frame.of(jax.eval_shape(make, jax.random.key(0)), typed=False)


def config_of(target: nnx.Module) -> TargetConfig | None:
    """The configuration of a target in float32; None where its kind has none, or it was rewritten.

    A module that was rewritten (low-rank maps, removed layers) is no longer what its configuration
    makes.
    """
    found = SAID.get(type(target), lambda m: getattr(m, "config", None))(target)
    if type(found) not in MAKERS or type(target) is not made_by(type(found)):
        return None
    same = Frame.of(target, typed=False) == frame_of(found)
    wide = all(leaf.dtype == "float32" for leaf in Frame.of(target).generated)
    return found if same and wide else None


def made_by(kind: type) -> type:
    """The class of the models of a configuration."""
    classes = {MLPConfig: MLP, ConvNetConfig: ConvNet, AutoencoderConfig: ConvAutoencoder}
    return classes.get(kind, MAKERS[kind])


class Start(NamedTuple):
    """Where the arrays that are generated begin.

    Attributes:
      offsets: what is added to all of an array: its value where the target's is constant.
      variances: wanted of what is generated of an array; 0 where it is constant.
    """

    offsets: tuple[float, ...]
    variances: tuple[float, ...]

    def of_numbers(self, frame: Frame) -> Float[np.ndarray, "P"]:
        """The variance wanted of each number of a vector."""
        pairs = zip(self.variances, frame.generated, strict=True)
        return np.concatenate([np.full(leaf.size, variance) for variance, leaf in pairs])


def start_of(target: nnx.Module, init: str) -> Start:
    """Where generation begins for a target, see `HypernetSpec.init`.

    Raises:
      ConfigError: its values are not known, as a function is traced.
    """
    leaves = jax.tree.leaves(tree.trained(target)[0])
    if not is_known(*leaves) or any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        raise ConfigError(
            "target: its constants are looked at, and they are not known here: make it outside of "
            "jit, vmap and eval_shape, or give the hypernetwork a configuration "
            "(HypernetConfig.make)"
        )
    arrays = [np.asarray(leaf, np.float64) for leaf in leaves]
    constant = [init != "uniform" and bool((a == a.reshape(-1)[:1]).all()) for a in arrays]
    offsets = tuple(float(a.flat[0]) if c else 0.0 for a, c in zip(arrays, constant, strict=True))

    def variance(array: np.ndarray) -> float:
        is_fan = init == "hyperfan" and array.ndim > 1
        return 2 / array.shape[-2] if is_fan else float(np.mean(array**2))

    pairs = zip(arrays, constant, strict=True)
    return Start(offsets, tuple(0.0 if c else variance(a) for a, c in pairs))


@functools.lru_cache(maxsize=64)
def start_with(config: TargetConfig, init: str) -> Start:
    """`start_of` the target of a configuration, even where a function is traced."""
    with eagerly():
        return start_of(drawn(config, key=jax.random.key(0)), init)
