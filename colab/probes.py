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
# # Looking into a network
#
# A small network learns digits. You see which pixels speak for an answer and how much of it comes
# from constants (linear interpreters, [1908.05168](https://arxiv.org/abs/1908.05168)), how far
# pixels may move before the answer can change (safety verification,
# [1610.06940](https://arxiv.org/abs/1610.06940)), and what layers know of their input and of the
# answer while a network learns ([1703.00810](https://arxiv.org/abs/1703.00810)). At the end you
# write a probe of your own.

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
import dataclasses
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from ffnlab import parallel, probe
from ffnlab.analysis import Cube, information_plane, interpret, linear_bounds, verify, votes
from ffnlab.data import ArrayBatches, Labelled, digits, ring
from ffnlab.layers import MLP
from ffnlab.learning import backprop, labelled
from ffnlab.parallel import LoopOptions
from ffnlab.report import Report

FAST = bool(os.environ.get("FFNLAB_FAST"))  # a quick pass over the notebook, for tests
print("jax", jax.__version__, "on", jax.devices()[0])

# %%
train, test = digits()
steps = 20 if FAST else 600
rule = backprop(labelled, optax.adamw(3e-3, weight_decay=0.1))
net = MLP((64, 32, 10), key=jax.random.key(0))
outcome = parallel.train(
    rule, net, ArrayBatches(train, 64), steps, key=jax.random.key(1), together=10
)
net = rule.model(outcome.state)
print(f"accuracy {float((net(test.x).argmax(-1) == test.y).mean()):.3f}")

# %% [markdown]
# ## What an answer is made of
# With every unit's decision kept as an input made it, the network is affine: logits = F x + r. A
# pixel votes for a class by its part of F x, red for it and blue against it; r is what biases and
# decisions give without any input.

# %%
chosen = np.array([int(np.flatnonzero(test.y == digit)[0]) for digit in range(6)])
fig, axes = plt.subplots(2, len(chosen), figsize=(8, 3))
for column, x in zip(axes.T, test.x[chosen], strict=True):
    at = interpret(net, jnp.asarray(x))
    named = int(net(x).argmax())
    found = votes(at, named)
    most = float(jnp.abs(found.of).max())
    column[0].imshow(x.reshape(8, 8), cmap="gray_r")
    column[0].set_title(f"{named}: {float(found.share):.0%} constant", fontsize=8)
    column[1].imshow(found.of.reshape(8, 8), cmap="RdBu_r", vmin=-most, vmax=most)
    for axis in column:
        axis.set(xticks=[], yticks=[])
plt.show()
error = jnp.abs(at.matvec(x) + at.residual - net(x)).max()
print(f"F x + r is the logits to {float(error):.1e}")

# %% [markdown]
# ## How far pixels may move
# Bounds hold for every input of a box, not only for those that were tried. `verify` bounds cells
# of it, halves those that are not decided, and says "unsafe" only with a witness, "safe" only
# with a proof.

# %%
x = test.x[chosen[0]]
label = int(net(x).argmax())
radii = np.linspace(0.002, 0.05, 4 if FAST else 13)


@jax.jit
def least(radius):
    """The least the label's logit can be above each other one."""
    box = linear_bounds(lambda z: net(z)[label] - net(z), x - radius, x + radius)
    return jnp.delete(box.low, label, assume_unique_indices=True).min()


plt.figure(figsize=(4.5, 2.6))
plt.plot(radii, [least(radius) for radius in radii])
plt.axhline(0, color="0.6", linewidth=1)
plt.xlabel("every pixel by at most")
plt.ylabel("least margin, proved")
plt.show()
for radius in (0.01, 0.1, 0.3):
    verdict = verify(net, Cube(x, radius), most_cells=64 if FAST else 512)
    print(radius, verdict.status, verdict.proof or f"another class: {verdict.other}")

# %% [markdown]
# ## What layers know while a network learns
# A world of 4,096 inputs, all of which are looked at, so that information is counted and not
# estimated. Tanh units saturate: layers come to know the answer, I(T;Y), and forget much of their
# input, I(X;T).

# %%
world = ring()
learner = MLP((12, 10, 7, 5, 4, 3, 2), key=jax.random.key(0), activation="tanh")
count, points = (60, 4) if FAST else (6000, 25)
rule = backprop(labelled, optax.adam(2e-3))
watch = probe.along(information_plane(), rule, [(world.x, world.y)])
outcome = parallel.train(
    rule,
    learner,
    ArrayBatches(Labelled(world.x, world.y), 512),
    count,
    key=jax.random.key(2),
    evaluate=watch,
    options=LoopOptions(
        evaluate_at=tuple(int(n) for n in np.unique(np.geomspace(1, count, points).astype(int)))
    ),
    together=10,
)

# %%
found = outcome.evaluations
layers = [name.removeprefix("input/") for name in next(iter(found.values())) if "input/" in name]
plt.figure(figsize=(4.5, 3.2))
for layer in layers:
    points = [(row[f"input/{layer}"], row[f"label/{layer}"]) for row in found.values()]
    plt.plot(*zip(*points, strict=True), ".-", linewidth=0.8, label=layer)
plt.xlabel("I(X;T), bits")
plt.ylabel("I(T;Y), bits")
plt.legend(fontsize=7)
plt.show()

# %% [markdown]
# ## A probe of your own
# A probe is made of what is measured of each row and what becomes of all rows: here the share of
# hidden units that never fire, on any input. It runs over batches of any size, along training by
# `probe.along`, and its report prints, draws and writes itself.


# %%
@dataclasses.dataclass(frozen=True)
class Silent(Report):
    """How many units of a layer are 0 on all inputs."""

    share: float

    def rows(self):
        return [{"silent units": self.share}]

    def figures(self):
        return {"silent": self.share}

    def draw(self, figure):
        figure.subplots().bar(["silent", "not"], [self.share, 1 - self.share])


silent = probe.rows(
    "silent",
    lambda model, batch: model.maps[0](batch[0]) > 0,  # [rows, units]
    lambda model, fires: Silent(float(1 - fires.any(0).mean())),
)
print(silent(net, [(test.x[:200], test.y[:200]), (test.x[200:], test.y[200:])]))
