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
# # Blocks of another structure
#
# A vision transformer is trained on digits with FFNs of which most channels idle, and folded into a
# smaller network that computes the same (RePaViT, [2505.21847](https://arxiv.org/abs/2505.21847)).
# Then its weights are quantized, and you see what size, time and accuracy became. The matrices of
# FFNs become products of thin ones, and a network of any depth is made from one that was trained
# once. At the end a network with long skips draws digits.

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
import statistics
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from ffnlab import models, parallel, quantization, transform
from ffnlab.data import ArrayBatches, digits
from ffnlab.learning import backprop
from ffnlab.losses import denoising, labelled, measuring
from ffnlab.models import account
from ffnlab.models.sample_diffusion import multistep
from ffnlab.structure import expand, paper_options, repa, repa_fold, scalelong, share, structured

FAST = bool(os.environ.get("FFNLAB_FAST"))  # a quick pass over the notebook, for tests
print("jax", jax.__version__, "on", jax.devices()[0])

# %% [markdown]
# ## Digits as images
# 1437 digits of 8 x 8 pixels to learn from, 360 that are held out. A patch of 2 x 2 pixels is a
# token.

# %%
train, test = (part._replace(x=part.x.reshape(-1, 8, 8, 1)) for part in digits())
fig, axes = plt.subplots(1, 8, figsize=(8, 1.2))
for axis, image, label in zip(axes, train.x, train.y, strict=False):
    axis.imshow(image[..., 0], cmap="gray_r")
    axis.set(title=str(label), xticks=[], yticks=[])
plt.show()

# %%
config = models.ViTConfig(
    (8, 8),
    patch=2,
    width=32 if FAST else 64,
    hidden=128 if FAST else 256,
    layers=4,
    heads=4,
    channels=1,
    classes=10,
    pool="mean",
)
vit = models.ViT(config, key=jax.random.key(0))
print(f"{account.parameters(vit):,} parameters")

# %% [markdown]
# ## Idle channels
# `repa` lets a nonlinearity see a quarter of an FFN's channels and passes the others on as they
# are, between two batch norms. Both networks are trained by the same rule for the same steps.

# %%
idle, _ = transform.apply(repa(idle=0.75), vit)


def learn(model):
    """The model after some steps, about half a minute on two cores."""
    steps = 10 if FAST else 400
    rate = optax.cosine_decay_schedule(3e-3, steps)
    rule = backprop(measuring(labelled), optax.adamw(rate, weight_decay=0.05))
    outcome = parallel.train(
        rule, model, ArrayBatches(tuple(train), 64), steps, key=jax.random.key(1), together=10
    )
    return rule.model(outcome.state)


vit, idle = learn(vit), learn(idle)

# %% [markdown]
# ## The fold
# What idles is linear, so norms, idle channels and the residual are one matrix: two matrices of the
# active channels and one of the width remain, and the network computes what it did.

# %%
folded, _ = transform.apply(repa_fold(), idle)
run = jax.jit(lambda model, x: model(x))
difference = jnp.abs(run(folded, test.x) - run(idle, test.x)).max()
print(f"largest difference of a score: {float(difference):.1e}")
print(f"{account.parameters(idle):,} parameters became {account.parameters(folded):,}")

# %% [markdown]
# What is folded is a model like any other: it is saved, opened and quantized.

# %%
models.save(folded, "folded", format="ffnlab")
packed, _ = transform.apply(quantization.nearest(format="int8", group=None), models.load("folded"))

# %% [markdown]
# ## Accuracy, size, time
# Times are of 360 images at once, the four in turns, so that what else the machine does falls on
# all of them. On a processor without products of small integers INT8 saves space, not time.


# %%
def score(model):
    """The share of held-out digits that a model names."""
    return float((run(model, test.x).argmax(-1) == test.y).mean())


