# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Training on a mesh
#
# Parameters carry logical axis names; a layout maps them to mesh axes. The same code runs on one
# core, on eight pretended devices (here, without an accelerator), on a GPU or on a TPU.

# %%
source = "ffnlab"  # @param {type: "string"}
# The released package, or the path of a clone or of a wheel; one beside this notebook is found.

import importlib.util
import pathlib
import subprocess
import sys

spec = importlib.util.find_spec("ffnlab")
if spec is None or spec.origin is None:  # a clone beside this notebook looks like a package
    beside = [*pathlib.Path().glob("ffnlab-*.whl"), pathlib.Path("ffnlab"), pathlib.Path("..")]
    places = beside if source == "ffnlab" else [pathlib.Path(source)]
    there = [p for p in places if p.suffix == ".whl" or (p / "ffnlab/__init__.py").is_file()]
    chosen = there[0].resolve() if there else source
    if subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"{chosen}[run]"]).returncode:
        sys.exit(f"pip cannot install {chosen}: put a clone or wheel of ffnlab beside the notebook")
    importlib.invalidate_caches()

import ffnlab

print("ffnlab", ffnlab.__version__, "· Python", sys.version.split()[0])

# %%
import os

# On CPUs only; must be set before jax starts.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import matplotlib.pyplot as plt
import numpy as np

FAST = bool(os.environ.get("FFNLAB_FAST"))  # a quick pass over the notebook, for tests
print(len(jax.devices()), "devices:", jax.devices()[0].platform)

# %% [markdown]
# ## A model and its axes

# %%
from flax import nnx

from ffnlab import tree
from ffnlab.models import Decoder, DecoderConfig

config = DecoderConfig(vocab=256, width=64, hidden=128, layers=2, heads=4, kv_heads=2, head_dim=16)
model = Decoder(config, key=jax.random.key(0))
for path, node in tree.walk(model):
    if isinstance(node, nnx.Param) and "layers[1]" not in path:
        print(f"{path:28} {node.axes}")

# %% [markdown]
# ## Meshes
# `dp` splits the batch, `fsdp` also the parameters, `tp` the wide axes, `sp` the sequence. A size
# that does not divide is an error that names the parameter, an axis that cuts nothing is one too.

# %%
from ffnlab import parallel
from ffnlab.data import TextBatches, stdlib_text
from ffnlab.learning import backprop

batches = TextBatches(stdlib_text().train, batch=8, length=64)
devices = len(jax.devices())
meshes = ["dp=-1"] if devices < 8 else ["dp=8", "fsdp=8", "tp=2", "dp=2,fsdp=2,tp=2", "dp=2,sp=4"]


def losses(mesh, steps, model=model):
    """The state after some steps on a mesh, and the loss of each."""
    rule = backprop()
    state = parallel.shard(rule.init(model, jax.random.key(1)), mesh)
    step, found = parallel.make_step(rule, mesh), []
    for position in range(steps):
        state, metrics = step(state, parallel.place_batch(batches(position), mesh))
        found.append(float(metrics["loss"]))
    return state, found


# %%
runs = {text: losses(parallel.parse_mesh(text), 3 if FAST else 30) for text in ["dp=1", *meshes]}
alone = np.array(runs["dp=1"][1])
for text, (_, found) in runs.items():
    print(f"{text:18} last loss {found[-1]:.4f}, from one device {np.abs(found - alone).max():.1e}")

# %%
for text, (_, found) in runs.items():
    plt.plot(found, label=text)
plt.xlabel("step")
plt.ylabel("loss, nats")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Stages
# `pp` cuts the layers: each device has some of them, and the parts of a batch go through one after
# the other. In every tick each stage works on another part; at both ends some have nothing to do,
# the bubble. More parts make it smaller, and so do more repeats, in which a stage has layers of
# several places of the model.

# %%
from ffnlab import models

staged = models.pipeline(model, stages=2, microbatches=4)
repeat, number, busy = staged.layers.schedule.work()
plt.imshow(np.where(busy, number, np.nan).T)
plt.xlabel("tick")
plt.ylabel("stage")
plt.title(f"which part is where; a bubble of {staged.layers.schedule.bubble:.0%}")
plt.show()
print(staged.layers.period[0].ffn.up.w.axes, staged.layers.period[0].ffn.up.weight.w.shape)

# %%
for text in ["dp=1"] if devices < 8 else ["pp=2", "dp=2,pp=2", "fsdp=2,pp=2,tp=2"]:
    _, found = losses(parallel.parse_mesh(text), len(alone), staged)
    print(f"{text:18} last loss {found[-1]:.4f}, from one device {np.abs(found - alone).max():.1e}")

# %% [markdown]
# The state goes on in any other form: a list that generates, or a stack on a mesh without stages.

# %%
listed = models.unpipeline(staged)
print(
    len(listed.layers), "layers;", all(map(np.array_equal, *map(jax.tree.leaves, (listed, model))))
)

# %% [markdown]
# ## Context
# `sp` cuts rows of tokens, and no device ever has the keys of whole rows. Where it divides the
# heads, devices exchange heads for tokens (Ulysses); for other numbers of heads, windows and packed
# rows, keys go round a ring. Which it is, the compiled step says.

# %%
import dataclasses

from ffnlab.parallel.program import read_program

windowed = Decoder(dataclasses.replace(config, windows=(16, 16)), key=jax.random.key(0))
mesh = parallel.parse_mesh("dp=1" if devices < 8 else "dp=2,sp=4")
for name, each in [("heads for tokens", model), ("keys of neighbours", windowed)]:
    state = parallel.shard(backprop().init(each, jax.random.key(1)), mesh)
    batch = parallel.place_batch(batches(0), mesh)
    compiled = parallel.make_step(backprop(), mesh).trace(state, batch).lower().compile()
    print(f"{name}:")
    for kind, (count, size) in read_program(compiled.as_text()).sent.items():
        print(f"    {count:3} x {kind}, {size / 2**20:.2f} MiB")

# %% [markdown]
# ## Where a matrix lies

# %%
state, _ = runs[meshes[-2] if len(meshes) > 1 else meshes[0]]
up = state.model.layers[0].ffn.up.weight.w
print(up.shape, "as", up.sharding.spec, "on", dict(up.sharding.mesh.shape))
jax.debug.visualize_array_sharding(up)

# %% [markdown]
# ## Before renting a machine
# `ffnlab plan` compiles a step for any number of pretended devices, without data: here Llama 3 8B
# on 64 devices.

# %%
import json
from pathlib import Path

llama = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
Path("config.json").write_text(json.dumps(llama))
command = "plan config.json --mesh dp=4,fsdp=8,tp=2 --batch 64 --length 2048 --remat nothing"
done = subprocess.run([sys.executable, "-m", "ffnlab", *command.split()], capture_output=True)
print(done.stdout.decode(), done.stderr.decode()[-500:])
