"""Models with channels switched off by hand, layer by layer: what `narrow` has to equal.

Written without the index maps of `ffnlab.models.groups`: activations are multiplied by masks where
a model computes them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ffnlab import tree
from ffnlab.layers import MLP
from ffnlab.models import ConvNet, ResNet
from ffnlab.weights import Dense


@functools.cache
def masking(kind, before):
    """A subclass whose calls multiply their input, or their output, by a mask."""

    def call(self, x, *rest):
        if before:
            return kind.__call__(self, x * self.off_before.get_value(), *rest)
        return kind.__call__(self, x) * self.off_after.get_value()

    return type(f"Off{kind.__name__}", (kind,), {"__call__": call})


def switched(module, mask, *, before=False):
    """The module with a mask on what it gives, or on what it is given."""
    new = tree.copy(module)
    new.__class__ = masking(type(module), before)
    off = nnx.Param(jnp.asarray(mask, jnp.float32))
    setattr(new, "off_before" if before else "off_after", off)
    return new


def mask(size, kept):
    """1 for what is kept."""
    return np.isin(np.arange(size), list(kept)).astype(np.float32)


def switched_off(model, keep):
    """A model of the same sizes in which only the units of `keep` give something."""
    new = jax.tree.map(lambda leaf: leaf, model)
    for name, kept in keep.items():
        if isinstance(model, MLP):
            i = int(name[5:-1]) + 1
            new.maps[i] = switched(new.maps[i], mask(model.sizes[i], kept), before=True)
        elif isinstance(model, ConvNet):
            i = int(name[6:-1])
            new.convs[i] = switched(new.convs[i], mask(model.sizes[i + 1], kept))
        elif isinstance(model, ResNet):
            in_resnet(new, name, kept)
        elif name == "embed":
            in_stream(new, kept)
        else:
            in_block(new, name, kept)
    return new


def norm_off(layer, kept):
    """A masked norm behind a convolution."""
    layer.norm = switched(layer.norm, mask(layer.conv.weight.shape[1], kept))


def in_resnet(model, name, kept):
    """Inside a block its norm is masked; a sum after the stem and after each block of its stage."""
    number, _, place = name.removeprefix("residuals[").partition("].")
    if place in ("reduce", "spatial"):
        block = model.residuals[int(number)]
        layer = getattr(block, place)
        norm_off(layer if hasattr(layer, "norm") else layer.conv, kept)
        if place == "reduce" and block.spatial.op == "depthwise":
            norm_off(block.spatial.conv, kept)
        return
    first = -1
    if name == "stem":
        norm_off(model.stem, kept)
    else:
        first = int(number)
        block = model.residuals[first]
        size = block.expand.conv.weight.shape[1]
        model.residuals[first] = switched(block, mask(size, kept))
    size = (model.stem if first < 0 else model.residuals[first].expand).conv.weight.shape[1]
    for i in range(first + 1, len(model.residuals)):
        block = model.residuals[i]
        if block.shortcut is not None or block.expand.conv.weight.shape[1] != size:
            return
        model.residuals[i] = switched(block, mask(size, kept))


def in_block(model, name, kept):
    """What goes into the last map of a sublayer is masked."""
    number, _, slot = name.removeprefix("layers[").partition("].")
    sublayer = getattr(model.layers[int(number)], slot)
    if hasattr(sublayer, "spec"):
        spec = sublayer.spec
        each = spec.heads // spec.kv_heads * spec.head_dim
        off = np.repeat(mask(spec.kv_heads, kept), each)
        sublayer.o = switched(sublayer.o, off, before=True)
    else:
        off = mask(sublayer.down.weight.shape[0], kept)
        sublayer.down = switched(sublayer.down, off, before=True)


def in_stream(model, kept):
    """What enters the stream is masked: embeddings and what each sublayer adds."""
    off = mask(model.config.width, kept)
    model.embed.w = nnx.Param(Dense(model.embed.weight.dense() * off))
    for block in model.layers:
        for parent, name in ((block.attn, "o"), (block.ffn, "down")):
            setattr(parent, name, switched(getattr(parent, name), off))
