"""The trunk of a model: its blocks one after the other, from a list or from a stack.

What the blocks share is one `Context`, what differs is `LayerInputs` with a leading axis of layers,
and what they report comes back as `LayerOutputs` with the same axis, equal for both forms.
"""

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ffnlab.errors import ConfigError
from ffnlab.layers import Attention, Block, EnsembleScale
from ffnlab.layers.attention.rope import Rope, tables
from ffnlab.layers.attention.spec import AttentionSpec
from ffnlab.layers.context import Angles, Context, LayerInputs, LayerOutputs
from ffnlab.layers.logical import Names, constrain
from ffnlab.layers.stacking import rematerialized, run_stack
from ffnlab.models.paths import Streams, added_up, sizes_of
from ffnlab.models.pipeline import run_stages
from ffnlab.models.stack import Pipelined, Shared, Stacked, period_of

__all__ = [
    "angles",
    "check_cache",
    "check_given",
    "compute_dtype",
    "rows",
    "run",
    "self_attentions",
    "specs",
    "spread",
]

T = TypeVar("T")
Layers = Sequence[nnx.Module] | Stacked | Pipelined | Shared


def run(
    layers: Layers,
    h: Float[Array, "b t d"],
    context: Context,
    *,
    inputs: LayerInputs | None = None,
    caches: tuple | None = None,
    remat: str | None = None,
    branches: bool = False,
    ensemble: EnsembleScale | None = None,
) -> tuple[Float[Array, "b t d"], tuple | None, LayerOutputs]:
    """Runs all blocks.

    Args:
      layers: `nnx.List` of n `Block`s, the same `Stacked` or `Pipelined`, or `Shared`.
      inputs: of all layers, every leaf [n, ...].
      caches: one cache per block; of a stack, one per block of its period, with a leading axis.
      remat: what blocks keep for a backward pass (`ffnlab.layers.stacking.rematerialized`), or the
        stages of a pipeline in each tick; one with a cache is not differentiated.
      branches: also return what each sublayer added.
      ensemble: weights of the paths in what is returned; layers read the stream without them.
    Returns:
      (h, or the ensemble in its place, caches, outputs), every leaf of the outputs with a leading
      axis of layers.
    Raises:
      ConfigError: inputs of another number of layers, or reports or branches of different shapes;
        a pipeline with caches, or whose microbatches do not divide the rows; an ensemble of other
        paths, or of layers that have none (`ffnlab.models.paths.sizes_of`).
    """
    period = period_of(layers)
    repeats = layers.repeats if isinstance(layers, Stacked | Pipelined) else 1
    inputs = LayerInputs() if inputs is None else inputs
    check_inputs(inputs, period, repeats)

    streams, weights = _begun(layers, h, ensemble)

    def call(
        blocks: Sequence[Block], streams: Streams, xs: tuple, context: Context = context
    ) -> tuple[Streams, tuple]:
        given, kept = xs
        new, outputs = [], []
        for i, block in enumerate(blocks):
            own = jax.tree.map(lambda x, i=i: x[i], given)
            cache = None if kept is None else kept[i]
            streams, cache, output = _run_block(
                block, remat, streams, context, own, cache, branches
            )
            new.append(cache)
            outputs.append(output)
        return streams, (None if kept is None else tuple(new), outputs)

    if isinstance(layers, Pipelined):
        check_cache(layers, caches)
        remat, per_tick = None, remat

        def stage(rows: Context, blocks: Sequence[Block], h: Array, xs: tuple) -> tuple:
            streams, rest = call(blocks, (h, None), ((xs[0], None), xs[1]), rows)
            return streams[0], rest

        of_rows = lambda rows: functools.partial(stage, rows)  # noqa: E731
        h, outputs = run_stages(layers, of_rows, h, context, inputs, per_tick)
        return h, None, gathered(outputs)
    given = (inputs, weights)
    if not isinstance(layers, Stacked):
        streams, (new, outputs) = call(period, streams, (given, caches))
        outputs = [jax.tree.map(lambda x: x[None], output) for output in outputs]
        return _read(streams), new, gathered(outputs)
    given = jax.tree.map(lambda x: x.reshape(repeats, len(period), *x.shape[1:]), given)
    streams, (new, outputs) = run_stack(
        layers.period, streams, call, xs=(given, caches), length=repeats
    )
    return _read(streams), new, gathered(outputs)


def _begun(
    layers: Layers, h: Float[Array, "b t d"], ensemble: EnsembleScale | None
) -> tuple[Streams, Float[Array, "n s *d"] | None]:
    """(both streams before the first block, weights of all branches)."""
    if ensemble is None:
        return (h, None), None
    first, weights = ensemble.weights(*sizes_of(layers))
    return (h, first.astype(h.dtype) * h), weights


def _read(streams: Streams) -> Float[Array, "b t d"]:
    """What the last norm reads."""
    h, ensemble = streams
    return h if ensemble is None else ensemble


