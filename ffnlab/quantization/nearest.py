"""Round-to-nearest baselines: INT4, INT8 and FP8 weights without calibration or scaling.

What every quantization method has to beat. INT4 is FireQ's grid (absmax / 7, codes -8..7) with
float32 scales and nothing else of it; INT8 is absmax / 127; FP8 is e4m3 with absmax / 448 per
output channel. Each can round activations to e4m3 per token too.
"""

import functools
from typing import Any, Literal

import jax

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.models.stack import in_list
from ffnlab.quantization import fireq_core as core
from ffnlab.quantization.fireq_options import Scales
from ffnlab.quantization.targets import check_model, chosen, replace_weights
from ffnlab.transform import Transform
from ffnlab.tree import Predicate
from ffnlab.weights import Float8, Int4, Int8, Weight

__all__ = ["nearest", "to_int4"]

FORMATS = ("int4", "int8", "float8")


def nearest(
    *,
    format: Literal["int4", "int8", "float8"] = "int4",
    group: int | None = 128,
    activations: Literal["e4m3"] | None = None,
    select: Predicate | None = None,
) -> Transform[Any, tuple[()]]:
    """The transform that rounds weights to the nearest value of a format.

    Args:
      format: "int4", "int8" or "float8".
      group: rows that share a scale, even; None for whole columns. A matrix of fewer rows is one
        group. "float8" has one scale per column whatever the group.
      activations: round the input of the selected matrices to e4m3 per token, or not (None).
      select: which `Linear`s and `Conv`s to quantize. By default those inside blocks, so that
        embeddings and heads are left alone; all of a model that has no blocks.
    Returns:
      a Transform that observes nothing; its rewrite raises SelectionError where nothing is
      selected and NumericalError where a selected matrix holds NaN or infinity.
    Raises:
      ConfigError: unknown format, group out of range.

    >>> nearest(format="int8").name
    'nearest-int8'
    """
    if format not in FORMATS:
        raise ConfigError(f"format={format!r}; accepted: {', '.join(map(repr, FORMATS))}")
    if group is not None and (group < 2 or group % 2):
        raise ConfigError(f"group={group}; it takes an even number >= 2, or None")
    quantize = {
        "int4": functools.partial(
            to_int4, group=group, scales="float32", tensor_scale=False, act=activations
        ),
        "int8": functools.partial(to_int8, group=group, act=activations),
        "float8": functools.partial(to_float8, act=activations),
    }[format]

    def init(model: Any) -> tuple[()]:
        check_model(model)
        in_list(model, selected)
        return ()

    def selected(model: Any) -> Any:
        tree.select(model, chosen(select, model))
        return model

    def rewrite(model: Any, stats: tuple[()]) -> Any:
        return replace_weights(model, select, quantize)

    return Transform(name=f"nearest-{format}", init=init, observe=None, rewrite=rewrite)


@functools.partial(jax.jit, static_argnames=("group", "scales", "tensor_scale", "act"))
def to_int4(
    weight: Weight,
    *,
    group: int | None = 128,
    scales: Scales = "e4m3",
    tensor_scale: bool = True,
    act: Literal["e4m3"] | None = None,
) -> Int4:
    """A weight [in, out] rounded by `fireq_core.quantize`.

    Args:
      weight: any weight; read through `dense()`.
      group: rows that share a scale, even; None, or more than there are, for whole columns.
      scales: "e4m3", "bfloat16" or "float32".
      tensor_scale: search the per-tensor scale.
      act: see `Int4`.
    """
    rows = weight.shape[0]
    column = rows + rows % 2
    group = column if group is None else min(group, column)
    codes, s, divisor = core.quantize(
        weight.dense(), group=group, scales=scales, tensor_scale=tensor_scale
    )
    return Int4.from_codes(codes, s, group=group, divisor=divisor, act=act)


@functools.partial(jax.jit, static_argnames=("group", "act"))
def to_int8(weight: Weight, *, group: int | None, act: Literal["e4m3"] | None) -> Int8:
    """A weight rounded by `Int8.quantize`."""
    return Int8.quantize(weight.dense(), group=group, act=act)


@functools.partial(jax.jit, static_argnames=("act",))
def to_float8(weight: Weight, *, act: Literal["e4m3"] | None) -> Float8:
    """A weight rounded by `Float8.quantize`."""
    return Float8.quantize(weight.dense(), act=act)
