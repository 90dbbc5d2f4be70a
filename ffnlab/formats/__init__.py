"""Models in files, in and out: Hugging Face, our native format, llama2.c, adapters, tokenizers.

What comes from outside is untrusted: sizes, shapes and numbers are checked before they are used,
and nothing is ever unpickled. Networks belong in `ffnlab.models`, what is done with their text in
`ffnlab.text`.
"""

from ffnlab.formats.embedded import embedded, open_model
from ffnlab.formats.huggingface.save import is_packable
from ffnlab.formats.huggingface.sidecar import ignored_by_others
from ffnlab.formats.kinds import KINDS, Kind
from ffnlab.formats.oneforecast import load_oneforecast
from ffnlab.formats.opening import load, save
from ffnlab.formats.peft import load_adapter, save_adapter
from ffnlab.formats.resnet_npz import load_resnet
from ffnlab.formats.s_mamba import load_s_mamba
from ffnlab.formats.tokenizer.tokenizer import Tokenizer

__all__ = [
    "KINDS",
    "Kind",
    "Tokenizer",
    "embedded",
    "ignored_by_others",
    "is_packable",
    "load",
    "load_adapter",
    "load_oneforecast",
    "load_resnet",
    "load_s_mamba",
    "open_model",
    "save",
    "save_adapter",
]
