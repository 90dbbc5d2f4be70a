"""Models: assembled networks, their files (Hugging Face in and out), generation and evaluation.

Layers belong in `ffnlab.layers`; methods that rewrite models in their own packages above.
"""

from ffnlab.models.config import DecoderConfig
from ffnlab.models.decoder import Cache, Decoder
from ffnlab.models.embedded import embedded, open_model
from ffnlab.models.generate import Generated, generate, stream_tokens
from ffnlab.models.load import load
from ffnlab.models.remat import remat
from ffnlab.models.remove import remove, removed
from ffnlab.models.sample import Sampling
from ffnlab.models.save import is_packable, save
from ffnlab.models.sidecar import ignored_by_others
from ffnlab.models.stack import Stacked, stack, unstack
from ffnlab.models.tokenizer import Tokenizer

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Generated",
    "Sampling",
    "Stacked",
    "Tokenizer",
    "embedded",
    "generate",
    "ignored_by_others",
    "is_packable",
    "load",
    "open_model",
    "remat",
    "remove",
    "removed",
    "save",
    "stack",
    "stream_tokens",
    "unstack",
]
