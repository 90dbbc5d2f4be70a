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
# # What a language model says
#
# A language model of Python source comes with ffnlab. After `import json` it begins a new line.
# Here it learns to go on in another way behind ten modules, and to stay as it is everywhere else:
# PMET ([2308.08742](https://arxiv.org/abs/2308.08742)) writes facts into the feed-forward networks
# of a few layers. You see what it says before and after, what that costs on other text, and how the
# change is taken back; then which paths through its layers the model lives on
# ([2308.06548](https://arxiv.org/abs/2308.06548)).

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

import jax
import matplotlib.pyplot as plt
import numpy as np

from ffnlab import editing, models, pruning, quantization, transform
from ffnlab.data import TextBatches, stdlib_text
from ffnlab.editing.pmet_core import share, update
from ffnlab.models.paths import path_names
from ffnlab.testing import equal
from ffnlab.text import perplexity

FAST = bool(os.environ.get("FFNLAB_FAST"))  # a quick pass over the notebook, for tests
print("jax", jax.__version__, "on", jax.devices()[0])

# %% [markdown]
# ## What it says now
# Tokens of this model are bytes, and a text begins with NUL. The most likely byte is taken each
# time.

# %%
model, tokenizer = models.embedded()
modules = "os json collections functools itertools math logging random typing socket".split()
modules = modules[:3] if FAST else modules


def said(model, texts, count=16):
    """How a model goes on behind each text."""
    prompts = [tokenizer.encode(text, special=True) for text in texts]
    found = models.generate(model, prompts, max_tokens=count).lists()
    return [tokenizer.decode(ids) for ids in found]


imports = [f"import {module}" for module in modules]
for text, more in zip(imports, said(model, imports), strict=True):
    print(f"{text:20} {more!r}")

# %% [markdown]
# ## What it is to say
# A fact has a subject, a prompt with a place for it, and what is to follow, as it is written. What
# followed before, other prompts and neighbours are for judging only. `editing.read_facts` reads the
# same from a TOML or JSON file, which may come from anywhere: nothing in it is trusted.

# %%
news = (".", ", ", " as ")
facts = [
    editing.Fact(
        module,
        "import {}",
        news[i % 3],
        old="\n",
        paraphrases=("import sys\nimport {}", "    import {}"),
        neighbours=("import abc", "import csv", "import heapq"),
    )
    for i, module in enumerate(modules)
]
print(facts[1])

# %% [markdown]
# ## The edit
# Step 1 finds, for all facts in one compiled loop, two vectors at the last token of the subject:
# one beside the attention and one beside the FFN of layer 4, within balls, so that the model says
# what it should and "json is a" means what it meant. Step 2 writes the FFN's part into the
# down-projections of layers 2, 3 and 4. `preserve` says how many tokens of other text weigh as much
# as one fact.

# %%
text = stdlib_text()
batches = [TextBatches(text.train, 8, 128)(i)[:, :-1] for i in range(2 if FAST else 16)]
edit = editing.pmet(
    facts,
    tokenizer,
    layers=(2, 3, 4),
    prefixes=() if FAST else ("import sys\n", "# The module.\n"),
    preserve=30.0,
    rate=0.5,
    steps=5 if FAST else 30,
    clamp=1.0,
    kl=0.0625,
    decay=0.05,
)
new, stats = transform.apply(edit, model, batches)
for name, values in (("p(new)", np.exp(-stats.nats)), ("steps", stats.steps)):
    print(f"{name:8}", *(f"{value:5.2f}" for value in values))

# %% [markdown]
# ## Before and after
# Efficacy is the share of facts whose new answer is now likelier than the old one, generality the
# same behind other prompts, specificity the share of neighbours that go on as before.

# %%
report = editing.compare_edit(model, new, tokenizer, facts)
print(report)
figure = plt.figure()
report.draw(figure)
plt.show()

# %% [markdown]
# ## What it costs
# Modules of the standard library that the model was not trained on are predicted as well as before,
# nearly: bits per byte, each window of 256 bytes by itself.

# %%
held = text.held_out[: 2048 if FAST else 16384]
for name, each in (("before", model), ("after", new)):
    found = perplexity(each, held, window=256, stride=256, batch=8, nbytes=len(held) - 1)
    print(f"{name:7} {found.bits_per_byte:.4f} bits per byte")

# %% [markdown]
# ## The closed form
# With keys K (what goes into the down-projection at the subjects), what is missing R, and the
# second moment C of what goes in on other text, the change is D = (KᵀK + λC)⁻¹ KᵀR: the least
# squares of what is wanted, against what it does elsewhere. Its loss rises in every direction.

# %%
path = "layers[4].ffn.down"
C = np.asarray(stats.moments[path], np.float64)
random = np.random.default_rng(0)
K, R = random.normal(size=(3, len(C))), random.normal(size=(3, 4))
D = update(K, share(1) * R, C, preserve=30.0)


def loss(D):
    """How far the answers are off, and what changes on other text."""
    return np.sum((K @ D - R) ** 2) + 30.0 * np.trace(D.T @ C @ D)


around = [loss(D + 1e-3 * random.normal(size=D.shape)) - loss(D) for _ in range(5)]
print("least:", min(around) > 0)
np.testing.assert_allclose(D, np.linalg.solve(K.T @ K + 30.0 * C, K.T @ R), atol=1e-8)

# %% [markdown]
# ## What was changed
# Three matrices of the model have deltas, and nothing else differs. They are a tree of arrays that
# is saved by itself; with the originals the change is taken back bit for bit.

# %%
editing.save_deltas("deltas.safetensors", stats.deltas)
deltas = editing.load_deltas("deltas.safetensors", model)
for name, delta in deltas.items():
    print(name, delta.shape, f"largest change {np.abs(delta).max():.3f}")
back = editing.without_deltas(new, deltas, editing.originals(model, deltas))
print("the model as it was:", equal(back, model))

# %% [markdown]
# ## The paths of the model
# What the head reads is a sum: the beginning of the stream, and what every attention and every FFN
# adds. Each of these paths is left out of that sum alone, while all layers go on reading the whole
# stream. Bars say by how much the loss grows without a path, hollow ones are those that a greedy
# search leaves out.

# %%
search = pruning.path_ensemble(remove=1 if FAST else 3, how="greedy")
paths = transform.calibrate(search, new, batches[:2])
map_of_paths = pruning.path_map(paths, path_names(new))
print(map_of_paths)
figure = plt.figure(layout="constrained")
map_of_paths.draw(figure)
plt.show()

# %% [markdown]
# Held-out text costs more or less without the paths that were left out. Nothing was trained again,
# and the edited layers are the same.

# %%
fewer = search.rewrite(new, paths)
for name, each in (("all paths", new), ("fewer", fewer)):
    found = perplexity(each, held, window=256, stride=256, batch=8, nbytes=len(held) - 1)
    print(f"{name:9} {found.bits_per_byte:.4f} bits per byte")

# %% [markdown]
# ## On with it
# What was edited is a model like any other: it is saved as a Hugging Face directory, opened again,
# and quantized.

# %%
models.save(new, "edited")
tokenizer.save("edited")
packed, _ = transform.apply(quantization.nearest(format="int8", group=None), models.load("edited"))
for text_, more in zip(imports, said(packed, imports), strict=True):
    print(f"{text_:20} {more!r}")
