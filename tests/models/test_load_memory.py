"""Loading takes the memory of the model and little more: peak of a fresh process, 1 GB and up."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from ffnlab.models import DecoderConfig
from ffnlab.models import safetensors as st
from ffnlab.models.families import write_config

CONFIG = DecoderConfig(
    vocab=20_000,
    width=2048,
    hidden=5632,
    layers=4,
    heads=16,
    kv_heads=4,
    head_dim=128,
    tie_embeddings=False,
)
LIMIT = 1.2  # the bound on (rise of the peak) / (bytes of the loaded model)
CHILD = """
import json, sys
import jax
from ffnlab import tree
from ffnlab.models.load import load

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field))

small, large, dtype = sys.argv[1:]
load(small, dtype=dtype)
before = status("VmRSS")
model = load(large, dtype=dtype)
jax.block_until_ready(jax.tree.leaves(model))
print(json.dumps({"rise": status("VmHWM") - before, "size": tree.nbytes(model)}))
"""


def write(folder, config, dtype):
    """A directory of that config, with arrays that are made when they are written."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(write_config(config)))
    block = np.random.default_rng(0).normal(0, 0.02, 1_000_003).astype(dtype)
    d, h, kv = config.width, config.hidden, config.kv_heads * config.head_dim
    layer = {"mlp.gate_proj": (h, d), "mlp.up_proj": (h, d), "mlp.down_proj": (d, h)}
    layer |= {"self_attn.q_proj": (d, d), "self_attn.o_proj": (d, d)}
    layer |= {"self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
    layer |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
    shapes = {"model.embed_tokens.weight": (config.vocab, d), "model.norm.weight": (d,)}
    shapes["lm_head.weight"] = (config.vocab, d)
    for n in range(config.layers):
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()}
    st.write_directory(
        folder,
        {
            name: st.Entry(np.dtype(dtype), shape, lambda s=shape: np.resize(block, s))
            for name, shape in shapes.items()
        },
        max_shard_bytes=400_000_000,
    )


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc (Linux)")
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_peak_of_loading_a_gigabyte(tmp_path, stored):
    small = DecoderConfig(vocab=8, width=8, hidden=8, layers=1, heads=1, kv_heads=1, head_dim=8)
    write(tmp_path / "small", small, stored)
    write(tmp_path / "large", CONFIG, stored)
    # One device, as a user has; the fixture's eight do not matter here.
    environment = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, "-c", CHILD, tmp_path / "small", tmp_path / "large", "float32"]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(out.stdout)
    assert found["size"] > 10**9
    ratio = found["rise"] / found["size"]
    print(f"{np.dtype(stored).name} to float32: peak {ratio:.3f} of {found['size'] / 1e9:.2f} GB")
    assert ratio <= LIMIT
