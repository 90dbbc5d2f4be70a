"""A function as the affine map that it is where it was looked at
(A Tour of Convolutional Networks Guided by Linear Interpreters, ICCV 2019, arXiv 1908.05168).

All decisions of units are frozen as an input x0 made them: what is left is affine,

    y = F(x0) z + r(x0),   exact at z = x0.

Two inputs go through the function together, x0 as ever and z by what x0 decided; nothing is stored.
Any function of jax can be interpreted (`ffnlab.analysis.walk`), with no table of activations. A
chain of elementwise primitives whose inputs are one array is a scalar function f of its entries:

    secant   f(z) is read as f(0) + z (f(x0) - f(0)) / x0         bounded, exact at x0; f'(0) where x0 = 0
    tangent  f(x0) + f'(x0) (z - x0)                              jax.linearize
    mask     z f(x0) / x0                                         the paper's; without bound near 0 if f(0) != 0,
                                                                  and not exact where x0 is 0

Of two factors that follow the input the one that came through a nonlinearity is frozen: gates,
attention patterns, the deviation in a norm (its mean is linear, and follows). Denominators are. A
maximum takes the entry that x0 took, the first of equals; what is chosen by numbers (top-k, routes,
comparisons) is chosen as x0 did.

What differs from the paper's LinearScope: norms follow the mean of z; biases are part of the map
they belong to, in r.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ffnlab.analysis.walk import Meaning, Rule, bound, line_of, walk
from ffnlab.errors import ConfigError, NumericalError, is_known

__all__ = ["MODES", "Interpreter", "interpret"]

MODES = ("secant", "tangent", "mask")

# Primitives that are linear in all that follows the input, together.
LINEAR = frozenset(
    "add add_any sub neg reshape broadcast_in_dim transpose reduce_sum squeeze slice concatenate "
    "convert_element_type pad rev copy copy_p expand_dims reduce_window_sum cumsum real "
    "optimization_barrier split stop_gradient tile reduce_precision reshard mesh_cast".split()
)
ELEMENTWISE = frozenset(
    "abs add add_any and atan atan2 cbrt ceil clamp convert_element_type cos cosh copy div eq erf erf_inv "
    "erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not "
    "or pow reduce_precision rem round rsqrt select_n sign sin sinh sqrt square sub tan tanh xor".split()
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
        self.v, self._z, self._made = v, z, None
        self.is_gate, self.origin, self.at_zero, self.slope = is_gate, origin, at_zero, slope

    @property
    def z(self) -> Array:
        """What follows of z."""
        if self._made is None:
            self._made = self._z()
        return self._made


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
        self.rules = MappingProxyType(
            rules
            | {
                "name": self.named,
                "div": self.quotient,
                "max": self.extreme,
                "min": self.extreme,
                "select_n": self.selected,
                "gather": self.looked_up,
                "dynamic_slice": self.looked_up,
                "reduce_max": self.greatest,
                "reduce_min": self.greatest,
                "reduce_window_max": self.greatest_in_windows,
                "argmax": self.decision,
                "argmin": self.decision,
                "reduce_and": self.decision,
                "reduce_or": self.decision,
                "top_k": self.chosen,
            }
        )

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

    def followed_chain(self, origin: Pair, value: Array, there: Array, slope: Array) -> Array:
        """A scalar function's z, by its value, its value at 0 and its slope at x0."""
        if not is_real(value):
            raise Unfollowed("a comparison cannot follow the input")
        x = origin.v
        if self.mode == "tangent":
            return value + slope * (origin.z - x)
        start = there if self.mode == "secant" else jnp.zeros_like(there)
        ratio = (value - start) / jnp.where(x == 0, 1, x)
        return start + jnp.where(x == 0, slope, ratio) * origin.z

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


