"""Linear relaxation, backwards: bounds that know how the parts of a network depend on each other.

Every nonlinearity lies between two lines over the interval of what it is given,

    a_l z + b_l <= f(z) <= a_u z + b_u,

and a row c of coefficients goes back through the network: through linear parts as a gradient does,
through f by the line below where its entry is positive and by the line above where it is not. What
arrives at the input bounds c f(x) over the whole box:

    c f(x) >= A x + d >= A center - |A| radius + d

(CROWN, arXiv 1811.00866). The intervals of what nonlinearities are given come from the same, one
after the other, where a layer is not too wide, and from `interval_bounds` elsewhere. Primitives
without lines of their own lie between two constants, which is sound and loose.

Here the way back is reverse-mode differentiation of a function whose nonlinearities have another
derivative, one that asks for the sign of what comes back.
"""

import dataclasses
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ffnlab.analysis.intervals import MOVED, PRODUCTS, Box, Intervals, box_of, check_ends
from ffnlab.analysis.walk import Meaning, Rule, bound, line_of, walk
from ffnlab.errors import ConfigError

__all__ = ["Lines", "linear_bounds", "lower_lines"]

WIDEST = 2048  # entries of a layer whose intervals are found by lines


class Between(NamedTuple):
    """Two lines around a nonlinearity, entry by entry."""

    low_slope: Array
    low: Array
    high_slope: Array
    high: Array


@jax.custom_vjp
def relaxed(z: Array, tie: Array, lines: Between) -> Array:
    """Stands for a nonlinearity: 0, so that what is left of its input is the constant part."""
    del tie, lines
    return jnp.zeros_like(z)


def relaxed_forward(z: Array, tie: Array, lines: Between) -> tuple[Array, tuple]:
    """What `relaxed` gives, and what the way back needs."""
    del tie
    return jnp.zeros_like(z), (z, lines)


def relaxed_backward(kept: tuple, back: Array) -> tuple:
    """By the line below where coefficients are positive, by the line above where they are not; what
    is constant goes to the tie."""
    z, lines = kept
    up, down = jnp.maximum(back, 0), jnp.minimum(back, 0)
    onwards = up * lines.low_slope + down * lines.high_slope
    constant = jnp.sum(up * lines.low + down * lines.high) + jnp.sum(onwards * z)
    return onwards, constant, jax.tree.map(jnp.zeros_like, lines)


relaxed.defvjp(relaxed_forward, relaxed_backward)


@dataclasses.dataclass(frozen=True)
class Lined:
    """A value inside: its box, and what carries the derivative."""

    box: Box
    line: Array