def _run_block(
    block: Block,
    remat: str | None,
    streams: Streams,
    context: Context,
    given: tuple[LayerInputs, Array | None],
    cache: Any,
    branches: bool,
) -> tuple:
    if cache is not None:
        return added_up(block, streams, context, given, cache, branches)

    # The context is no argument: keys of its masks (None beside numbers) cannot be sorted.
    def call(block: Block, streams: Streams, given: tuple) -> tuple:
        return added_up(block, streams, context, given, None, branches)

    return rematerialized(call, remat)(block, streams, given)


def check_cache(layers: Layers, caches: object) -> None:
    """Raises ConfigError where a pipeline is asked to generate with a cache."""
    if isinstance(layers, Pipelined) and caches is not None:
        raise ConfigError(
            "a pipelined model has no cache to generate with; models.unpipeline(model) has"
        )


def rows(layers: Layers) -> Names:
    """By what the rows of a batch are cut before and after the layers."""
    return layers.schedule.rows if isinstance(layers, Pipelined) else "batch"


def spread(layers: Layers, tokens: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Tokens, cut as a pipeline takes rows: they are less to move than what stands for them.

    Those of other layers stay as they came.
    """
    return constrain(tokens, (rows(layers), None)) if isinstance(layers, Pipelined) else tokens


def check_inputs(inputs: LayerInputs, period: Sequence[Block], repeats: int) -> None:
    """Raises ConfigError unless every leaf has as many layers as the model, gates all slots."""
    n = repeats * len(period)
    for name, value in inputs._asdict().items():
        if value is not None and (value.ndim < 1 or value.shape[0] != n):
            raise ConfigError(f"inputs.{name} has shape {value.shape}; the model has {n} layers")
    if inputs.gates is not None:
        wanted = {len(block.slots) for block in period}
        if len(wanted) != 1 or inputs.gates.shape != (n, *wanted):
            raise ConfigError(
                f"inputs.gates has shape {inputs.gates.shape}; the {n} layers have "
                f"{sorted(wanted)} sublayers each"
            )


def gathered(outputs: Sequence[LayerOutputs]) -> LayerOutputs:
    """Outputs of the blocks of a period, each with a leading axis r, in the order of the layers.

    Raises:
      ConfigError: what is to be put on one axis has different shapes.
    """
    names = sorted({name for output in outputs for name in output.reports})
    reports = {}
    for name in names:
        parts = [output.reports[name] for output in outputs if name in output.reports]
        reports[name] = _interleaved(parts, f"reports of {name!r}")
    branches = [output.branches for output in outputs]
    if any(b is None for b in branches):
        return LayerOutputs(reports)
    return LayerOutputs(reports, _interleaved(branches, "branches"))


def _interleaved(parts: Sequence[T], what: str) -> T:
    """[r, ...] of each of w parts as [r * w, ...], part by part within each of the r."""
    kinds = {
        (jax.tree.structure(part), *(leaf.shape for leaf in jax.tree.leaves(part)))
        for part in parts
    }
    if len(kinds) > 1:
        raise ConfigError(f"{what} differ in shape from layer to layer: they cannot be stacked")
    return jax.tree.map(lambda *xs: jnp.stack(xs, 1).reshape(-1, *xs[0].shape[1:]), *parts)


def self_attentions(block: nnx.Module) -> list[Attention]:
    """The attention sublayers of a block that read their own input."""
    found = [getattr(block, name) for name in getattr(block, "slots", ())]
    return [part for part in found if isinstance(part, Attention) and not part.spec.memory]


def specs(layers: Layers) -> list[AttentionSpec]:
    """What kinds of self-attention a trunk has, each once, in order."""
    found = [attn.spec for block in period_of(layers) for attn in self_attentions(block)]
    return list(dict.fromkeys(found))


def check_given(tokens: Array | None, embeddings: Array | None, width: int) -> None:
    """Raises ConfigError unless a model is given either tokens or [b, t, width] in their place."""
    if (tokens is None) == (embeddings is None):
        both = "both" if tokens is not None else "neither"
        raise ConfigError(f"one of tokens and embeddings is accepted, not {both}")
    if embeddings is not None and (embeddings.ndim != 3 or embeddings.shape[2] != width):
        raise ConfigError(f"embeddings has shape {embeddings.shape}; [b, t, {width}] is accepted")


def compute_dtype(stored: DTypeLike) -> jnp.dtype:
    """Dtype of activations: float32 on a CPU (bf16 is slow there), else the parameters'."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else stored)


def angles(layers: Layers, positions: Int[Array, "b t"]) -> dict[Rope, Angles]:
    """The rotations of a trunk's attention at some positions, by kind of rotary embedding."""
    ropes = dict.fromkeys((spec.rope, spec.head_dim) for spec in specs(layers))
    return {rope: tables(rope, dim, positions) for rope, dim in ropes if rope is not None}
