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
# # One trainer, many learning rules
#
# A rule is three functions over one state: `init`, `step`, `predict`. The trainer never asks which
# rule it holds. Here one network learns the handwritten digits by backpropagation and by two rules
# that send no error through depth; then you write a rule of your own, without any gradient.

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

FAST = bool(os.environ.get("FFNLAB_FAST"))  # a quick pass over the notebook, for tests
print("jax", jax.__version__, "on", jax.devices()[0])

# %% [markdown]
# ## The digits

# %%
from ffnlab.data import ArrayBatches, digits

train_data, test_data = digits()
figure, axes = plt.subplots(1, 8, figsize=(8, 1.4))
for i, axis in enumerate(axes):
    axis.imshow(train_data.x[i].reshape(8, 8), cmap="gray_r")
    axis.set_title(str(train_data.y[i]))
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Three rules
# - **backpropagation** follows the gradient of the loss through all layers;
# - **counter-current learning** ([2409.19841](https://arxiv.org/abs/2409.19841)) runs a second
#   network from the classes back towards the input and pulls the two together, layer by layer;
# - **NoProp** ([2503.24322](https://arxiv.org/abs/2503.24322)) teaches each block, alone, to remove
#   noise from the code of the class.

# %%
from ffnlab.layers import MLP
from ffnlab.learning import NoPropNet, backprop, counter_current, labelled, noprop

key = jax.random.key(0)
mlp = MLP((64, 128, 128, 128, 10), key=key, activation="elu", bias=False)
rules = {
    "backprop": (backprop(labelled, optax.sgd(0.1)), mlp),
    "counter-current": (counter_current(), mlp),
    "noprop": (noprop(), NoPropNet(64, 10, key=key, hidden=48, blocks=8)),
}

# %% [markdown]
# ## Training
# `parallel.train` runs any rule: batches by position, evaluation, and (with a folder) checkpoints
# that resume to the same bits. Rates are not tuned here, so the curves rank nothing:
# `ffnlab run learning-rules` gives every rule as many rates, chosen on a validation split.

# %%
from ffnlab import parallel


def learn(rule, model, steps, every):
    """Test accuracy by step."""
    curve = {}

    def evaluate(state):
        scores = np.asarray(rule.predict(state, jnp.asarray(test_data.x)))
        curve[len(curve) * every + every] = float(np.mean(scores.argmax(-1) == test_data.y))
        return {"accuracy": curve[max(curve)]}

    options = parallel.LoopOptions(log_every=0, evaluate_every=every, progress=False)
    batches = ArrayBatches(train_data, 128)
    parallel.train(rule, model, batches, steps, key=key, evaluate=evaluate, options=options)
    return curve


# %%
steps, every = (40, 20) if FAST else (600, 30)
curves = {name: learn(rule, model, steps, every) for name, (rule, model) in rules.items()}
print({name: round(curve[max(curve)], 3) for name, curve in curves.items()})

# %%
for name, curve in curves.items():
    plt.plot(list(curve), list(curve.values()), "o-", markersize=3, label=name)
plt.xlabel("steps")
plt.ylabel("test accuracy")
plt.ylim(0, 1.02)
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Nothing crosses a layer
# Which layer does each loss of counter-current learning change? Rows are losses from the input to
# the scores, columns the maps of the network; backpropagation would fill the last row.

# %%
from ffnlab.learning.counter_current.rule import local_losses, mirrored

pair = mlp, mirrored(mlp, jax.random.key(1))
x, y = jnp.asarray(train_data.x[:64]), jnp.asarray(train_data.y[:64])
rows = []
for i in range(len(mlp.maps) + 1):
    gradient = jax.jit(jax.grad(lambda both, i=i: local_losses(both[0], both[1], x, y)[0][i]))(pair)
    rows.append([float(jnp.linalg.norm(linear.weight.dense())) for linear in gradient[0].maps])
plt.imshow(np.array(rows) > 0, cmap="Blues")
plt.xlabel("map of the network")
plt.ylabel("loss of pair (last: cross-entropy)")
plt.show()

# %% [markdown]
# ## A rule of your own
# Nearest class mean: no loss, no gradient, integer counts. It trains, and could be checkpointed and
# put on a mesh, by the same trainer.

# %%
from typing import NamedTuple

