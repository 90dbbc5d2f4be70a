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
# # A smaller network, found
#
# One network is trained so that its narrow and shallow forms work too. LINAS
# ([2202.12954](https://arxiv.org/abs/2202.12954)) then looks among them for those with a low loss
# and few multiplications: it measures some, fits predictors, and measures next what these say is
# best. A network of its front is cut out, saved, opened again and timed.

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
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from ffnlab import models, parallel
from ffnlab.data import ArrayBatches, digits
from ffnlab.learning import backprop
from ffnlab.losses import labelled
from ffnlab.models import account
from ffnlab.pruning import elastic
from ffnlab.pruning import search as nas

FAST = bool(os.environ.get("FFNLAB_FAST"))  # a quick pass over the notebook, for tests
print("jax", jax.__version__, "on", jax.devices()[0])

# %% [markdown]
# ## Digits
# 1437 digits of 8 x 8 pixels. Every fifth of them chooses between networks and is not learned from;
# 360 others are held out and looked at once, at the end.

# %%
train, test = (part._replace(x=part.x.reshape(-1, 8, 8, 1)) for part in digits())
chooses = np.arange(len(train.y)) % 5 == 4
valid = jnp.asarray(train.x[chooses]), jnp.asarray(train.y[chooses])
train = train._replace(x=train.x[~chooses], y=train.y[~chooses])
fig, axes = plt.subplots(1, 8, figsize=(8, 1.2))
for axis, image, label in zip(axes, train.x, train.y, strict=False):
    axis.imshow(image[..., 0], cmap="gray_r")
    axis.set(title=str(label), xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## A super-network
# A vision transformer of four blocks. A network in it has one to four of them, 8 to 128 channels in
# the FFN of each, and weights of 32 or 8 bits there.

# %%
config = models.ViTConfig(
    (8, 8), patch=4, width=32, hidden=128, layers=4, heads=4, channels=1, classes=10, pool="mean"
)
model = models.ViT(config, key=jax.random.key(0))
net = nas.supernet(model, (8, 16, 32, 64, 128), depths=(1, 2, 3, 4), formats=("float", "int8"))
print(f"{net.space.networks:,} networks in {account.parameters(model):,} parameters")

# %% [markdown]
# Each step trains the largest network, the smallest, and two that are drawn (the sandwich rule);
# they share their weights.

# %%
steps = 10 if FAST else 600
loss = elastic(labelled, net.widths, depths=net.depths)
rate = optax.cosine_decay_schedule(3e-3, steps)
rule = backprop(loss, optax.adam(rate), informed=True)
outcome = parallel.train(
    rule, model, ArrayBatches(tuple(train), 64), steps, key=jax.random.key(1), together=10
)
model = rule.model(outcome.state)

# %% [markdown]
# ## Three searches of equal budgets
# `measuring` gives the loss and the costs of any network. The loss is computed by masks, in one
# program for all; products and bytes are counted. Random search and plain evolution measure as many
# networks as LINAS does.

# %%
names = ("loss", "macs", "bytes")
budget, population = (8, 4) if FAST else (100, 20)
measure = nas.measuring(net, model, valid, turns=None)
logs = {}
for tactic in ("linas", "evolution", "random"):
    options = nas.SearchOptions(names, budget, tactic, population, inner=40 if FAST else 2000)
    logs[tactic] = nas.search(net.space, measure, options)

# %% [markdown]
# The hypervolume is the share of the box below the worst values that a front dominates: the larger,
# the better. One seed says little; `ffnlab run hardware-aware-nas` takes five.

# %%
largest = {"depth": (4,), "width": (128,) * 4, "format": ("float",) * 4}
whole = measure(largest)
corner = np.array([np.log(10), whole["macs"], whole["bytes"]])
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
for color, (tactic, log) in enumerate(logs.items()):
    points = nas.measured(log)[1]
    volume = nas.hypervolume(points / corner, np.ones(3))
    for axis, column in zip(axes, (1, 2), strict=True):
        best = points[nas.front(points[:, [column, 0]])]
        axis.plot(points[:, column], points[:, 0], ".", color=f"C{color}", alpha=0.3)
        axis.step(best[:, column], best[:, 0], color=f"C{color}", where="post", label=tactic)
        axis.set_xlabel(f"{names[column]} of a network")
    print(f"{tactic}: hypervolume {volume:.3f}")
axes[0].set_ylabel("validation loss, nats")
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## The chosen network
# The lowest loss within half of the multiplications. `cut` makes a model of its own of it, which is
# saved and opened like any other.

# %%
vectors, values = nas.measured(logs["linas"])
limit = {"macs": (0.9 if FAST else 0.5) * whole["macs"]}
chosen = net.space.decode(vectors[nas.best_within(values, names, limit)])
models.save(net.cut(model, chosen), "found", format="ffnlab")
found = models.load("found")
print(chosen)

# %% [markdown]
# ## Timed
# Both run in turns on all held-out images, so that what else the machine does falls on both. On a
# processor without products of small integers INT8 saves space, not time.

# %%
images, run = jnp.asarray(test.x), jax.jit(lambda model, x: model(x))
timer = nas.meter(model, images, turns=5 if FAST else 41)
costs = {"whole": timer(model), "found": timer(found)}
both = {"whole": model, "found": found}
shown = {
    "accuracy": [float((run(m, images).argmax(-1) == test.y).mean()) for m in both.values()],
    "thousand products": [cost.macs / 1000 for cost in costs.values()],
    "kilobytes": [cost.bytes / 1000 for cost in costs.values()],
    "milliseconds": [1000 * cost.seconds.median for cost in costs.values()],
}
fig, axes = plt.subplots(1, 4, figsize=(12, 1.8), sharey=True)
for axis, (what, numbers) in zip(axes, shown.items(), strict=True):
    bars = axis.barh(list(costs), numbers, color=["C7", "C0"])
    axis.bar_label(bars, fmt="%.3f" if what == "accuracy" else "%.1f", padding=3)
    axis.set(title=what, xlim=(0, 1.3 * max(numbers)))
axes[0].invert_yaxis()
plt.show()
ratio = costs["found"].ratio
print(f"time over the whole network's: {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})")

# %% [markdown]
# The command line does the same of any saved model: `ffnlab search search.toml --budget ms=3`.
