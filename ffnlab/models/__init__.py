"""Models: assembled networks, and what turns one into another.

Layers belong in `ffnlab.layers`, files in `ffnlab.formats`, generation and evaluation in
`ffnlab.text`, methods that rewrite models in their own packages above. What users call most of
those two is found here too, under the names of `ABOVE`, when it is first asked for.
"""

import importlib
from types import MappingProxyType
from typing import Any

from ffnlab.models.audio_encoder import AudioEncoder, AudioEncoderConfig
from ffnlab.models.audio_input import AudioInput
from ffnlab.models.config import DecoderConfig
from ffnlab.models.convnet import (
    AutoencoderConfig,
    ConvAutoencoder,
    ConvMirror,
    ConvNet,
    ConvNetConfig,
)
from ffnlab.models.decoder import Cache, Decoder
from ffnlab.models.encoder import Encoder, MaskedTransform, sentence_vectors
from ffnlab.models.encoder_config import EncoderConfig
from ffnlab.models.globe import Globe
from ffnlab.models.graph_network import GraphNetwork, GraphNetworkConfig, Repeated
from ffnlab.models.group_network import Branch, GroupNetwork, GroupNetworkConfig, PReLUMap
from ffnlab.models.groups import Group, Part, groups
from ffnlab.models.hypernet.inputs import Condition, Tasked
from ffnlab.models.hypernet.net import Hypernet, HypernetConfig
from ffnlab.models.hypernet.spec import HypernetSpec
from ffnlab.models.icgnn import ICGNN, ICGNNConfig, ICGNNRound
from ffnlab.models.image_decoder import ImageDecoder
from ffnlab.models.masking import gated, masked
from ffnlab.models.meta_network import MetaNetwork, MetaNetworkConfig, MetaRound
from ffnlab.models.mlp import MLPConfig
from ffnlab.models.narrow import narrow
from ffnlab.models.noise import LearnedSchedule
from ffnlab.models.noprop_net import Denoiser, NoPropConfig, NoPropNet
from ffnlab.models.norms import population_norms
from ffnlab.models.oneforecast import Crossing, OneForecast, OneForecastConfig
from ffnlab.models.physical_net import PhysicalConfig, PhysicalLayer, PhysicalNet
from ffnlab.models.pipeline import pipeline, unpipeline
from ffnlab.models.remat import remat
from ffnlab.models.remove import remove, removed
from ffnlab.models.resnet import ResNet, ResNetConfig, resnet50, resnet_cifar
from ffnlab.models.revcol import RevCol, keep_invertible, revcol_of
from ffnlab.models.revcol_config import RevColConfig
from ffnlab.models.s_mamba import SMamba, SMambaBlock, SMambaConfig
from ffnlab.models.sequence import SequenceConfig, SequenceTransformer
from ffnlab.models.stack import Pipelined, Shared, Stacked, stack, unstack
from ffnlab.models.uvit import UViT, UViTConfig
from ffnlab.models.vit import ViT, resized
from ffnlab.models.vit_config import ImageInput, ViTConfig

# Name -> "module:name". Nothing inside ffnlab uses these: they stand on higher floors.
ABOVE = MappingProxyType(
    {
        "Generated": "ffnlab.text:Generated",
        "Sampling": "ffnlab.text:Sampling",
        "Tokenizer": "ffnlab.formats:Tokenizer",
        "embedded": "ffnlab.formats:embedded",
        "generate": "ffnlab.text:generate",
        "ignored_by_others": "ffnlab.formats:ignored_by_others",
        "is_packable": "ffnlab.formats:is_packable",
        "load": "ffnlab.formats:load",
        "open_model": "ffnlab.formats:open_model",
        "save": "ffnlab.formats:save",
        "stream_tokens": "ffnlab.text:stream_tokens",
    }
)

__all__ = [
    "AudioEncoder",
    "AudioEncoderConfig",
    "AudioInput",
    "AutoencoderConfig",
    "Branch",
    "Cache",
    "Condition",
    "ConvAutoencoder",
    "ConvMirror",
    "ConvNet",
    "ConvNetConfig",
    "Crossing",
    "Decoder",
    "DecoderConfig",
    "Denoiser",
    "Encoder",
    "EncoderConfig",
    "Globe",
    "GraphNetwork",
    "GraphNetworkConfig",
    "Group",
    "GroupNetwork",
    "GroupNetworkConfig",
    "Hypernet",
    "HypernetConfig",
    "HypernetSpec",
    "ICGNN",
    "ICGNNConfig",
    "ICGNNRound",
    "ImageDecoder",
    "ImageInput",
    "LearnedSchedule",
    "MLPConfig",
    "MaskedTransform",
    "MetaNetwork",
    "MetaNetworkConfig",
    "MetaRound",
    "NoPropConfig",
    "NoPropNet",
    "OneForecast",
    "OneForecastConfig",
    "PReLUMap",
    "Part",
    "PhysicalConfig",
    "PhysicalLayer",
    "PhysicalNet",
    "Pipelined",
    "Repeated",
    "ResNet",
    "ResNetConfig",
    "RevCol",
    "RevColConfig",
    "SMamba",
    "SMambaBlock",
    "SMambaConfig",
    "SequenceConfig",
    "SequenceTransformer",
    "Shared",
    "Stacked",
    "Tasked",
    "UViT",
    "UViTConfig",
    "ViT",
    "ViTConfig",
    "gated",
    "groups",
    "keep_invertible",
    "masked",
    "narrow",
    "pipeline",
    "population_norms",
    "remat",
    "remove",
    "removed",
    "resized",
    "resnet50",
    "resnet_cifar",
    "revcol_of",
    "sentence_vectors",
    "stack",
    "unpipeline",
    "unstack",
]


def __getattr__(name: str) -> Any:
    if name in ABOVE:
        module, _, attribute = ABOVE[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *ABOVE})
