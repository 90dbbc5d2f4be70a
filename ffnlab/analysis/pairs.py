"""Primitives for two inputs at once: x0, which decides, and z, which follows its decisions.

`ffnlab.analysis.linear_interpreter` says what follows how.
"""

from collections.abc import Callable, Collection, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ffnlab.analysis.walk import Meaning, Rule, bound, line_of
from ffnlab.errors import ConfigError

__all__ = ["Pairs", "Settled", "is_real", "z_of"]

# Primitives that are linear in all that follows the input, together.
LINEAR = frozenset(
    "add add_any sub neg reshape broadcast_in_dim transpose reduce_sum squeeze slice concatenate "
    "convert_element_type pad rev copy copy_p expand_dims reduce_window_sum cumsum real "
    "optimization_barrier split stop_gradient tile reduce_precision reshard mesh_cast stack".split()
)
ELEMENTWISE = frozenset(
    "abs add add_any and atan atan2 cbrt ceil clamp convert_element_type cos cosh copy div eq erf "
    "erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max "
    "min mul ne neg not or pow reduce_precision rem round rsqrt select_n sign sin sinh sqrt "
    "square sub tan tanh xor".split()
)
SHAPES = LINEAR - {"reduce_sum", "reduce_window_sum", "cumsum"}  # a frozen factor stays one
PRODUCTS = frozenset(("mul", "dot_general", "conv_general_dilated", "ragged_dot_general"))


class Pair:
    """What x0 gives at a place, and what follows of z there.

    `z` is computed when it is asked for. A pair that elementwise primitives made of one other, its
    origin, is a scalar function of that one's entries: `at_zero` is its value at 0, `slope` its
    derivative.

    Attributes:
      v: of x0.
      is_gate: whether it came through a nonlinearity: in a product it is the factor that is frozen.
      origin: what it is a function of, entry by entry; None where it stands for itself.
      at_zero, slope: see above.
    """

    def __init__(
        self,
        v: Any,
        z: Callable[[], Array],
        *,
        is_gate: bool = False,
        origin: "Pair | None" = None,
        at_zero: Array | None = None,
        slope: Array | None = None,
    ):
        self.v, self._z = v, z
        self._made: Array | None = None
        self.is_gate, self.origin, self.at_zero, self.slope = is_gate, origin, at_zero, slope

    @property
    def z(self) -> Array:
        """What follows of z."""
        made = self._made
        if made is None:
            made = self._made = self._z()
        return made


@jax.tree_util.register_pytree_node_class
class Settled(Pair):
    """A pair as two arrays; or, where z cannot follow, x0's alone and the reason."""

    def __init__(self, v: Any, z: Any, is_gate: bool, reason: str = ""):
        super().__init__(v, self.given, is_gate=is_gate)
        self._made, self.reason = z, reason

    def given(self) -> Array:
        """Nothing: z is there, or cannot be."""
        raise Unfollowed(self.reason)

    def tree_flatten(self) -> tuple[tuple, tuple]:
        return (self.v, self._made), (self.is_gate, self.reason)

    @classmethod
    def tree_unflatten(cls, fixed: tuple, leaves: tuple) -> "Settled":
        return cls(*leaves, *fixed)


class Unfollowed(ConfigError):
    """z would need to follow where it cannot."""