class Lines(Meaning[Lined]):
    """Primitives between lines.

    Attributes:
      given: boxes of what the nonlinearities met so far are given; intervals for later ones.
      met: what carries the derivative of each of them, in order.
    """

    kind = Lined

    def __init__(self, tie: Array, given: Sequence[Box]):
        self.tie, self.given = tie, given
        self.met: list[Lined] = []
        boxes = Intervals()
        self.boxes = boxes
        rules: dict[str, Rule] = {}
        for name in boxes.rules:
            rules[name] = self.constant_lines
        linear = MOVED | {"add", "add_any", "sub", "neg", "convert_element_type"}
        rules |= dict.fromkeys(linear, self.linear)
        rules |= dict.fromkeys(PRODUCTS | {"mul", "div"}, self.bilinear)
        rules |= {"max": self.greater, "logistic": self.bent, "tanh": self.bent}
        rules |= {"erf": self.bent, "exp": self.convex}
        self.rules = MappingProxyType(rules)

    # --- of the contract
    def constant(self, array: Array) -> Lined:
        raise ConfigError("a loop is not bounded by lines: give blocks in a list")

    def settled(self, value: Lined) -> Lined:
        raise ConfigError("a loop is not bounded by lines: give blocks in a list")

    def alike(self, value: Lined, other: Lined) -> Lined:
        return value

    def decided(self, value: Lined, equation: Any) -> Array:
        raise ConfigError(f"a branch that the box may not decide: {line_of(equation)}")

    # --- rules
    def boxed(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """Intervals of the outputs."""
        given = [each.box if isinstance(each, Lined) else each for each in inputs]
        return self.boxes.rules[equation.primitive.name](given, equation)

    def linear(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """As it is, of the box and of what carries the derivative; truths and whole numbers have no
        derivative that says anything."""
        kinds = [jnp.result_type(each.box.low) for each in inputs if isinstance(each, Lined)]
        kinds += [out.aval.dtype for out in equation.outvars]
        if not all(jnp.issubdtype(kind, jnp.floating) for kind in kinds):
            return self.constant_lines(inputs, equation)
        found = bound(equation, [line_of_value(each) for each in inputs])
        boxes = self.boxed(inputs, equation)
        return [Lined(box_of(b), line) for b, line in zip(boxes, found, strict=True)]

    def bilinear(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """Linear where one factor is a constant, and a denominator is."""
        both = [isinstance(each, Lined) for each in inputs[:2]]
        if all(both) or (equation.primitive.name == "div" and both[1]):
            return self.constant_lines(inputs, equation)
        return self.linear(inputs, equation)

    def constant_lines(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """Between its ends, whatever it depends on; truths stay boxes."""
        found = []
        for box in self.boxed(inputs, equation):
            if not jnp.issubdtype(jnp.result_type(box.low), jnp.floating):
                found.append(Lined(box, jnp.zeros(())))
                continue
            zero = jnp.zeros_like(box.low)
            lines = Between(zero, box.low, zero, box.high)
            found.append(Lined(box, relaxed(zero, self.tie, lines)))
        return found

    def met_box(self, z: Lined) -> Box:
        """The box of what a nonlinearity is given, the narrower of two."""
        number = len(self.met)
        self.met.append(z)
        if number >= len(self.given):
            return z.box
        known = self.given[number]
        return Box(jnp.maximum(known.low, z.box.low), jnp.minimum(known.high, z.box.high))

    def unary(
        self, z: Lined, equation: Any, inputs: Sequence[Any], lines: Callable[[Box], Between]
    ) -> Sequence[Any]:
        """A nonlinearity of one array between lines."""
        box = self.met_box(z)
        narrow = [Lined(box, z.line) if each is z else each for each in inputs]
        (out,) = self.boxed(narrow, equation)
        return [Lined(out, relaxed(z.line, self.tie, jax.lax.stop_gradient(lines(box))))]

    def greater(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """max(z, c), a ReLU where c is 0; of two that follow, between constants."""
        followed = [each for each in inputs if isinstance(each, Lined)]
        if len(followed) == 2 or jnp.shape(followed[0].line) != equation.outvars[0].aval.shape:
            return self.constant_lines(inputs, equation)
        (z,) = followed
        c = next(each for each in inputs if not isinstance(each, Lined))

        def lines(box: Box) -> Between:
            low, high = box.low - c, box.high - c
            width = jnp.where(high > low, high - low, 1)
            share = jnp.where(low >= 0, 1.0, jnp.where(high <= 0, 0.0, high / width))
            below = jnp.where(low >= 0, 1.0, jnp.where(high <= 0, 0.0, high > -low))
            crossed = (low < 0) & (high > 0)
            lift = jnp.where(crossed, -low * share, 0.0)
            ends = (jnp.where(slope == 1, 0, c * (1 - slope)) for slope in (below, share))
            low_end, high_end = ends  # of a c without end, whose slopes are 1
            return Between(below, low_end, share, high_end + lift)

        return self.unary(z, equation, inputs, lines)

    def bent(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """An S: rising, steepest in the middle. A line through either end with the lesser slope of
        the two lies on its side of it."""
        (z,) = inputs
        f = lambda v: bound(equation, [v])[0]  # noqa: E731

        def lines(box: Box) -> Between:
            slope_at = lambda v: jax.jvp(f, (v,), (jnp.ones_like(v),))[1]  # noqa: E731
            slope = jnp.minimum(slope_at(box.low), slope_at(box.high))
            low, high = f(box.low) - slope * box.low, f(box.high) - slope * box.high
            return Between(slope, low, slope, high)

        return self.unary(z, equation, inputs, lines)

    def convex(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """Above its tangent halfway, below its chord."""
        (z,) = inputs
        f = lambda v: bound(equation, [v])[0]  # noqa: E731

        def lines(box: Box) -> Between:
            middle = box.center
            value, slope = jax.jvp(f, (middle,), (jnp.ones_like(middle),))
            width = jnp.where(box.high > box.low, box.high - box.low, 1)
            chord = jnp.where(box.high > box.low, (f(box.high) - f(box.low)) / width, slope)
            return Between(slope, value - slope * middle, chord, f(box.high) - chord * box.high)

        return self.unary(z, equation, inputs, lines)


def line_of_value(each: Any) -> Any:
    """What carries the derivative; a constant is itself."""
    return each.line if isinstance(each, Lined) else each


def linear_bounds(
    fn: Callable[[Array], Array],
    low: Float[Array, "*in"],
    high: Float[Array, "*in"],
    *,
    widest: int = WIDEST,
) -> Box:
    """A box that holds what a function gives everywhere in a box, by lines; jitted, and under vmap.

    Never wider than `interval_bounds`.

    Args:
      fn: of one array to one array. Scanned stacks are given as lists (`models.unstack`).
      low, high: ends of the box, low <= high.
      widest: of what a nonlinearity is given, entries up to which its interval is found by lines.
    Raises:
      ConfigError: a primitive whose interval is not known, by name and line; a loop that follows
        the input; ends as `interval_bounds`.
    """
    check_ends(low, high)
    closed = jax.make_jaxpr(fn)(low)
    box = Box(low, high)
    given = refined(closed, box, widest)
    found = lower_lines(closed, box, given, None)
    plain = found.plain
    identity = jnp.eye(plain.low.size, dtype=plain.low.dtype).reshape(-1, *plain.low.shape)
    lower = jax.vmap(found.lower)(identity).reshape(plain.low.shape)
    upper = -jax.vmap(found.lower)(-identity).reshape(plain.low.shape)
    return narrower(lower, upper, plain)


def narrower(low: Array, high: Array, plain: Box) -> Box:
    """The narrower of lines and intervals; lines say nothing where one has no end."""
    return Box(
        jnp.where(jnp.isnan(low), plain.low, jnp.maximum(low, plain.low)),
        jnp.where(jnp.isnan(high), plain.high, jnp.minimum(high, plain.high)),
    )


class Lower(NamedTuple):
    """Lower bounds of rows of coefficients.

    Attributes:
      lower: coefficients of the outputs -> the least that their sum can be.
      plain: intervals of the outputs.
    """

    lower: Callable[[Array], Array]
    plain: Box


def lower_lines(closed: Any, box: Box, given: Sequence[Box], place: int | None) -> Lower:
    """Lower bounds of what a function gives, or of what its nonlinearity `place` is given.

    Args:
      closed: the function (`jax.make_jaxpr`).
      box: of its input.
      given: boxes of what the first nonlinearities are given.
      place: None for the output.
    """
    plain: list[Box] = []

    def traced(x: Array, tie: Array) -> Array:
        meaning = Lines(tie, given)
        (out,) = walk(meaning, closed.jaxpr, closed.consts, [Lined(box, x)])
        if place is not None:
            out = meaning.met[place]
        plain.append(out.box if isinstance(out, Lined) else box_of(out))
        return out.line if isinstance(out, Lined) else out

    value, pull = jax.vjp(traced, jnp.zeros_like(box.low), jnp.zeros((), box.low.dtype))

    def lower(c: Array) -> Array:
        slopes, constant = pull(c.astype(value.dtype))
        rest = constant + jnp.vdot(c, value)
        return jnp.vdot(slopes, box.center) - jnp.vdot(jnp.abs(slopes), box.radius) + rest

    return Lower(lower, plain[0])


def refined(closed: Any, box: Box, widest: int) -> list[Box]:
    """Boxes of what nonlinearities are given, each by lines through those before."""
    probe = Lines(jnp.zeros((), box.low.dtype), [])
    walk(probe, closed.jaxpr, closed.consts, [Lined(box, jnp.zeros_like(box.low))])
    given: list[Box] = []
    for place, met in enumerate(probe.met):
        if met.box.low.size > widest:
            given.append(met.box)
            continue
        found = lower_lines(closed, box, given, place)
        shape, size = met.box.low.shape, met.box.low.size
        identity = jnp.eye(size, dtype=box.low.dtype).reshape(size, *shape)
        low = jax.vmap(found.lower)(identity).reshape(shape)
        high = -jax.vmap(found.lower)(-identity).reshape(shape)
        given.append(narrower(low, high, found.plain))
    return given
