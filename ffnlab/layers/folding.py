"""Batch norms folded into the linear map or the convolution beside them, exactly."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from ffnlab.layers.batch_norm import BatchNorm, FixedAffine
from ffnlab.layers.conv import Conv
from ffnlab.layers.linear import Linear
from ffnlab.weights import Dense

__all__ = ["fold"]

Affine = BatchNorm | FixedAffine


def fold(first: Affine | Linear | Conv, second: Affine | Linear | Conv) -> Linear | Conv:
    """One map that does what a norm and a map do, one after the other.

        fold(map, norm)(x) = norm(map(x)),   fold(norm, map)(x) = map(norm(x))

    The norm is what a call of it is: its running statistics. The sums are made in float32 and
    rounded to the dtype of the map's weight.

    Args:
      first, second: a `BatchNorm` or `FixedAffine` and a `Linear` or `Conv`, as they are applied.
    Returns:
      the map with a weight and a bias of its own.
    Raises:
      TypeError: other layers.
      ValueError: a weight that is not a plain dense matrix, other numbers of channels, or a norm
        before a convolution that pads: the zeros that it adds are not normalized.
    """
    if isinstance(first, Linear | Conv) and isinstance(second, Affine):
        return norm_after(first, second)
    if isinstance(first, Affine) and isinstance(second, Linear | Conv):
        return norm_before(first, second)
    raise TypeError(
        f"fold({type(first).__name__}, {type(second).__name__}): one must be a BatchNorm or "
        "FixedAffine, the other a Linear or Conv"
    )


def norm_after(layer: Linear | Conv, norm: Affine) -> Linear | Conv:
    """norm(layer(x)): columns times a, bias times a plus c."""
    w, bias = matrix(layer)
    a, c = norm.affine()
    check_channels(a, layer, w.shape[1])
    return rewritten(layer, w * a, c if bias is None else bias * a + c)


def norm_before(norm: Affine, layer: Linear | Conv) -> Linear | Conv:
    """layer(norm(x)): rows times a, and what the layer makes of c added to the bias."""
    w, bias = matrix(layer)
    if layer.weight.act is not None:
        raise ValueError(
            f"a weight with act={layer.weight.act!r} rounds the norm's output, which is gone after "
            "folding; fold first, then set act"
        )
    a, c = norm.affine()
    groups, taps = 1, 1
    if isinstance(layer, Conv):
        groups, taps = layer.groups, math.prod(layer.window.size)
        if layer.is_padded:
            raise ValueError(
                f"padding={layer.padding!r} adds zeros that the norm before it never saw; only a "
                'convolution without padding ("VALID") takes the norm before it in'
            )
    check_channels(a, layer, w.shape[0] // taps * groups)
    by_group = w.reshape(taps, -1, groups, w.shape[1] // groups)
    a, c = (v.reshape(groups, -1).T[:, :, None] for v in (a, c))
    shift = (by_group * c).sum((0, 1)).reshape(-1)
    return rewritten(layer, (by_group * a).reshape(w.shape), shift + (0 if bias is None else bias))


def matrix(layer: Linear | Conv) -> tuple[Float[Array, "in out"], Float[Array, "out"] | None]:
    """The map's matrix and bias in float32."""
    if not isinstance(layer.weight, Dense):
        raise ValueError(
            f"a {type(layer.weight).__name__} cannot take in a norm exactly; fold before changing "
            "the weight, or replace it by weights.Dense(weight.dense())"
        )
    bias = layer.bias
    w = layer.weight.dense().astype(jnp.float32)
    return w, None if bias is None else bias.astype(jnp.float32)


def check_channels(a: Float[Array, "d"], layer: Linear | Conv, channels: int) -> None:
    """Raises ValueError where a norm is of other channels than its side of the map."""
    if len(a) != channels:
        raise ValueError(f"the norm has {len(a)} channels, the {type(layer).__name__} {channels}")


def rewritten(layer: Linear | Conv, w: Array, bias: Array) -> Linear | Conv:
    """The map with another matrix and bias, in the dtype that it had."""
    dtype = layer.weight.dtype
    return layer.replace(Dense(w.astype(dtype), layer.weight.act), bias.astype(dtype))