from ffnlab.rule import Rule


class Means(NamedTuple):
    """Sum of the inputs of each class, and how many there were."""

    total: jax.Array
    count: jax.Array


@jax.jit
def step(state, batch):
    """Counts a batch."""
    x, y = batch
    state = Means(state.total.at[y].add(x), state.count.at[y].add(1))
    return state, {"seen": state.count.sum()}


def predict(state, x):
    """The nearer a class's mean, the higher its score."""
    means = state.total / jnp.maximum(state.count, 1)[:, None]
    return -jnp.sum((x[:, None] - means) ** 2, axis=-1)


# %%
nearest = Rule(
    "nearest mean",
    lambda model, key: Means(jnp.zeros((10, 64)), jnp.zeros(10, jnp.int32)),
    step,
    predict,
)
print("nearest mean:", learn(nearest, None, 11, 11))

# %% [markdown]
# ## A forward-forward rule of your own
# Here every layer learns alone and no error comes back at all. An image with its class written over
# its first pixels is to be liked, the same image with a wrong class not. What a layer likes is an
# output that points along a direction of its own, fixed at random; its loss knows nothing of the
# layers above ([2304.11042](https://arxiv.org/abs/2304.11042)). With black boxes between the maps,
# hardware for instance, that is `ffnlab.learning.physical_ff`.


# %%
class Alone(NamedTuple):
    """Maps, a direction and an optimizer's state for each, and a key for wrong classes."""

    maps: tuple
    directions: tuple
    memories: tuple
    key: jax.Array


def written(x, y):
    """Images with a class over their first ten pixels."""
    return x.at[:, :10].set(jax.nn.one_hot(y, 10) * x.max(1, keepdims=True))


def liked(z, direction):
    """The cosine between outputs and a layer's direction."""
    return z @ direction / (jnp.linalg.norm(z, axis=1) + 1e-6)


# %%
adam = optax.adam(1e-3)


def begin(model, key):
    """Directions of length 1, and an optimizer's state for each map."""
    keys = jax.random.split(key, len(model.maps))
    drawn = [jax.random.normal(k, (n,)) for k, n in zip(keys, model.sizes[1:], strict=True)]
    directions = tuple(p / jnp.linalg.norm(p) for p in drawn)
    return Alone(tuple(model.maps), directions, tuple(map(adam.init, model.maps)), key)


@jax.jit
def taught(linear, p, memory, right, wrong):
    """A map after a step of its own."""

    def loss(linear):
        z = jax.nn.elu(linear(jnp.stack([right, wrong])))
        return jax.nn.softplus(-4 * (liked(z[0], p) - liked(z[1], p))).mean()

    value, slope = jax.value_and_grad(loss)(linear)
    change, memory = adam.update(slope, memory)
    return optax.apply_updates(linear, change), memory, value


# %%
@jax.jit
def teach(state, batch):
    """Every layer takes a step on what the one below gives now."""
    (x, y), (key, draw) = batch, jax.random.split(state.key)
    others = (y + jax.random.randint(draw, y.shape, 1, 10)) % 10
    right, wrong = written(x, y), written(x, others)
    maps, memories, total = [], [], 0.0
    for linear, p, memory in zip(*state[:3], strict=True):
        linear, memory, loss = taught(linear, p, memory, right, wrong)
        right, wrong = jax.nn.elu(linear(right)), jax.nn.elu(linear(wrong))
        maps, memories, total = [*maps, linear], [*memories, memory], total + loss
    return Alone(tuple(maps), state.directions, tuple(memories), key), {"loss": total}


@jax.jit
def fit(state, x):
    """How well each class fits: the sum of what all layers like, with it written."""
    h, total = jax.vmap(lambda c: written(x, jnp.full(len(x), c)))(jnp.arange(10)), 0.0
    for linear, p in zip(state.maps, state.directions, strict=True):
        h = jax.nn.elu(linear(h))
        total += jax.vmap(liked, (0, None), 1)(h, p)
    return total


# %%
from ffnlab.learning import physical_ff

alone = Rule("forward-forward", begin, teach, fit)
for name, rule in {"yours": alone, "ffnlab's": physical_ff(adam, inner=1)}.items():
    print(name, learn(rule, mlp, steps, steps)[steps])