class Pairs(Meaning[Pair]):
    """Primitives for pairs."""

    kind = Pair

    def __init__(self, mode: str, frozen: Collection[str]):
        self.mode, self.frozen = mode, frozenset(frozen)
        rules: dict[str, Rule] = dict.fromkeys(LINEAR, self.linear)
        rules |= dict.fromkeys(PRODUCTS, self.product)
        rules |= dict.fromkeys(ELEMENTWISE - LINEAR - PRODUCTS, self.elementwise)
        rules |= dict.fromkeys(("max", "min"), self.extreme)
        rules |= dict.fromkeys(("gather", "dynamic_slice"), self.looked_up)
        rules |= dict.fromkeys(("reduce_max", "reduce_min"), self.greatest)
        rules |= dict.fromkeys(("argmax", "argmin", "reduce_and", "reduce_or"), self.decision)
        rules |= {"name": self.named, "div": self.quotient, "select_n": self.selected}
        rules |= {"reduce_window_max": self.greatest_in_windows, "top_k": self.chosen}
        self.rules = MappingProxyType(rules)

    # --- of the contract
    def constant(self, array: Array) -> Pair:
        return Settled(array, array, False)

    def settled(self, value: Pair) -> Pair:
        try:
            return Settled(value.v, value.z, value.is_gate)
        except Unfollowed as error:
            return Settled(value.v, None, value.is_gate, str(error))

    def alike(self, value: Pair, other: Pair) -> Pair:
        assert isinstance(value, Settled) and isinstance(other, Settled)
        reason = value.reason or other.reason
        z = None if reason else value._made
        return Settled(value.v, z, value.is_gate or other.is_gate, reason)

    def decided(self, value: Pair, equation: Any) -> Array:
        return value.v

    # --- rules
    def linear(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """Linear in all that follows; of one array's entries it is a scalar function too."""
        name = equation.primitive.name
        is_gate = name in SHAPES and all(each.is_gate for each in followed(inputs))
        found = self.by_parts(inputs, equation, is_gate=is_gate)
        return self.in_chain(found, inputs, equation) if name in ELEMENTWISE else found

    def in_chain(self, found: Sequence[Any], inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """The same, as part of the chain that its inputs are of, if they are of one."""
        chain = self.chained(inputs, equation)
        if chain is None or not isinstance(found[0], Pair):
            return chain or found
        (one,), (link,) = found, chain
        return [
            Pair(
                one.v,
                lambda: one.z,
                is_gate=one.is_gate,
                origin=link.origin,
                at_zero=link.at_zero,
                slope=link.slope,
            )
        ]

    def by_parts(self, inputs: Sequence[Any], equation: Any, *, is_gate: bool) -> Sequence[Any]:
        """The primitive of all v, and of all z."""
        values = bound(equation, [value_of(each) for each in inputs])
        made: list[Sequence[Any]] = []

        def following(i: int) -> Array:
            if not made:
                made.append(bound(equation, [z_of(each) for each in inputs]))
            return made[0][i]

        return [
            Pair(v, lambda i=i: following(i), is_gate=is_gate) if is_real(v) else v
            for i, v in enumerate(values)
        ]

    def elementwise(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """A function of the entries of one array; else of several, which cannot follow."""
        return self.chained(inputs, equation) or self.unfollowed(
            inputs, equation, "several arrays that follow the input"
        )

    def chained(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any] | None:
        """One more elementwise primitive of one origin and of constants without axes; None where
        there are several, or others: an array that is added is a bias, not part of a function."""
        origins = {id(each.origin or each): each.origin or each for each in followed(inputs)}
        if len(origins) > 1:
            return None
        (origin,) = origins.values()
        if any(not isinstance(each, Pair) and jnp.shape(each) for each in inputs):
            return None
        values = [value_of(each) for each in inputs]
        at_zero = [zero_of(each, origin) for each in inputs]
        (value,), (there,) = bound(equation, values), bound(equation, at_zero)
        slope = slope_of(equation, values, [own_slope(each, origin) for each in inputs])

        def z() -> Array:
            return self.followed_chain(origin, value, there, slope)

        return [Pair(value, z, is_gate=True, origin=origin, at_zero=there, slope=slope)]

    def followed_chain(self, origin: Pair, value: Array, there: Array, slope: Any) -> Array:
        """A scalar function's z, by its value, its value at 0 and its slope at x0."""
        if not is_real(value):
            raise Unfollowed("a comparison cannot follow the input")
        x = origin.v
        if self.mode == "tangent":
            return value + slope * (origin.z - x)
        start = there if self.mode == "secant" else jnp.zeros_like(there)
        # So near 0 that f(x0) - f(0) is rounding the secant is the tangent, which it tends to.
        least = jnp.finfo(value.dtype).eps ** 0.5 * jnp.abs(start)
        is_lost = jnp.maximum(jnp.abs(value - start), jnp.abs(slope * x)) <= least
        ratio = (value - start) / jnp.where(x == 0, 1, x)
        start = jnp.where(is_lost, value - slope * x, start)
        return start + jnp.where((x == 0) | is_lost, slope, ratio) * origin.z

    def product(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """Bilinear: one factor follows, the other is a constant or a gate."""
        name, both = equation.primitive.name, followed(inputs)
        if len(both) == 1:
            found = self.by_parts(inputs, equation, is_gate=name == "mul" and both[0].is_gate)
            return self.in_chain(found, inputs, equation) if name == "mul" else found
        found = self.chained(inputs, equation) if name == "mul" else None
        if found is not None:
            return found
        gates = [each for each in both if each.is_gate]
        if len(gates) != 1:
            why = "two factors that both follow the input"
            return self.unfollowed(inputs, equation, why)
        inputs = [each.v if each is gates[0] else each for each in inputs]
        return self.by_parts(inputs, equation, is_gate=name == "mul")

    def quotient(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """The denominator is frozen."""
        above, below = inputs
        if not isinstance(below, Pair):
            return self.linear(inputs, equation)
        found = self.chained(inputs, equation)
        if found is not None:
            return found
        if not isinstance(above, Pair):
            return self.elementwise(inputs, equation)
        return self.by_parts([above, below.v], equation, is_gate=above.is_gate)

    def extreme(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """The greater of two, or the lesser, as x0 has it; the first of equals."""
        found = self.chained(inputs, equation)
        if found is not None:
            return found
        left, right = (value_of(each) for each in inputs)
        is_greatest = equation.primitive.name == "max"
        is_first = left > right if is_greatest else left < right
        if isinstance(inputs[1], Pair):  # else the constant takes what is equal to it
            is_first |= left == right
        (value,) = bound(equation, [left, right])
        return [Pair(value, lambda: jnp.where(is_first, z_of(inputs[0]), z_of(inputs[1])))]

    def selected(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """What x0's predicate selects."""
        found = self.chained(inputs, equation)
        if found is not None:
            return found
        which, *cases = inputs
        if not followed(cases):
            return self.unfollowed(inputs, equation, "a choice between constants")
        gates = all(each.is_gate for each in followed(cases))
        return self.by_parts([value_of(which), *cases], equation, is_gate=gates)

    def looked_up(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """Linear in what is looked up; places are x0's."""
        table, *places = inputs
        places = [value_of(each) for each in places]
        if not isinstance(table, Pair):
            return bound(equation, [table, *places])
        return self.by_parts([table, *places], equation, is_gate=table.is_gate)

    def decision(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """Numbers and truths are x0's."""
        return bound(equation, [value_of(each) for each in inputs])

    def chosen(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """The greatest of x0, in z's place."""
        (x,) = inputs
        values, where = bound(equation, [x.v])
        axis = equation.params.get("axis", -1) % x.v.ndim
        return [
            Pair(values, lambda: jnp.take_along_axis(x.z, where, axis), is_gate=x.is_gate),
            where,
        ]

    def greatest(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """The entry that x0 took."""
        (x,), axes = inputs, equation.params["axes"]
        (value,) = bound(equation, [x.v])
        find = jnp.argmax if equation.primitive.name == "reduce_max" else jnp.argmin

        def z() -> Array:
            first, second = (behind(array, axes) for array in (x.v, x.z))
            where = find(first, axis=-1)[..., None]
            return jnp.take_along_axis(second, where, -1)[..., 0]

        return [Pair(value, z)]

    def greatest_in_windows(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """The entry that x0 took in each window."""
        (x,), params = inputs, equation.params
        (value,) = bound(equation, [x.v])
        names = "window_dimensions window_strides padding base_dilation window_dilation".split()

        def first(a: tuple, b: tuple) -> tuple:
            is_a = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] <= b[1]))
            return jnp.where(is_a, a[0], b[0]), jnp.where(is_a, a[1], b[1])

        def z() -> Array:
            places = jnp.arange(x.v.size, dtype=jnp.int32).reshape(x.v.shape)
            start = jnp.array(-jnp.inf, x.v.dtype), jnp.int32(x.v.size)
            window = [params[name] for name in names]
            _, where = jax.lax.reduce_window((x.v, places), start, first, *window)
            return x.z.reshape(-1)[where]

        return [Pair(value, z)]

    def named(self, inputs: Sequence[Any], equation: Any) -> Sequence[Any]:
        """`jax.ad_checkpoint.checkpoint_name`: frozen, if told so."""
        return [inputs[0].v if equation.params["name"] in self.frozen else inputs[0]]

    def unfollowed(self, inputs: Sequence[Any], equation: Any, why: str) -> Sequence[Any]:
        """Pairs that raise if z is asked for: a softmax of such scores is a gate, and is not."""
        values = bound(equation, [value_of(each) for each in inputs])
        name, line = equation.primitive.name, line_of(equation)

        def z() -> Array:
            raise Unfollowed(
                f"{name} of {why}: {line}; freeze one of them, "
                "checkpoint_name(value, 'gate') of jax.ad_checkpoint and frozen=('gate',)"
            )

        return [Pair(v, z) if is_real(v) else v for v in values]


def followed(inputs: Sequence[Any]) -> list[Pair]:
    """Those that follow the input."""
    return [each for each in inputs if isinstance(each, Pair)]


def value_of(each: Any) -> Any:
    """What x0 gives."""
    return each.v if isinstance(each, Pair) else each


def z_of(each: Any) -> Any:
    """What follows of z; a constant is itself."""
    return each.z if isinstance(each, Pair) else each


def zero_of(each: Any, origin: Pair) -> Any:
    """What an origin of 0 gives."""
    if not isinstance(each, Pair):
        return each
    return jnp.zeros_like(each.v) if each is origin else each.at_zero


def own_slope(each: Any, origin: Pair) -> Array | None:
    """The derivative by the origin; None of what has none."""
    if not isinstance(each, Pair):
        return None
    return jnp.ones_like(each.v) if each is origin else each.slope


def slope_of(equation: Any, values: Sequence[Any], slopes: Sequence[Any]) -> Array | None:
    """The derivative of an elementwise primitive along those of its inputs; from below where two
    are equal, of which it takes the greater or the lesser: relu has slope 0 at 0."""
    smooth = [i for i, slope in enumerate(slopes) if slope is not None and is_real(values[i])]
    given = list(values)

    def primitive(*inputs: Array) -> Array:
        for i, each in zip(smooth, inputs, strict=True):
            given[i] = each
        return bound(equation, given)[0]

    primals = [jnp.asarray(values[i]) for i in smooth]
    tangents = [jnp.broadcast_to(slopes[i], jnp.shape(values[i])) for i in smooth]
    if not smooth:
        out = bound(equation, values)[0]
        return jnp.zeros_like(out) if is_real(out) else None
    out, slope = jax.jvp(primitive, primals, tangents)
    if not is_real(out):
        return None
    if equation.primitive.name in ("max", "min"):
        (left, right), both = values, [0.0 if each is None else each for each in slopes]
        least = jnp.minimum if equation.primitive.name == "max" else jnp.maximum
        slope = jnp.where(left == right, least(*both), slope)
    return slope


def is_real(array: Any) -> bool:
    """Whether an array holds floating numbers."""
    return jnp.issubdtype(jnp.result_type(array), jnp.floating)


def behind(array: Array, axes: Sequence[int]) -> Array:
    """Some axes as one, after the others."""
    moved = jnp.moveaxis(array, axes, range(-len(axes), 0))
    return moved.reshape(*moved.shape[: -len(axes)], -1)
