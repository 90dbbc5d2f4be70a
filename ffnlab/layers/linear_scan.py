"""The linear recurrence of state space models, leaky integrators and moving averages.

    h_t = a_t * h_(t-1) + b_t

Its adjoint is the same recurrence run backwards, so that a derivative of its own keeps a and h and
nothing of what is between:

    g_t = dL/dh_t + a_(t+1) * g_(t+1),   dL/db_t = g_t,   dL/da_t = g_t * h_(t-1)

Three forms compute it. "sequential" takes as many steps as there are places and one pass over
memory. "associative" (Blelloch, Prefix sums and their applications, 1990) takes log2 of them and
some log2 passes. "chunked" runs pieces of the square root's length beside each other, and passes
what each leaves on to the next: three passes, and 2 sqrt(n) steps.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError

__all__ = ["FORMS", "linear_scan"]


Shape = tuple[int, ...]


def sequential(a: Array, b: Array, start: Array, reverse: bool) -> Array:
    """One place after the other."""

    def step(h: Array, ab: tuple[Array, Array]) -> tuple[Array, Array]:
        h = ab[0] * h + ab[1]
        return h, h

    return jax.lax.scan(step, start, (a, b), reverse=reverse)[1]


def associative(a: Array, b: Array, start: Array, reverse: bool) -> Array:
    """All prefixes of (a, b) composed pairwise."""
    first = -1 if reverse else 0
    b = b.at[first].add(a[first] * start)

    def after(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(after, (a, b), reverse=reverse)[1]


def chunked(a: Array, b: Array, start: Array, reverse: bool) -> Array:
    """Pieces beside each other, each from zero; then what each leaves to the next."""
    if reverse:
        return chunked(a[::-1], b[::-1], start, False)[::-1]
    length, shape = len(a), a.shape[1:]
    piece = max(1, round(length**0.5))
    more = -length % piece
    padded = (jnp.pad(x, [(0, more), *[(0, 0)] * len(shape)]) for x in (a, b))
    # [place of a piece, piece, …]
    a, b = (x.reshape(-1, piece, *shape).swapaxes(0, 1) for x in padded)

    def step(carry: tuple, ab: tuple[Array, Array]) -> tuple[tuple, tuple]:
        carry = carry[0] * ab[0], carry[1] * ab[0] + ab[1]
        return carry, carry

    _, (products, own) = jax.lax.scan(step, (jnp.ones_like(b[0]), jnp.zeros_like(b[0])), (a, b))
    ends = sequential(products[-1], own[-1], start, False)
    before = jnp.concatenate([start[None], ends[:-1]])
    h = own + products * before
    return h.swapaxes(0, 1).reshape(-1, *shape)[:length]


FORMS: dict[str, Callable[[Array, Array, Array, bool], Array]] = {
    "sequential": sequential,
    "associative": associative,
    "chunked": chunked,
}


def linear_scan(
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    start: Float[Array, "..."] | None = None,
    *,
    axis: int = 0,
    form: str | None = None,
) -> Float[Array, "..."]:
    """h of all places along an axis, in float32 (float64 where that is given).

    Reverse-mode derivatives only.

    Args:
      a, b: of shapes that broadcast to that of h, as long as each other along the axis.
      start: h before the first place, without the axis; broadcasts too. None is zero.
      axis: that the places lie on.
      form: a key of `FORMS`; None is `form_for` this backend and length.
    Returns:
      h, in the dtype of a * b.
    Raises:
      ConfigError: another form, an axis that is not there or empty, lengths that differ, or a start
        that does not fit.

    >>> linear_scan(jnp.array([1.0, 0.5, 2.0]), jnp.ones(3))
    Array([1. , 1.5, 4. ], dtype=float32)
    """
    shape, axis = checked_shape(a.shape, b.shape, axis)
    form = form_for(jax.default_backend(), shape[axis]) if form is None else form
    if form not in FORMS:
        raise ConfigError(f"form={form!r} is not one of {sorted(FORMS)}")
    rest = shape[:axis] + shape[axis + 1 :]
    start = jnp.zeros(()) if start is None else start
    if together(jnp.shape(start), rest) != rest:
        raise ConfigError(f"start {list(jnp.shape(start))} does not fit {list(rest)}, h of a place")
    dtype = jnp.result_type(a, b)
    wide = jnp.promote_types(dtype, jnp.float32)
    a, b = (jnp.moveaxis(jnp.broadcast_to(x, shape), axis, 0).astype(wide) for x in (a, b))
    h = scanned(a, b, jnp.broadcast_to(start, rest).astype(wide), form)
    return jnp.moveaxis(h, 0, axis).astype(dtype)


def checked_shape(a: Shape, b: Shape, axis: int) -> tuple[Shape, int]:
    """(the shape of h, the axis counted from the front); errors as `linear_scan`."""
    shape = together(a, b)
    if shape is not None and not -len(shape) <= axis < len(shape):
        raise ConfigError(f"axis={axis} is not there: h is {list(shape)}")
    places = [(1,) * (len(shape) - len(each)) + tuple(each) for each in (a, b)] if shape else []
    if shape is None or len({each[axis] for each in places}) != 1 or not shape[axis]:
        raise ConfigError(
            f"a {list(a)} and b {list(b)} along axis {axis}: shapes that broadcast, with the same "
            "places, one or more, are accepted"
        )
    return shape, axis % len(shape)


def together(a: Shape, b: Shape) -> Shape | None:
    """The shape that two broadcast to, None where they do not."""
    try:
        return jnp.broadcast_shapes(a, b)
    except ValueError:
        return None


def form_for(backend: str, length: int) -> str:
    """The fastest form, by what was measured.

    Time of the sequential form over that of the associative and of the chunked one, medians of 15
    turns on two cores of a CPU, forward and with both gradients:

        12 places of 32 x 32 x 8    .50 .38    .52 .39
        325 of 4 x 64 x 2           .30 .30    .57 .38
        325 of 8 x 128 x 2          .20 .14    .26 .37
        2048 of 2 x 64 x 16         .18 .18    .56 .48
        2048 of 16                  .20 .13    .34 .19

    Of accelerators nothing was measured: there a step is a launch, and the form with the fewest
    steps is taken.
    """
    return "sequential" if backend == "cpu" or length < 4 else "associative"


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def scanned(a: Array, b: Array, start: Array, form: str) -> Array:
    """h [n, …] of arrays of one shape, along the first axis."""
    return FORMS[form](a, b, start, False)


def forward(a: Array, b: Array, start: Array, form: str) -> tuple[Array, tuple]:
    """h, and what its derivative needs."""
    h = scanned(a, b, start, form)
    return h, (a, h, start)


def backward(form: str, kept: tuple, g: Array) -> tuple[Array, Array, Array]:
    """The adjoint, by the same form run backwards."""
    a, h, start = kept
    following = jnp.concatenate([a[1:], jnp.zeros_like(a[:1])])
    g = FORMS[form](following, g, jnp.zeros_like(start), True)
    before = jnp.concatenate([start[None], h[:-1]])
    return g * before, g, a[0] * g[0]


scanned.defvjp(forward, backward)
