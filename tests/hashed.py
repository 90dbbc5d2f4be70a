"""Weights that any program can make again: an integer hash of a parameter's name and index.

A fixture of a large network then holds its outputs alone. Values are made for the names, shapes and
order of the official code; ours are what becomes of them at the border. NumPy only.
"""

import math

import numpy as np


def mixed(x):
    """A bijection of uint32 that looks random (the finalizer of MurmurHash3)."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> np.uint32(13))
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def seed_of(name):
    """FNV-1a of a name, 32 bits."""
    found = 0x811C9DC5
    for byte in name.encode():
        found = ((found ^ byte) * 0x01000193) % 2**32
    return np.uint32(found)


def uniform(name, shape):
    """Numbers in [-1, 1), exact in float32, in the order of the flat array."""
    index = np.arange(math.prod(shape), dtype=np.uint32)
    with np.errstate(over="ignore"):
        bits = mixed(mixed(index + seed_of(name)) ^ seed_of(name))
    return ((bits >> np.uint32(8)).astype(np.float32) / np.float32(2**23) - 1).reshape(shape)


def hashed(name, shape, scale=1.0):
    """Numbers in [-scale, scale)."""
    return uniform(name, shape) * np.float32(scale)


def parameter(name, shape):
    """A parameter of a plausible size: kernels and matrices [out, ...] keep the scale of what they
    are given, gains are near 3/4, variances positive, the rest small."""
    u = uniform(name, shape)
    if name.endswith("running_var"):
        return 1 + u / 2
    if len(shape) >= 2 and "pos" not in name:
        return u * np.float32(math.sqrt(3 / math.prod(shape[1:])))
    is_gain = name.endswith("weight")
    return (3 + u) / 4 if is_gain else u / 4
