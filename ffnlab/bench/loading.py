"""What loading a checkpoint of a gigabyte costs in memory: measured in fresh processes."""

import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from ffnlab.formats.huggingface.families import write_config
from ffnlab.formats.safetensors import Entry, write_directory
from ffnlab.layers import MoESpec
from ffnlab.models.config import DecoderConfig
from ffnlab.storage.files import write_json

__all__ = ["peak", "peaks"]

SMALL = DecoderConfig(vocab=8, width=8, hidden=8, layers=1, heads=1, kv_heads=1, head_dim=8)
LARGE = DecoderConfig(
    vocab=20_000,
    width=2048,
    hidden=5632,
    layers=4,
    heads=16,
    kv_heads=4,
    head_dim=128,
    tie_embeddings=False,
)
MIXTURE = dataclasses.replace(LARGE, family="mixtral", hidden=1408, mixture=MoESpec(8, 2, 1408))
SHARD_BYTES = 400_000_000
# A small model is loaded first: what jax itself takes on first use is not the model's.
PROGRAM = """
import json, sys
import jax
from ffnlab import tree
from ffnlab.formats import load

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

small, large, dtype = sys.argv[1:]
load(small, dtype=dtype)
before = status("VmRSS")
model = load(large, dtype=dtype)
jax.block_until_ready(jax.tree.leaves(model))
print(json.dumps([status("VmHWM") - before, tree.nbytes(model)]))
"""


def peaks() -> dict[str, float]:
    """`peak` for checkpoints stored in float32 and in bfloat16 and for one of a mixture, all loaded
    as float32."""
    half = np.dtype(ml_dtypes.bfloat16)
    found = {"float32": peak(np.dtype(np.float32)), "bfloat16": peak(half)}
    return found | {"mixture": peak(half, MIXTURE)}


def peak(stored: np.dtype, config: DecoderConfig = LARGE) -> float:
    """How far the peak of resident memory rises while a gigabyte is loaded as float32.

    Args:
      stored: dtype of the tensors in the files.
      config: of the model.
    Returns:
      rise in bytes over the bytes of the loaded model; 1 is the least possible.
    Raises:
      RuntimeError: the measured process failed; the message is what it said.
      OSError: not on Linux, or no room for the checkpoint in the temporary folder.
    """
    with tempfile.TemporaryDirectory() as name:
        small, large = Path(name) / "small", Path(name) / "large"
        write(small, SMALL, stored)
        write(large, config, stored)
        command = [sys.executable, "-c", PROGRAM, small, large, "float32"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"loading failed:\n{done.stderr}")
    rise, size = json.loads(done.stdout)
    return rise / size


def write(folder: Path, config: DecoderConfig, dtype: np.dtype) -> None:
    """Writes a model directory whose tensors are made when their turn comes."""
    folder.mkdir()
    write_json(folder / "config.json", write_config(config))
    block = np.random.default_rng(0).normal(0, 0.02, 1_000_003).astype(dtype)
    entries = {
        name: Entry(dtype, shape, lambda shape=shape: np.resize(block, shape))
        for name, shape in shapes(config)
    }
    write_directory(folder, entries, max_shard_bytes=SHARD_BYTES)


def shapes(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and stored shapes of the tensors of a Llama or Mixtral checkpoint."""
    d, h, kv = config.width, config.hidden, config.kv_heads * config.head_dim
    yield "model.embed_tokens.weight", (config.vocab, d)
    yield "model.norm.weight", (d,)
    if not config.tie_embeddings:
        yield "lm_head.weight", (config.vocab, d)
    if config.mixture is None:
        layer = {"mlp.gate_proj": (h, d), "mlp.up_proj": (h, d), "mlp.down_proj": (d, h)}
    else:
        names, count = {"w1": (h, d), "w3": (h, d), "w2": (d, h)}, config.mixture.experts
        inside = itertools.product(range(count), names.items())
        layer = {f"block_sparse_moe.experts.{e}.{name}": shape for e, (name, shape) in inside}
        layer["block_sparse_moe.gate"] = (count, d)
    layer |= {"self_attn.q_proj": (d, d), "self_attn.o_proj": (d, d)}
    layer |= {"self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
    layer |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
    for n in range(config.layers):
        for name, shape in layer.items():
            yield f"model.layers.{n}.{name}.weight", shape
