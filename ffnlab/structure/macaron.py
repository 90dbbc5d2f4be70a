"""Understanding and Improving Transformer From a Multi-Particle Dynamic System Point of View
(Macaron Net, 2019, arXiv 1906.02762).

Tokens are particles: attention moves them by each other, the FFN moves each by itself, and a block
is a step of a numerical scheme for dx/dt = A(x) + F(x). Attention and then the FFN is the splitting
of Lie and Trotter; a Macaron is that of Strang and Marchuk, with two FFNs of half the width:

    x <- x + scale ffn_in(x),   x <- x + attn(x),   x <- x + scale ffn(x),     scale = 1/2

each sublayer of norm(x), or with a norm after the sum, as the model has it.

Symbols. A, F: the fields of attention and FFN; h: the time of a step; d: width; D: hidden channels.

Strang's splitting of exact flows errs by h^3 in a step, Lie's by h^2. A block takes Euler's steps
inside, of which either splitting errs by h^2: the Macaron is not of a higher order than the block
it replaces. `lie`, `strang`, `exact`, `euler` and `slope` are there to measure that.

What differs from the authors' code: any FFN with or without a gate and any norm of the model is
taken, and both FFNs have its activation (the first of their BERT always has ReLU); the width of
both is half that of the block's own FFN (the first of their decoder takes the encoder's); there is
no dropout in a block; and a model that is there already may become a Macaron by what it learned.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx
from jaxtyping import Array, Float, Key

from ffnlab import tree
from ffnlab.errors import ConfigError, check_seed
from ffnlab.layers import FFN, Block, GatedFFN, Join, Linear
from ffnlab.models.rewriting import key_of, rewriting
from ffnlab.transform import Transform
from ffnlab.weights import Dense

__all__ = ["euler", "exact", "lie", "macaron", "slope", "strang", "with_two_ffns"]

FIRST = "ffn_in"  # the slot of the first FFN
STARTS = ("drawn", "split", "twice", "kept")
HALVED = ("drawn", "split")  # of which both FFNs have half the channels


def macaron(
    *, start: str = "drawn", scale: float = 0.5, seed: int = 0
) -> Transform[Any, tuple[()]]:
    """The transform that puts a second FFN before the attention of every block.

    Of "drawn" and "split" a block has as many parameters as before but for a norm and the biases of
    width d: 3 d more with layer norms and biases, d with RMS norms and none.

    Args:
      start: what the two FFNs are at first.
        "drawn": new ones of half the channels, as the authors train them from the beginning.
        "split": the first half of the FFN's channels and the other half, their maps to the stream
          divided by `scale`, so that the FFN of one input is what both add together.
        "twice": the FFN, and a copy of it: another function than the FFN once.
        "kept": one that adds nothing yet, and the FFN divided by `scale`: the model computes what
          it did.
      scale: multiplies what either adds, above 0.
      seed: of what is drawn.
    Returns:
      a Transform that observes nothing, of a model whose blocks have an FFN or a gated one of dense
      matrices; the new slot "ffn_in" has a copy of the FFN's norm, and joins the stream as that
      does.
    Raises:
      ConfigError: an option out of range; from the transform, blocks without such an FFN, an odd
        number of channels where they are halved, norms after the sums where the function is to be
        kept, or a model that is a Macaron already.
    Source:
      arXiv 1906.02762; `translation/fairseq/models/transformer.py` of zhuohan123/macaron-net.

    >>> macaron(start="split").name
    'macaron'
    """
    check_options(start, scale)
    check_seed(seed)

    def problems(model: Any) -> list[str]:
        blocks = dict(enumerate(model.blocks()))
        return [f"layers[{i}] {said}" for i, b in blocks.items() for said in unfit(b, start)]

    def change(model: Any) -> Any:
        blocks, new = model.blocks(), {}
        for i, block in enumerate(blocks):
            is_stream = join_of(block).norm == "before"
            new[f"layers[{i}]"] = with_two_ffns(
                block,
                start=start,
                scale=scale,
                key=key_of(seed, f"layers[{i}]"),
                out_scale=(2 * len(blocks)) ** -0.5 if is_stream else 1.0,
            )
        return tree.replace(model, new)

    return rewriting("macaron", problems, change)


def check_options(start: str, scale: float) -> None:
    """Raises ConfigError for a start that there is not, or a scale that is no positive number."""
    if start not in STARTS:
        raise ConfigError(f"start={start!r} is not one of {STARTS}")
    if not (0 < scale < math.inf):
        raise ConfigError(f"scale={scale} must be a positive number")


def join_of(block: Block) -> Join:
    """How the FFN joins the stream."""
    return block.joins[block.slots.index("ffn")]


def unfit(block: Block, start: str) -> list[str]:
    """Why a block cannot become a Macaron."""
    if hasattr(block, FIRST):
        return ["is a Macaron already"]
    ffn = block.ffn
    if not isinstance(ffn, FFN | GatedFFN) or any(
        not isinstance(part, Linear) or type(part.weight) is not Dense for part in maps_of(ffn)
    ):
        return [
            f"has a {type(ffn).__name__} as its FFN; an FFN or a GatedFFN of dense matrices is "
            "accepted"
        ]
    found, join, hidden = [], join_of(block), ffn.up.weight.shape[1]
    has_second_norm = block.post_ffn_norm is not None
    if not join.residual or join.scale != 1 or join.norm == "output" or has_second_norm:
        found.append("has an FFN that joins otherwise than h + ffn(norm(h)) or norm(h + ffn(h))")
    if start in HALVED and hidden % 2:
        found.append(
            f"has an FFN of {hidden} channels, which start={start!r} halves; an even number is "
            "accepted, or start='twice' or 'kept'"
        )
    if start == "kept" and join.norm == "after":
        found.append("has norms after the sums: one more changes the function; not start='kept'")
    return found


def maps_of(ffn: FFN | GatedFFN) -> list[nnx.Module]:
    """The maps of an FFN, those to the hidden channels first."""
    return [*([ffn.gate] if isinstance(ffn, GatedFFN) else []), ffn.up, ffn.down]


def with_two_ffns(
    block: Block,
    *,
    start: str = "drawn",
    scale: float = 0.5,
    key: Key[Array, ""] | None = None,
    out_scale: float = 1.0,
) -> Block:
    """A block with a second FFN before everything else.

    Args:
      block: with an FFN; of other sublayers it may have any.
      start, scale: see `macaron`.
      key: of what is drawn; needed of "drawn".
      out_scale: of the draw of maps to the stream.
    Raises:
      ConfigError: see `macaron`; or nothing to draw by.
    """
    check_options(start, scale)
    found = unfit(block, start)
    if found:
        raise ConfigError("the block " + "; ".join(found))
    if start == "drawn" and key is None:
        raise ConfigError("start='drawn' needs a key")
    first, second = two_ffns(block.ffn, start, scale, key, out_scale)
    join = Join(scale, join_of(block).norm)
    # Copies: two layers of one array could not be given up to a step that donates its model.
    norm = None if block.ffn_norm is None else jax.tree.map(jnp.copy, block.ffn_norm)
    new = block.with_slot(FIRST, first, after=None, norm=norm, join=join)
    new.ffn = nnx.data(second)
    new.joins = tuple(
        join if name == "ffn" else old for name, old in zip(new.slots, new.joins, strict=True)
    )
    return new


def two_ffns(
    ffn: Any, start: str, scale: float, key: Key[Array, ""] | None, out_scale: float
) -> tuple[nnx.Module, nnx.Module]:
    """The FFNs before and after the attention."""
    (width, hidden), half = ffn.up.weight.shape, ffn.up.weight.shape[1] // 2
    if start == "drawn":
        assert key is not None
        options = {"activation": ffn.activation, "bias": ffn.up.b is not None}
        options |= {"out_scale": out_scale, "dtype": ffn.up.weight.dtype}
        first, second = (type(ffn)(width, half, key=k, **options) for k in jax.random.split(key))
        return first, second
    if start == "split":
        parts = slice(half), slice(half, hidden)
        first, second = (of_channels(ffn, part, 1 / scale, 0.5 / scale) for part in parts)
        return first, second
    copy, whole = jax.tree.map(jnp.copy, ffn), slice(hidden)
    if start == "twice":
        return copy, ffn
    return of_channels(copy, whole, 0.0, 0.0), of_channels(ffn, whole, 1 / scale, 1 / scale)


def of_channels(ffn: Any, part: slice, times: float, bias_times: float) -> Any:
    """An FFN of some hidden channels, its map to the stream and the bias there multiplied."""

    def cut(linear: Linear) -> Linear:
        weight: Any = linear.weight
        w, bias = weight.w[:, part], None if linear.bias is None else linear.bias[part]
        return Linear.of(Dense(w, weight.act), bias, axes=linear.w.axes)

    new, old = tree.copy(ffn), ffn.down
    for name in ("gate", "up") if isinstance(ffn, GatedFFN) else ("up",):
        setattr(new, name, cut(getattr(ffn, name)))
    w, bias = times * old.weight.w[part], None if old.bias is None else bias_times * old.bias
    new.down = Linear.of(Dense(w, old.weight.act), bias, axes=old.w.axes)
    return new


Flow = Callable[[Any, float], Any]  # (x, h) -> where x is after a time of h


def lie(attention: Flow, ffn: Flow) -> Flow:
    """The splitting of Lie and Trotter: attention for a time of h, then the FFN.

    >>> lie(lambda x, h: x + h, lambda x, h: x * (1 + h))(1.0, 0.5)
    2.25
    """
    return lambda x, h: ffn(attention(x, h), h)


def strang(attention: Flow, ffn: Flow) -> Flow:
    """The splitting of Strang and Marchuk: the FFN for h / 2, attention for h, the FFN for h / 2.

    >>> strang(lambda x, h: x + h, lambda x, h: x * (1 + h))(1.0, 1.0)
    3.75
    """
    return lambda x, h: ffn(attention(ffn(x, h / 2), h), h / 2)


def euler(field: Callable[[Any], Any]) -> Flow:
    """Euler's step along a field, x + h f(x): what a sublayer with a residual does."""
    return lambda x, h: x + h * field(x)