networks = {"trained plainly": vit, "idle": idle, "folded": folded, "folded, INT8": packed}
times = {name: [] for name in networks}
for _ in range(3 if FAST else 20):
    for name, model in networks.items():
        start = time.perf_counter()
        run(model, test.x).block_until_ready()
        times[name].append(time.perf_counter() - start)
found = {
    "accuracy": [score(model) for model in networks.values()],
    "kilobytes": [account.nbytes(model) / 1000 for model in networks.values()],
    "milliseconds": [1000 * statistics.median(each[1:]) for each in times.values()],
}

# %%
fig, axes = plt.subplots(1, 3, figsize=(11, 2.6), sharey=True)
for axis, (what, values) in zip(axes, found.items(), strict=True):
    bars = axis.barh(list(networks), values, color=["C7", "C1", "C0", "C2"])
    axis.bar_label(bars, fmt="%.3f" if what == "accuracy" else "%.1f", padding=3)
    axis.set(title=what, xlim=(0, 1.25 * max(values)))
axes[0].invert_yaxis()
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Thin products
# A matrix of an FFN may be a product of two thin ones (structured FFNs,
# [2406.16450](https://arxiv.org/abs/2406.16450)). `structured` puts the nearest product in place of
# each trained matrix beyond the first layer, with 63 or 32 % of its numbers as in the paper. The
# thinner ones are then trained on, for as many steps again.

# %%
thin = {"dense": vit}
for percent in (63, 32):
    options = paper_options("low_rank", config.width, percent)
    thin[f"{percent} %"], _ = transform.apply(structured(**options), vit)
thin["32 %, trained on"] = learn(thin["32 %"])
for name, model in thin.items():
    print(f"{name}: {account.parameters(model):,} parameters, accuracy {score(model):.3f}")

# %% [markdown]
# ## One network, many depths
# Learngene (SWS) trains a network whose layers share the weights of a few stages; one of any depth
# begins with copies of them ([2404.16897](https://arxiv.org/abs/2404.16897)). Here two stages of
# two layers each are trained, and networks of two to eight layers looked at before they are.

# %%
stages, _ = transform.apply(share(repeats=(2, 2)), models.ViT(config, key=jax.random.key(2)))
stages = learn(stages)
depths = (2, 4, 6, 8)
begun = [transform.apply(expand(layers=depth), stages)[0] for depth in depths]
plt.figure(figsize=(4, 2.6))
plt.plot(depths, [score(model) for model in begun], "o-")
plt.xlabel("layers")
plt.ylabel("accuracy before training on")
plt.ylim(0, 1)
plt.show()

# %% [markdown]
# ## Long skips, and digits that nobody wrote
# A U-ViT finds the noise in images: what the first half of its blocks makes is given to the second
# half, the last first. ScaleLong ([2310.13545](https://arxiv.org/abs/2310.13545)) gives the inner
# skips less by powers of kappa, which keeps gradients of deep networks even. Images are drawn by
# taking a little of the noise away, many times.

# %%
width, steps = (16, 20) if FAST else (48, 1000)  # about a minute on two cores
config = models.UViTConfig((8, 8), 2, width, 4 * width, depth=4, heads=4, channels=1)
uvit = models.stack(models.UViT(config, key=jax.random.key(3)))
uvit, _ = transform.apply(scalelong(kappa=0.7), uvit)
print("factors of the skips, innermost first:", uvit.scaling.factors(2))
rule = backprop(denoising, optax.adamw(optax.cosine_decay_schedule(1e-2, steps)), informed=True)
outcome = parallel.train(
    rule, uvit, ArrayBatches(train.x, 64), steps, key=jax.random.key(4), together=10
)

# %%
shape, solver = (40, 8, 8, 1), 5 if FAST else 50
images = multistep(rule.model(outcome.state), jax.random.key(5), shape=shape, steps=solver)
fig, axes = plt.subplots(4, 10, figsize=(8, 3.4))
for axis, image in zip(axes.flat, images, strict=True):
    axis.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
plt.show()
