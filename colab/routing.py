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
# # Tokens that choose their FFN
#
# In a dense model every token takes the same feed-forward networks. Here a trained model is turned
# into one in which tokens choose: a mixture of experts, and a small FFN beside each big one. You
# see who chose what, what the best choice could gain, train a router, save and generate.

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

from ffnlab import models, parallel, routing, transform
from ffnlab.data import TextBatches, stdlib_text

FAST = bool(os.environ.get("FFNLAB_FAST"))  # a quick pass over the notebook, for tests
print("jax", jax.__version__, "on", jax.devices()[0])

# %% [markdown]
# ## A model and text
# A byte model that comes with the package, and modules of Python's standard library that it never
# saw.

# %%
model, tokenizer = models.embedded("embedded_small")
text = stdlib_text()
rows = 2 if FAST else 16
held_out = jnp.asarray(TextBatches(text.held_out, rows, 64)(0))
print(model.config.layers, "layers, width", model.config.width, "hidden", model.config.hidden)

# %% [markdown]
# ## A mixture of experts
# `upcycle` copies each FFN into experts with a router between them. The weights of a token's
# experts sum to 1, so the mixture computes what the dense model did; training takes it from there.

# %%
mixture, _ = transform.apply(routing.upcycle(experts=4, k=2), model)
difference = jnp.abs(mixture(held_out[:, :-1]) - model(held_out[:, :-1])).max()
print("largest difference of a logit:", float(difference))

# %% [markdown]
# What layers report of a run is a `Routing`. Its map shows the share of each expert, layer by
# layer, here for letters and for all other bytes.

# %%
_, outputs = mixture.run(held_out[:, :-1])
letters = np.isin(np.asarray(held_out[:, :-1]), np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", "u1"))
chosen = routing.maps(
    outputs.reports["ffn"], jnp.asarray(letters.astype(int)), names=["others", "letters"]
)
chosen.draw(plt.figure())
plt.show()

# %% [markdown]
# ## Big or small
# Duo-LLM ([2410.10846](https://arxiv.org/abs/2410.10846)) puts a small FFN beside each big one.
# Both are trained with a choice drawn for every token and layer, so that any pattern works. Only
# the last layers get a choice here, to keep the oracle short.

# %%
from ffnlab import tree
from ffnlab.learning import backprop

n = model.config.layers
last = tree.at(f"layers[{n - 1}].ffn")
for i in range(n - (2 if FAST else 5), n - 1):
    last = last | tree.at(f"layers[{i}].ffn")
duo, _ = transform.apply(routing.duo(ratio=16, where=last), model)


def learn(rule, start, steps, length=64):
    """The model after some steps on the training text."""
    batches = TextBatches(text.train, 2 if FAST else 16, length)
    options = parallel.LoopOptions(log_every=0, progress=False)
    outcome = parallel.train(
        rule, start, batches, steps, key=jax.random.key(0), options=options, together=5
    )
    return rule.model(outcome.state)


# %%
stage_1 = backprop(routing.random_choices(), optax.adam(1e-3), informed=True)
duo = learn(stage_1, duo, 5 if FAST else 300)

# %% [markdown]
# ## What choosing could gain
# The oracle tries every pattern of choices on text it may look at, and keeps the best of each
# token. It reads the answers: it says what is there to gain, and is no model.

# %%
report = routing.oracle()(duo, [held_out], progress=False)
print(report)
report.draw(plt.figure())
plt.show()

# %% [markdown]
# ## A router
# What can be had without the answers: routers, trained to take the big FFN for half of the tokens
# and layers. Everything else stays as it is.

# %%
routed, _ = transform.apply(routing.with_routers(), duo)
steps = 5 if FAST else 200
loss = routing.budgeted(0.5, steps=steps)
stage_3 = backprop(loss, optax.adam(1e-2), trainable=routing.ROUTERS, informed=True)
routed = learn(stage_3, routed, steps)

# %%
_, outputs = routed.run(held_out[:, :-1])
chosen = routing.maps(
    outputs.reports["ffn"],
    jnp.asarray(letters.astype(int)),
    names=["others", "letters"],
    experts=["big", "small"],
)
chosen.draw(plt.figure())
plt.show()

# %% [markdown]
# ## Further
# A routed model is saved, opened, quantized and generated from like any other. One token by itself
# runs only the FFN that it chose.

# %%
models.save(routed, "routed", format="ffnlab")
again = models.load("routed")
prompt = tokenizer.encode("def main(")
new = models.generate(again, [prompt], max_tokens=4 if FAST else 60)
print(tokenizer.decode(prompt + new.lists()[0]))