def exact(field: Float[np.ndarray, "n n"]) -> Flow:
    """The flow of a linear field x -> M x: e^(h M) x, in float64.

    >>> exact(np.zeros((2, 2)))(np.ones(2), 3.0).tolist()
    [1.0, 1.0]
    """
    return lambda x, h: scipy.linalg.expm(h * np.asarray(field, np.float64)) @ x


def slope(
    step: Flow, truth: Flow, x: Float[Array | np.ndarray, "..."], sizes: Sequence[float]
) -> tuple[float, Float[np.ndarray, "k"]]:
    """How the error of one step falls with its size.

    Args:
      step: a numerical scheme.
      truth: the flow that it approximates.
      x: where the step begins.
      sizes: h of each step, two or more that differ, above 0.
    Returns:
      (exponent p of the fit error = c h^p, by least squares of logarithms; the errors, lengths of
      differences). A scheme of order k, over a fixed time, has p = k + 1.
    Raises:
      ConfigError: sizes that do not fit, or a step without error.

    >>> p, _ = slope(euler(lambda x: x), exact(np.eye(1)), np.ones(1), (1e-2, 1e-3))
    >>> round(p, 1)
    2.0
    """
    if len(set(sizes)) < 2 or not min(sizes) > 0:
        raise ConfigError(f"sizes={tuple(sizes)}: two or more that differ, above 0, are accepted")
    errors = np.array([np.linalg.norm(step(x, h) - truth(x, h)) for h in sizes])
    if not (errors > 0).all():
        raise ConfigError(f"errors {errors.tolist()}: a step without error has no order")
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0]), errors
