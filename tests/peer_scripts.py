"""Runs the scripts beside the fixtures with torch, transformers or compressed-tensors.

FFNLAB_PARITY_PYTHON names an interpreter that has them; without it the running one has to.
"""

import importlib.util
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest


def runner(folder, package):
    """A function that runs a script of a folder with its arguments, in a process of its own.

    The test is skipped if there is no interpreter that has the package.
    """
    python = os.environ.get("FFNLAB_PARITY_PYTHON")
    if python is None and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: run `make parity`, or set FFNLAB_PARITY_PYTHON")

    def run(script, *arguments):
        command = [python or sys.executable, folder / script, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


def read(file):
    """The arrays of an npz file by name."""
    with np.load(file, allow_pickle=False) as saved:
        return dict(saved)


def ours(model, want):
    """Our logits of the padded tokens that a script gave."""
    mask = jnp.asarray(want["mask"])
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    tokens = jnp.asarray(want["tokens"], jnp.int32)
    return np.asarray(model(tokens, positions=positions, segments=mask.astype(jnp.int32)))


def difference(a, b, mask):
    """The largest difference at the tokens that are no padding."""
    return np.abs(a - b)[mask].max()
