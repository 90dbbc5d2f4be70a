"""Step 2 of PMET: what the edited layers do on other text, their keys, and the deltas.

Keys are the inputs of a down-projection at the last token of a subject; residuals are what is
missing there from the target of step 1, at the output of the last edited layer. Both are taken anew
after each layer, as every change moves them. The solve is on the host, in float64 (`pmet_core`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ffnlab import tree
from ffnlab.editing import pmet_core as core
from ffnlab.editing.deltas import originals, with_deltas
from ffnlab.editing.requests import Requests
from ffnlab.editing.vectors import Inputs, listed
from ffnlab.models.calibration import Given
from ffnlab.models.decoder import Decoder
from ffnlab.models.stack import unstack
from ffnlab.tree import Captured

__all__ = ["in_chunks", "keys_and_outputs", "moments_of", "moved", "written"]

T = TypeVar("T", bound=PyTree)


@functools.partial(jax.jit, static_argnames="paths")
def moments_of(
    model: Decoder, batch: Given, paths: tuple[str, ...]
) -> tuple[dict[str, Float[Array, "h h"]], Int[Array, ""]]:
    """The mean of k k^T over the tokens of a batch for each path, and how many there are."""
    model = listed(model)
    wanted = tree.where(lambda path, _: path in paths)
    _, seen = tree.capture(model, wanted, *batch.args, **cast("dict[str, Any]", batch.options))
    seen = cast("dict[str, Captured]", seen)
    rows = batch.first.shape[:2]
    valid = jnp.ones(rows, bool) if batch.valid is None else jnp.asarray(batch.valid)
    count = valid.sum()
    found = {}
    for path in paths:
        k = jnp.where(valid[..., None], seen[path].input[0].astype(jnp.float32), 0.0)
        k = k.reshape(-1, k.shape[-1])
        found[path] = k.T @ k / jnp.maximum(count, 1)
    return found, count


@jax.jit
def moved(
    mean: Float[Array | np.ndarray, "h h"],
    fresh: Float[Array, "h h"],
    part: Float[Array | np.generic, ""],
) -> Float[Array, "h h"]:
    """A mean with the mean of more in it, which is `part` of all."""
    return jnp.add(mean, jnp.asarray(part) * (fresh - mean))


def in_chunks(call: Callable[[Requests], T], rows: Requests, chunk: int | None) -> T:
    """What a function of rows of facts gives for all of them, so many facts at a time.

    The last are filled up with the last fact, so that all calls have one shape.
    """
    n = len(rows.tokens)
    chunk = n if chunk is None else min(chunk, n)
    found = []
    for first in range(0, n, chunk):
        at = np.minimum(np.arange(first, first + chunk), n - 1)
        kept = min(chunk, n - first)
        part = call(Requests(*(x[at] for x in rows)))
        found.append(jax.tree.map(lambda leaf, kept=kept: np.asarray(leaf)[:kept], part))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)


def written(
    model: Decoder,
    rows: Requests,
    targets: Float[np.ndarray, "n d"],
    moments: Mapping[str, Float[Array | np.ndarray, "h h"]],
    spread: core.Spread,
    preserve: float,
    chunk: int | None,
) -> dict[str, Float[np.ndarray, "h d"]]:
    """Step 2: the deltas of the layers in order, each computed on the model with those before.

    Args:
      model: that is edited, in either form.
      rows: of the facts.
      targets: z, what the last of the layers is to give at each subject.
      moments: C of each down-projection, by its path; the layers in order.
      spread, preserve, chunk: see `ffnlab.editing.pmet.pmet`.
    """
    paths = tuple(moments)
    model, deltas = unstack(model), {}
    # All that will be dense is from the beginning, so that one program serves every layer.
    shapes = {path: node.weight.shape for path, node in originals(model, paths).items()}
    model = with_deltas(
        model, {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    )
    for i, path in enumerate(paths):
        take = functools.partial(keys_and_outputs, model, paths=paths)
        keys, outputs = in_chunks(take, rows, chunk)
        residuals = core.share(len(paths) - i, spread) * (targets.astype(np.float64) - outputs)
        delta = core.update(keys[path], residuals, np.asarray(moments[path]), preserve=preserve)
        deltas[path] = delta.astype(np.float32)
        model = with_deltas(model, {path: deltas[path]})
    return deltas


@functools.partial(jax.jit, static_argnames="paths")
def keys_and_outputs(
    model: Decoder, rows: Requests, paths: tuple[str, ...]
) -> tuple[dict[str, Float[Array, "f h"]], Float[Array, "f d"]]:
    """Keys of every path, and what the last one gives behind the plain prompt.

    A key is the mean of that of the plain prompt and the mean over prompts behind prefixes.
    """
    f, r = rows.place.shape
    inputs, place = Inputs.rows(rows)
    seen = inputs.captured(listed(model), paths)
    at = lambda x: cast("Array", x)[jnp.arange(f * r), place].reshape(f, r, -1).astype(jnp.float32)  # noqa: E731
    keys = {}
    for path in paths:
        each = at(seen[path].input[0])[:, :-1]
        behind = each[:, 1:].mean(1) if r > 2 else each[:, 0]
        keys[path] = (each[:, 0] + behind) / 2
    return keys, at(seen[paths[-1]].output)[:, 0]
