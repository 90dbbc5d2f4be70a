"""Primitives for boxes: what a function gives where each entry of its input lies in an interval.

    [l, u] of  c + W x   is   W (l + u) / 2 + c  -+  |W| (u - l) / 2

and a function that does not fall gives [f(l), f(u)]. Of a choice that a box does not decide both
cases are taken. Sound to rounding: what the function gives at any point of the box lies in the box
that is found (interval bound propagation, arXiv 1810.12715).
"""

import dataclasses
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ffnlab.analysis.walk import Meaning, Rule, bound, line_of, walk
from ffnlab.errors import ConfigError, is_known

__all__ = ["Box", "Intervals", "box_of", "check_ends", "interval_bounds"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Box:
    """Intervals, entry by entry; of truths what is surely and what is possibly true.

    Attributes:
      low, high: of one shape.
    """

    low: Any
    high: Any

    @property
    def is_point(self) -> bool:
        """Whether it is a constant, both of whose ends are one array."""
        return self.low is self.high

    @property
    def center(self) -> Any:
        """Halfway."""
        return self.low if self.is_point else (self.low + self.high) / 2

    @property
    def radius(self) -> Any:
        """Half the width."""
        return (self.high - self.low) / 2


# Data are moved, or added up: both ends alike.
MOVED = frozenset(
    "reshape broadcast_in_dim transpose squeeze slice concatenate pad rev copy copy_p expand_dims "
    "reduce_sum reduce_window_sum cumsum optimization_barrier split "
    "stop_gradient tile reduce_precision reshard mesh_cast name real stack".split()
)
# None falls in any of its inputs.
RISING = frozenset(
    "add add_any max min exp exp2 expm1 log log1p logistic tanh erf sqrt cbrt sign floor ceil "
    "round asinh atan sinh clamp reduce_max reduce_min reduce_window_max reduce_window_min cummax "
    "cummin".split()
)
FALLING = frozenset("neg rsqrt erfc".split())
TRUTHS = frozenset("and or reduce_and reduce_or not".split())  # of bits nothing is known
PRODUCTS = frozenset("dot_general conv_general_dilated ragged_dot_general".split())
COMPARED = {"gt": jnp.greater, "ge": jnp.greater_equal, "lt": jnp.less, "le": jnp.less_equal}


class Intervals(Meaning[Box]):
    """Primitives for boxes."""

    kind = Box

    def __init__(self) -> None:
        rules: dict[str, Rule] = dict.fromkeys(MOVED | RISING, self.rising)
        rules |= dict.fromkeys(FALLING, self.falling)
        rules |= dict.fromkeys(PRODUCTS, self.product)
        rules |= dict.fromkeys(COMPARED, self.compared)
        rules |= dict.fromkeys(("sin", "cos"), self.waves)
        rules |= dict.fromkeys(("gather", "dynamic_slice"), self.looked_up)
        rules |= {"sub": self.difference, "mul": self.times, "div": self.quotient}
        rules |= {"abs": self.absolute, "square": self.even, "integer_pow": self.power}
        rules |= dict.fromkeys(TRUTHS, self.truths)
        rules |= {"convert_element_type": self.converted}
        rules |= {"select_n": self.selected, "ne": self.unequal, "eq": self.equal}
        self.rules = MappingProxyType(rules)

    # --- of the contract
    def constant(self, array: Array) -> Box:
        return Box(array, array)

    def settled(self, value: Box) -> Box:
        return value

    def alike(self, value: Box, other: Box) -> Box:
        del other
        return value

    def decided(self, value: Box, equation: Any) -> Array:
        raise ConfigError(f"a branch that the box may not decide: {line_of(equation)}")

    # --- rules
    def rising(self, inputs: Sequence[Any], equation: Any) -> Sequence[Box]:
        """Both ends by themselves."""
        lows, highs = (bound(equation, [end(each, i) for each in inputs]) for i in (0, 1))
        return [Box(a, b) for a, b in zip(lows, highs, strict=True)]

    def falling(self, inputs: Sequence[Any], equation: Any) -> Sequence[Box]:
        """Both ends, turned."""
        highs, lows = (bound(equation, [end(each, i) for each in inputs]) for i in (0, 1))
        return [Box(a, b) for a, b in zip(lows, highs, strict=True)]

    def truths(self, inputs: Sequence[Any], equation: Any) -> Sequence[Box]:
        """Both ends, of what is surely and what is possibly true."""
        if any(not is_truth(box_of(each).low) for each in inputs):
            raise ConfigError(
                f"{equation.primitive.name} of bits that follow the input: {line_of(equation)}"
            )
        is_turned = equation.primitive.name == "not"
        return (self.falling if is_turned else self.rising)(inputs, equation)

    def converted(self, inputs: Sequence[Any], equation: Any) -> Sequence[Box]:
        """Both ends; as a truth whether it is 0, and nothing is known of what wraps around."""
        (x,), new = inputs, equation.params["new_dtype"]
        makes_truths = jnp.issubdtype(new, jnp.bool_)
        if is_truth(x.low) or not (makes_truths or jnp.issubdtype(new, jnp.unsignedinteger)):
            return self.rising(inputs, equation)
        if not makes_truths:
            raise ConfigError(f"{new} may wrap around: {line_of(equation)}")
        surely = (x.low > 0) | (x.high < 0)
        return [Box(surely, ~((x.low == 0) & (x.high == 0)))]

    def difference(self, inputs: Sequence[Any], equation: Any) -> Sequence[Box]:
        left, right = map(box_of, inputs)
        return [Box(left.low - right.high, left.high - right.low)]

    def times(self, inputs: Sequence[Any], equation: Any) -> Sequence[Box]:
        left, right = map(box_of, inputs)
        ends = [a * b for a in (left.low, left.high) for b in (right.low, right.high)]
        return [Box(least(ends), most(ends))]

    def quotient(self, inputs: Sequence[Any], equation: Any) -> Sequence[Box]:
        """Without end where the denominator may be 0."""
        left, right = map(box_of, inputs)
        ends = [a / b for a in (left.low, left.high) for b in (right.low, right.high)]
        has_zero = (right.low <= 0) & (right.high >= 0)
        low = jnp.where(has_zero, -jnp.inf, least(ends))
        return [Box(low, jnp.where(has_zero, jnp.inf, most(ends)))]

    def product(self, inputs: Sequence[Any], equation: Any) -> Sequence[Box]:
        """By center and radius; bilinear where both factors are boxes."""
        left, right = map(box_of, inputs[:2])
        rest = list(inputs[2:])
        ask = lambda a, b: bound(equation, [a, b, *rest])[0]  # noqa: E731
        center = ask(left.center, right.center)
        parts = []  # products with the radius of a constant, which is 0, are left out
        if not left.is_point:
            parts.append(ask(left.radius, jnp.abs(right.center)))
        if not right.is_point:
            parts.append(ask(jnp.abs(left.center) + left.radius, right.radius))
        if not parts:
            return [Box(center, center)]
        radius = sum(parts[1:], parts[0])
        return [Box(center - radius, center + radius)]

    def absolute(self, inputs: Sequence[Any], equation: Any) -> Sequence[Box]:
        (x,) = inputs
        ends = [jnp.abs(x.low), jnp.abs(x.high)]
        has_zero = (x.low <= 0) & (x.high >= 0)
        return [Box(jnp.where(has_zero, 0, least(ends)), most(ends))]

    def even(self, inputs: Sequence[Any], equation: Any) -> Sequence[Box]:
        (x,) = self.absolute(inputs, equation)
        return self.rising([x], equation)

    def power(self, inputs: Sequence[Any], equation: Any) -> Sequence[Box]:
        y = equation.params["y"]
        if y < 0:
            raise ConfigError(f"a power of {y} may divide by zero: {line_of(equation)}")
        return self.rising(inputs, equation) if y % 2 else self.even(inputs, equation)

    def waves(self, inputs: Sequence[Any], equation: Any) -> Sequence[Box]:
        one = jnp.ones_like(inputs[0].low)
        return [Box(-one, one)]

    def compared(self, inputs: Sequence[Any], equation: Any) -> Sequence[Box]:
        left, right = map(box_of, inputs)
        ask = COMPARED[equation.primitive.name]
        is_greater = equation.primitive.name in ("gt", "ge")
        a, b = (left.low, right.high) if is_greater else (left.high, right.low)
        c, d = (left.high, right.low) if is_greater else (left.low, right.high)
        return [Box(ask(a, b), ask(c, d))]

    def unequal(self, inputs: Sequence[Any], equation: Any) -> Sequence[Box]:
        """A value is itself, so that what asks for NaN is told no."""
        left, right = map(box_of, inputs)
        surely = (left.high < right.low) | (left.low > right.high)
        if equation.invars[0] is equation.invars[1]:
            return [Box(jnp.zeros_like(surely), jnp.zeros_like(surely))]
        is_point = (left.low == left.high) & (right.low == right.high)
        return [Box(surely, ~(is_point & (left.low == right.low)))]

    def equal(self, inputs: Sequence[Any], equation: Any) -> Sequence[Box]:
        (found,) = self.unequal(inputs, equation)
        return [Box(~found.high, ~found.low)]

    def selected(self, inputs: Sequence[Any], equation: Any) -> Sequence[Box]:
        """What is surely selected; of what is not, both cases."""
        which, *cases = inputs
        if not isinstance(which, Box):
            ends = [bound(equation, [which, *(end(c, i) for c in cases)])[0] for i in (0, 1)]
            return [Box(*ends)]
        false, true = map(box_of, cases)
        low = jnp.where(which.low, true.low, least([true.low, false.low]))
        high = jnp.where(which.low, true.high, most([true.high, false.high]))
        return [Box(jnp.where(which.high, low, false.low), jnp.where(which.high, high, false.high))]

    def looked_up(self, inputs: Sequence[Any], equation: Any) -> Sequence[Box]:
        table, *places = inputs
        if any(isinstance(each, Box) for each in places):
            raise ConfigError(f"a place that the box may not decide: {line_of(equation)}")
        return self.rising([table, *places], equation)


def box_of(each: Any) -> Box:
    """A constant as a box of no width."""
    return each if isinstance(each, Box) else Box(each, each)


def is_truth(array: Any) -> bool:
    """Whether an array holds truths."""
    return jnp.issubdtype(jnp.result_type(array), jnp.bool_)


def end(each: Any, which: int) -> Any:
    """The lower end or the upper one; a constant is both."""
    return (each.low, each.high)[which] if isinstance(each, Box) else each


def least(ends: Sequence[Array]) -> Array:
    """The least of several arrays; 0 times infinity is no bound."""
    return jnp.min(jnp.stack(jnp.broadcast_arrays(*ends)), 0)


def most(ends: Sequence[Array]) -> Array:
    """The greatest of several arrays."""
    return jnp.max(jnp.stack(jnp.broadcast_arrays(*ends)), 0)


def interval_bounds(
    fn: Callable[[Array], Array], low: Float[Array, "*in"], high: Float[Array, "*in"]
) -> Box:
    """A box that holds what a function gives everywhere in a box; jitted, and under vmap.

    Args:
      fn: of one array to one array: a model, a part of one, anything of jax.
      low, high: ends of the box, low <= high.
    Raises:
      ConfigError: a primitive whose interval is not known, by name and line; ends of unequal shape,
        or a low one that is known and above its high one.

    >>> found = interval_bounds(lambda x: jnp.maximum(2 * x - 1, 0), jnp.zeros(1), jnp.ones(1))
    >>> found.low.tolist(), found.high.tolist()
    ([0.0], [1.0])
    """
    check_ends(low, high)
    closed = jax.make_jaxpr(fn)(low)
    (out,) = walk(Intervals(), closed.jaxpr, closed.consts, [Box(low, high)])
    return box_of(out)


def check_ends(low: ArrayLike, high: ArrayLike) -> None:
    """Raises ConfigError for ends of unequal shape, or that are known and hold nothing."""
    if np.shape(low) != np.shape(high):
        raise ConfigError(f"low {np.shape(low)} and high {np.shape(high)} must be of one shape")
    if is_known(low, high) and not (np.asarray(low) <= np.asarray(high)).all():
        raise ConfigError("low must not exceed high, and neither be NaN")
