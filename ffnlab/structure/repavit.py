"""RePaViT: Scalable Vision Transformer Acceleration via Structural Reparameterization on
Feedforward Network Layers (2025, arXiv 2505.21847).

In each FFN the nonlinearity applies to some hidden channels only; the idle rest is linear. With
batch norms before the FFN and after its nonlinearity, the idle channels, both norms and the
residual fold after training into one square matrix, and outputs stay what they were:

    y = gelu(x W1[:, :A] + b1[:A]) W2[:A] + x M + d,   M = W1[:, A:] W2[A:] + I,
    d = b1[A:] W2[A:] + b2,                            W1, b1, W2, b2 with the norms folded in

Symbols. x: [n, C]; D: hidden channels; theta: idle ratio; A = ceil(D (1 - theta)): active channels.

What differs from the authors' code: the ceiling is of the product rounded to nine decimals, so that
ten channels at theta = .7 have 3 active ones and not 4; the linear schedule refuses ratios for
which a layer would have more active channels than there are; a fold refuses statistics that no
batch has moved. Matrices take the norms in as `ffnlab.layers.fold` does.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers import FFN, BatchNorm, Block, FoldedFFN, IdleFFN, Join, Linear, fold
from ffnlab.models.rewriting import rewriting
from ffnlab.transform import Transform
from ffnlab.weights import Dense

__all__ = ["active_channels", "idle_ratios", "repa", "repa_fold"]

SCHEDULES = ("constant", "linear")
DIGITS = 9  # of D (1 - theta), before it is rounded up


def idle_ratios(layers: int, idle: float, schedule: str = "constant") -> tuple[float, ...]:
    """The idle ratio of every layer.

    "constant": theta;  "linear": 2 theta - 1 + (2 - 2 theta) (i + 1) / (L - 1), the last layer 0

    Args:
      layers: how many (L), at least 1; at least 2 of "linear".
      idle: theta, in [0, 1].
      schedule: "constant" or "linear".
    Raises:
      ConfigError: idle outside [0, 1], another schedule, or a linear one that begins below 0.

    >>> idle_ratios(3, 0.75, "linear")
    (0.75, 1.0, 0.0)
    """
    check_schedule(idle, schedule)
    if schedule == "constant":
        return (idle,) * layers
    if layers < 2:
        raise ConfigError(f"schedule='linear' of layers={layers}: at least 2 are needed")
    rising = [2 * idle - 1 + (2 - 2 * idle) * (i + 1) / (layers - 1) for i in range(layers - 1)]
    if rising[0] < -(10**-DIGITS):
        least = (layers - 3) / (2 * (layers - 2))
        raise ConfigError(
            f"idle={idle}: the linear schedule of {layers} layers begins at {rising[0]:.3f}; "
            f"ratios from {least:.3f} on begin at 0 or above"
        )
    return (*(max(ratio, 0.0) for ratio in rising), 0.0)


def check_schedule(idle: float, schedule: str) -> None:
    """Raises ConfigError for a ratio outside [0, 1] or a schedule that there is not."""
    if not 0 <= idle <= 1:
        raise ConfigError(f"idle={idle} must lie in [0, 1]")
    if schedule not in SCHEDULES:
        raise ConfigError(f"schedule={schedule!r} is not one of {list(SCHEDULES)}")


def active_channels(hidden: int, idle: float) -> int:
    """A = ceil(D (1 - theta)).

    >>> active_channels(128, 0.9), active_channels(10, 0.7)
    (13, 3)
    """
    return math.ceil(round(hidden * (1 - idle), DIGITS))


def repa(
    *,
    idle: float = 0.75,
    schedule: Literal["constant", "linear"] = "constant",
    momentum: float = 0.1,
) -> Transform[Any, tuple[()]]:
    """The transform that makes a model's FFNs ones with idle channels and batch norms.

    The matrices stay; the norm before each FFN becomes a `BatchNorm`, another follows the
    nonlinearity. The function changes: train it, by a loss that measures batch norms
    (`ffnlab.losses.measuring`), then `repa_fold`.

    Args:
      idle: share of hidden channels without a nonlinearity, in [0, 1]; the paper takes .5 for tiny
        and small models, .75 for larger ones.
      schedule: see `idle_ratios`.
      momentum: share of a new batch in the norms' running statistics.
    Returns:
      a Transform that observes nothing, of models whose blocks have an ungated FFN behind a norm.
    Raises:
      ConfigError: idle or momentum out of range, or another schedule; from the transform, blocks
        without such an FFN, named.

    >>> repa(idle=0.5).name
    'repa'
    """
    check_schedule(idle, schedule)
    if not 0 <= momentum <= 1:
        raise ConfigError(f"momentum={momentum} must lie in 0..1")

    def change(model: Any) -> Any:
        places = ffns_of(model)
        ratios = idle_ratios(len(places), idle, schedule)
        new = {}
        for (path, block), ratio in zip(places.items(), ratios, strict=True):
            new[path] = with_idle(block, ratio, momentum)
        return tree.replace(model, new)

    def problems(model: Any) -> list[str]:
        found = [
            f"{path}.ffn is {said(block)}"
            for path, block in blocks_of(model).items()
            if not is_plain(block)
        ]
        if not found:
            idle_ratios(len(model.blocks()), idle, schedule)
        return found

    return rewriting("repa", problems, change)


def blocks_of(model: Any) -> Mapping[str, Block]:
    """The blocks with an FFN, by path."""
    return {f"layers[{i}]": b for i, b in enumerate(model.blocks()) if b.ffn is not None}


def ffns_of(model: Any) -> Mapping[str, Block]:
    """The blocks that `repa` rewrites, by path."""
    return {path: block for path, block in blocks_of(model).items() if is_plain(block)}


def join_of(block: Block) -> Join:
    """How the FFN joins the stream."""
    return block.joins[block.slots.index("ffn")]


def is_plain(block: Block) -> bool:
    """Whether a block has an ungated FFN of dense matrices behind a norm, with a residual."""
    ffn, join = block.ffn, join_of(block)
    stands = join.norm == "before" and join.residual and join.scale == 1
    is_dense = isinstance(ffn, FFN) and all(type(m.weight) is Dense for m in (ffn.up, ffn.down))
    return is_dense and stands and block.ffn_norm is not None and block.post_ffn_norm is None


def said(block: Block) -> str:
    """What stands there instead."""
    if isinstance(block.ffn, FFN):
        return "an FFN that is not dense, not behind a norm, or joined otherwise than h + ffn"
    return f"a {type(block.ffn).__name__}; an ungated FFN is accepted"


def with_idle(block: Block, idle: float, momentum: float) -> Block:
    """The block with an `IdleFFN` of the same matrices."""
    ffn: Any = block.ffn
    (width, hidden), dtype = ffn.up.weight.shape, ffn.up.weight.dtype
    common = {"momentum": momentum, "unbiased": True, "dtype": dtype}
    new = tree.copy(block)
    new.ffn_norm = nnx.data(BatchNorm(width, **common))
    norm = BatchNorm(hidden, axis="mlp", **common)
    active = active_channels(hidden, idle)
    new.ffn = nnx.data(
        IdleFFN(ffn.up, ffn.down, active=active, norm=norm, activation=ffn.activation)
    )
    return new


def repa_fold(*, force: bool = False) -> Transform[Any, tuple[()]]:
    """The transform that folds trained `IdleFFN`s, their norms and residuals; outputs stay.

    Worth it where 2 A + C < 2 D: at theta above C / (2 D), an eighth where D = 4 C.

    Args:
      force: fold norms whose statistics no batch has moved, too.
    Returns:
      a Transform that observes nothing. A folded slot has no norm and no residual.
    Raises:
      ConfigError: from the transform, a model without `IdleFFN`s, one whose matrices are not
        dense or whose norms are no batch norms, or statistics that were never updated.

    >>> repa_fold().name
    'repa-fold'
    """

    def idle_blocks(model: Any) -> Mapping[str, Block]:
        return {p: b for p, b in blocks_of(model).items() if isinstance(b.ffn, IdleFFN)}

    def change(model: Any) -> Any:
        return tree.replace(model, {p: folded(b) for p, b in idle_blocks(model).items()})

    def problems(model: Any) -> list[str]:
        found = idle_blocks(model)
        if not found:
            return ["the model has no IdleFFN; repa makes them"]
        return [f"{path}: {text}" for path, b in found.items() for text in unfit(b, force)]

    return rewriting("repa-fold", problems, change)


def unfit(block: Block, force: bool) -> list[str]:
    """Why a block cannot be folded."""
    ffn, join = block.ffn, join_of(block)
    assert isinstance(ffn, IdleFFN)
    found = [
        f"ffn.{name} is a {type(linear.weight).__name__}; fold before changing the weights"
        for name, linear in (("up", ffn.up), ("down", ffn.down))
        if type(linear.weight) is not Dense
    ]
    if not isinstance(block.ffn_norm, BatchNorm) or join.norm != "before":
        found.append("no BatchNorm stands before the FFN")
    elif not force and any(map(is_untouched, (block.ffn_norm, ffn.norm))):
        found.append(
            "its batch norms were never updated (mean 0, variance 1); train it by a loss that "
            "measures them, or force=True"
        )
    if not join.residual or join.scale != 1 or block.post_ffn_norm is not None:
        found.append("its FFN is joined otherwise than h + ffn")
    return found


def is_untouched(norm: BatchNorm) -> bool:
    """Whether running statistics are those of a new norm; abstract ones are not known."""
    mean, variance = norm.mean.get_value(), norm.variance.get_value()
    try:
        return bool(np.all(np.asarray(mean) == 0) and np.all(np.asarray(variance) == 1))
    except (TypeError, ValueError):
        return False


def of_float32(linear: Any) -> tuple[Float[Array, "in out"], Float[Array, "out"]]:
    """The matrix and the bias of a map that has both."""
    return linear.weight.dense().astype(jnp.float32), linear.bias.astype(jnp.float32)


def folded(block: Block) -> Block:
    """The block with a `FoldedFFN` that does what norm, FFN and residual did."""
    ffn, norm = block.ffn, block.ffn_norm
    assert isinstance(ffn, IdleFFN) and isinstance(norm, BatchNorm)
    (w1, b1), (w2, b2) = (of_float32(fold(*p)) for p in ((norm, ffn.up), (ffn.norm, ffn.down)))
    active = ffn.active
    # Of float32 matrices: rounded once, to the dtype that the model has.
    straight = jnp.matmul(w1[:, active:], w2[active:], precision="highest") + jnp.eye(len(w1))
    shift = jnp.matmul(b1[active:], w2[active:], precision="highest") + b2
    dtype = ffn.up.weight.dtype
    square = Linear.of(Dense(straight.astype(dtype)), shift.astype(dtype), axes=("embed", "embed"))
    first = second = None
    if active:
        first = Linear.of(
            Dense(w1[:, :active].astype(dtype)), b1[:active].astype(dtype), axes=("embed", "mlp")
        )
        second = Linear.of(Dense(w2[:active].astype(dtype)), axes=("mlp", "embed"))
    new = tree.copy(block)
    new.ffn_norm = nnx.data(None)
    new.ffn = nnx.data(FoldedFFN(first, second, square, activation=ffn.activation))
    joins = list(block.joins)
    joins[block.slots.index("ffn")] = Join(residual=False)
    new.joins = tuple(joins)
    return new
