"""Layers in the stages of a pipeline, between which devices are cut, and back, bit for bit.

`pipeline` puts the layers of a model on axes of stages, repeats and periods; the model is called as
before, and its trunk sends the batch through the stages in microbatches
(`ffnlab.layers.pipelining`). Embedding and head stay as they are, with the rows of the batch cut
between the stages' devices too.

What differs from a list: rows are drawn for by microbatch, with the key of a layer or of the tokens
folded by its number, and what a layer computes over the rows of a batch (the capacity of experts
whose queue is the batch) it computes over those of a microbatch.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from ffnlab.errors import ConfigError
from ffnlab.layers.context import Context, LayerInputs, LayerOutputs
from ffnlab.layers.logical import constrain_named
from ffnlab.layers.pipelining import Schedule, circulate
from ffnlab.layers.stacking import run_stack, with_axes
from ffnlab.models.stack import Pipelined, as_stages, stacked_period, unstack, with_layers

__all__ = ["pipeline", "run_stages", "unpipeline"]

M = TypeVar("M", bound=nnx.Module)
# (blocks of a period, h, (inputs, caches)) -> (h, (caches, outputs of each block))
Period = Callable[[Sequence[nnx.Module], Array, tuple], tuple[Array, tuple]]


def pipeline(model: M, *, stages: int, microbatches: int, repeats: int = 1) -> M:
    """The same model with its layers in stages that work at the same time.

    On a mesh with an axis "pp" (`ffnlab.layers.logical.LAYOUT`) each device holds and runs its
    stages alone: (R M + S - 1) / (R M S) of the blocks' work, where S divides M.

    Args:
      model: a Decoder or an Encoder, with its layers in a list, stacked, or in another pipeline.
      stages: S, parts that work at the same time; a multiple of the devices along "pp".
      microbatches: M, equal parts of a batch that go through the stages one after the other. The
        rows of every batch must be a multiple; a multiple of S leaves no place empty.
      repeats: R, how often each microbatch goes through all stages, each time through other layers:
        fewer layers in a stage, and a smaller bubble.
    Raises:
      ConfigError: another model, layers that are unlike or that S x R does not divide, a number
        below 1.
    Warns:
      UserWarning: fewer microbatches than stages, with the share of time that is lost.

    >>> from ffnlab.testing import tiny
    >>> model = pipeline(tiny(), stages=3, microbatches=3)
    >>> model.layers.period[0].ffn.up.weight.w.shape, model.layers.schedule.bubble
    ((3, 1, 1, 16, 32), 0.4)
    """
    if not getattr(model, "pipelines", False):
        raise ConfigError(
            f"model is a {type(model).__name__}; a Decoder or an Encoder can be pipelined"
        )
    schedule = Schedule(stages, microbatches, repeats)
    layers = list(unstack(model).layers)  # type: ignore[attr-defined]
    period = stacked_period(layers)
    groups, rest = divmod(len(layers), len(period) * stages * repeats)
    if rest or not groups:
        alike = "" if len(period) == 1 else f", which are alike only {len(period)} by {len(period)}"
        raise ConfigError(
            f"stages={stages} x repeats={repeats} do not divide the {len(layers)} layers{alike}"
        )
    if microbatches < stages:
        warnings.warn(
            f"microbatches={microbatches} are fewer than stages={stages}: a bubble of "
            f"{schedule.bubble:.0%}, in which stages have nothing to do",
            stacklevel=2,
        )
    cut = [as_stages(module, schedule, groups) for module in period]
    return with_layers(model, Pipelined(cut, schedule, groups))


def unpipeline(model: M) -> M:
    """The same model with its layers in a list; `ffnlab.models.stack` goes on from there.

    Raises:
      ConfigError: it is not pipelined.
    """
    if not isinstance(getattr(model, "layers", None), Pipelined):
        raise ConfigError(
            f"model is a {type(model).__name__} that is not pipelined; models.pipeline(model, "
            "stages=…, microbatches=…) makes it so"
        )
    return unstack(model)


def run_stages(
    layers: Pipelined,
    call: Callable[[Context], Period],
    h: Float[Array, "b t d"],
    context: Context,
    inputs: LayerInputs,
    remat: str | None,
) -> tuple[Float[Array, "b t d"], list[LayerOutputs]]:
    """Runs all blocks of a pipeline.

    Args:
      layers: the blocks.
      call: what runs one period of them, given the context of the rows that go through it.
      context: of all rows, without a cache.
      inputs: of all layers, every leaf [n, ...].
      remat: what a stage keeps of a tick (`ffnlab.layers.stacking.rematerialized`).
    Returns:
      (h, outputs of each block of a period, leaves with a leading axis of its repeats).
    Raises:
      ConfigError: as `circulate`, or a report that is not of rows.
    """
    schedule, rows = layers.schedule, len(h)
    split = _Split(context, rows)
    by_number = schedule.by_number(rows)
    weights = with_axes(constrain_named(layers.period), lambda axes: axes[2:])

    def stage(given: tuple, number: Array, h: Array, travelling: list[Array]) -> tuple:
        period, inputs = given
        folded = functools.partial(_folded, number, schedule.microbatches)
        own = inputs._replace(
            key=None if inputs.key is None else jax.vmap(jax.vmap(folded))(inputs.key),
            choice=None
            if inputs.choice is None
            else jnp.take(inputs.choice, number, axis=2, mode="clip"),
        )
        run = call(split.context(travelling, folded))
        h, (_, outputs) = run_stack(period, h, run, xs=(own, None), length=layers.periods)
        return h, outputs

    if inputs.choice is not None:
        inputs = inputs._replace(choice=inputs.choice[:, by_number])
    shape = (schedule.repeats, schedule.stages, layers.periods, len(layers.period))
    given = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(*shape, *x.shape[1:]), 0, 1), inputs)
    h, outputs = circulate(schedule, stage, (weights, given), h, split.rows, remat=remat)
    order = np.argsort(by_number.reshape(-1))
    return h, [_of_rows(output, order, by_number.shape) for output in outputs]


class _Split:
    """A context as arrays that go along with the rows they belong to, and the rest."""

    def __init__(self, context: Context, rows: int):
        tokens = context.tokens
        parts = (
            tuple(context.angles.values()),
            tuple(context.masks.values()),
            None if tokens is None else tokens._replace(key=None, order=None),
            context.bias,
            context.memory,
        )
        self._context = context
        leaves, self._treedef = jax.tree.flatten(parts)
        self._leaves = leaves
        self._travels = [leaf.shape[0] == rows for leaf in leaves]
        self.rows = [x for x, goes in zip(leaves, self._travels, strict=True) if goes]

    def context(self, rows: list[Array], folded: Callable[[Array], Array]) -> Context:
        """The context of some rows, given what goes along with them."""
        left, whole = iter(rows), self._context
        leaves = [
            next(left) if goes else leaf
            for leaf, goes in zip(self._leaves, self._travels, strict=True)
        ]
        angles, masks, tokens, bias, memory = self._treedef.unflatten(leaves)
        if tokens is not None:
            facts = whole.tokens
            # An order of all rows is none of some; each module then sorts for itself.
            order = None if jax.tree.leaves(facts.order) else facts.order
            key = None if facts.key is None else folded(facts.key)
            tokens = tokens._replace(key=key, order=order)
        return Context(
            dict(zip(whole.angles, angles, strict=True)),
            dict(zip(whole.masks, masks, strict=True)),
            None,
            tokens,
            bias,
            memory,
        )


def _folded(number: Int[Array, ""], microbatches: int, key: Array) -> Array:
    """The key of a microbatch; of one alone, that of the batch."""
    return key if microbatches == 1 else jax.random.fold_in(key, number)


def _of_rows(output: LayerOutputs, order: np.ndarray, sizes: tuple[int, ...]) -> LayerOutputs:
    """Outputs [R, S, M, n, ...] as [R S n, ...] of all rows, in their order in the batch.

    Raises:
      ConfigError: a report whose arrays do not begin with the rows of a microbatch.
    """

    def joined(x: Array, at: int) -> Array:
        x = jnp.moveaxis(x, (2, 4 + at), (3, 4))  # [R, S, n, M, rows, ...]
        whole = x.reshape(-1, len(order), *x.shape[5:])[:, order]
        return jnp.moveaxis(whole, 1, 1 + at)

    def of_report(name: str, x: Array) -> Array:
        if x.ndim < 5 or x.shape[4] != sizes[1]:
            raise ConfigError(
                f"reports of {name!r} hold an array {x.shape[4:]} of a microbatch of {sizes[1]} "
                "rows: only what is told of each row can be told of a batch; "
                "models.unpipeline(model) reports it"
            )
        return joined(x, 0)

    reports: dict[str, PyTree[Any]] = {
        name: jax.tree.map(functools.partial(of_report, name), report)
        for name, report in output.reports.items()
    }
    return LayerOutputs(reports, None if output.branches is None else joined(output.branches, 1))
