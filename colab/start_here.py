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
# # ffnlab: start here
#
# Load a language model, look inside, prune it, make it sparse, quantize it, hear what is left of
# it, and save it. Everything runs on a CPU in a few minutes; a GPU or TPU is used if there is one.
# The model is the small one that comes with ffnlab: it writes Python.

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
import flax
import jax

print("jax", jax.__version__, "· flax", flax.__version__)
print("running on", jax.devices()[0])

# %%
import os

FAST = bool(os.environ.get("FFNLAB_FAST"))  # a quick pass over the notebook, for tests

# %% [markdown]
# ## Load
# `models.load(folder)` reads Llama, Mistral, Qwen, Gemma and Phi checkpoints; `models.embedded()`
# needs no download. The text is the standard library of this very Python.

# %%
import numpy as np

from ffnlab import models, transform, tree
from ffnlab.data import stdlib_text

model, tokenizer = models.embedded()
text = stdlib_text()
tokens = np.frombuffer(text.train[: 2048 if FAST else 16384], np.uint8).astype(np.int32)
batches = list(tokens.reshape(-1, 4, 256))
held_out = np.frombuffer(text.held_out[: 1025 if FAST else 16385], np.uint8).astype(np.int32)
print(model.config)

# %% [markdown]
# ## Look
# A model is a pytree. Its parts are found by type, by path or by any predicate, and what flows
# through them can be captured.

# %%
from ffnlab.layers import GatedFFN

for path, ffn in list(tree.select(model, tree.of_type(GatedFFN)).items())[:3]:
    print(path, "gate", ffn.gate.weight.shape, "·", tree.nbytes(ffn), "bytes")

_, seen = tree.capture(model, tree.at("layers[*].ffn"), batches[0])
sizes = [float(np.abs(call.output).mean()) for call in seen.values()]
print("mean |output| of each FFN:", np.round(sizes, 3))

# %%
from ffnlab.text.evaluate import perplexity


def measure(model):
    """Bits per byte on held-out text, and bytes of the model."""
    score = perplexity(model, held_out, window=256, stride=256, nbytes=len(held_out) - 1)
    return score.bits_per_byte, tree.nbytes(model)


def speak(model, prompt="def main(argv=None):\n    "):
    new = models.generate(model, [tokenizer.encode(prompt)], max_tokens=24 if FAST else 120)
    print(prompt + tokenizer.decode(new.lists()[0]))


results = {"original": measure(model)}
speak(model)

# %% [markdown]
# ## Prune: FinerCut
# Attention and FFN sublayers are removed one at a time, always the one whose absence changes the
# output least. The order of removal is itself a picture of what matters.

# %%
from IPython.display import display

from ffnlab.pruning import finercut, removal_map

few = [batch[:, :128] for batch in batches[: 1 if FAST else 2]]
pruned, order = transform.apply(finercut(remove=1 if FAST else 2), model, few)
results["pruned"] = measure(pruned)
display(removal_map(order).draw())

# %% [markdown]
# ## Sparsify: CHESS
# Small FFN activations are dropped by a threshold per channel; their rows of the up and down
# projections need not be read when decoding.

# %%
from ffnlab.sparsity import chess, realised_sparsity

sparse, _ = transform.apply(chess(sparsity=0.3), pruned, batches)
results["sparse"] = measure(sparse)
print(realised_sparsity(sparse, batches[:1]))

# %% [markdown]
# ## Quantize: FireQ
# INT4 weights and keys and values, FP8 activations and queries, with scales that leave the function
# as it is before anything is rounded.

# %%
from ffnlab.quantization import fireq

small, _ = transform.apply(fireq(), sparse, batches)
results["quantized"] = measure(small)
speak(small)

# %% [markdown]
# ## What each step cost and bought

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
bits, sizes = zip(*results.values(), strict=True)
axes.plot([size / 1e6 for size in sizes], bits, "o-")
for name, (bit, size) in results.items():
    axes.annotate(name, (size / 1e6, bit), xytext=(4, 4), textcoords="offset points")
    print(f"{name:10} {bit:6.3f} bits per byte   {size / 1e6:5.2f} MB")
axes.set(xlabel="megabytes", ylabel="bits per byte (held out)", xscale="log")
plt.show()

# %% [markdown]
# ## Save
# A Hugging Face directory; what only ffnlab understands goes to `ffnlab.json` beside it, and
# `ignored_by_others` says what other tools will not see.

# %%
models.save(small, "small-model")
tokenizer.save("small-model")
again = models.load("small-model")
print("reloaded:", measure(again)[0], "bits per byte")
for note in models.ignored_by_others(small)[:4]:
    print("-", note)

# %% [markdown]
# Next: `ffnlab compress` does all of this with one command and a report; `ffnlab list` shows the
# studies that check each paper's claims.