def slope_of(equation: Any, values: Sequence[Any], slopes: Sequence[Array | None]) -> Array | None:
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Interpreter:
    """An affine map, `interpret`.

    A pytree: jitted functions take it, and `jax.vmap` over x0 gives one of many maps.

    Attributes:
      x0: what decided, [*in].
      consts: arrays that the function closes over.
      jaxpr: of the function (static).
      mode, frozen: see `interpret` (static).
    """

    x0: Any  # not typed as an array: jax puts other leaves in the place of one
    consts: list[Any]
    jaxpr: Any = dataclasses.field(metadata={"static": True})
    mode: str = dataclasses.field(metadata={"static": True})
    frozen: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def __call__(self, z: Float[Array, "*in"]) -> Float[Array, "*out"]:
        """F z + r.

        Raises:
          ConfigError: z has another shape.
        """
        if jnp.shape(z) != jnp.shape(self.x0):
            raise ConfigError(f"z has shape {jnp.shape(z)}, the input {jnp.shape(self.x0)}")
        z = jnp.asarray(z, self.x0.dtype)
        meaning = Pairs(self.mode, self.frozen)
        (out,) = walk(meaning, self.jaxpr, self.consts, [Settled(self.x0, z, False)])
        return z_of(out)

    @property
    def residual(self) -> Float[Array, "*out"]:
        """r: what is given for z = 0. The function of a zero input is another thing."""
        return self(jnp.zeros_like(self.x0))

    def matvec(self, v: Float[Array, "*in"]) -> Float[Array, "*out"]:
        """F v; of a unit vector a column: where that entry of the input goes."""
        zero = jnp.zeros_like(self.x0)
        return jax.jvp(self, (zero,), (jnp.asarray(v, zero.dtype),))[1]

    def rmatvec(self, u: Float[Array, "*out"]) -> Float[Array, "*in"]:
        """F' u; of a unit vector a row: what that output looks at."""
        out = jax.eval_shape(self, self.x0)
        if jnp.shape(u) != out.shape:
            raise ConfigError(f"u has shape {jnp.shape(u)}, the output {out.shape}")
        (found,) = jax.linear_transpose(self.matvec, self.x0)(jnp.asarray(u, out.dtype))
        return found


def interpret(
    fn: Callable[[Array], Array],
    x0: Array,
    *,
    mode: str = "secant",
    frozen: Sequence[str] = (),
) -> Interpreter:
    """A function as the affine map that x0's decisions leave of it.

    Args:
      fn: of one array to one array, both floating: a model or a part of one, logits rather than
        probabilities. What it draws by a key it closes over is the same for all z.
      x0: what decides, [*in] floating.
      mode: of elementwise nonlinearities, one of `MODES`.
      frozen: names (`jax.ad_checkpoint.checkpoint_name`) of values in `fn` that stay as x0 has
        them.
    Returns:
      the map; it is exact at x0 in every mode but "mask", there where no nonlinearity is given 0.
    Raises:
      ConfigError: another mode, x0 of integers, more than one array, or a primitive that cannot be
        interpreted, by name and line.
      NumericalError: x0 has NaN or infinity.

    >>> at = interpret(lambda x: jnp.maximum(jnp.array([[1.0, 2.0]]) @ x - 1, 0), jnp.ones(2))
    >>> at.residual.tolist(), at.rmatvec(jnp.ones(1)).tolist()
    ([-1.0], [1.0, 2.0])
    """
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r} is not one of {MODES}")
    if not is_real(x0):
        raise ConfigError(
            f"x0 is {jnp.result_type(x0)}; floating inputs are accepted. Of tokens, interpret what "
            "follows their embeddings"
        )
    if is_known(x0) and not np.isfinite(x0).all():
        raise NumericalError("x0 has NaN or infinity")
    x0 = jnp.asarray(x0)
    closed = jax.make_jaxpr(fn)(x0)
    outs = closed.out_avals
    if len(outs) != 1 or not jnp.issubdtype(outs[0].dtype, jnp.floating):
        raise ConfigError(f"fn gives {outs}; one floating array is accepted")
    made = Interpreter(x0, list(closed.consts), closed.jaxpr, mode, tuple(frozen))
    jax.eval_shape(made, x0)  # raises for what cannot be interpreted
    return made
