"""Evaluates a function with another meaning of its primitives.

A function is traced once to a jaxpr. What does not depend on the input is computed as ever; each
primitive that does is looked up in the table of a `Meaning`, whose values may be anything: pairs of
arrays (`ffnlab.analysis.linear_interpreter`), intervals. Calls, jit, custom derivatives and remat
are entered, loops (scan) and conditions too: a loop stays one.
"""

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax
from jax.extend import core, source_info_util
from jaxtyping import Array

from ffnlab.compat import scan_groups
from ffnlab.errors import ConfigError

__all__ = ["Meaning", "Rule", "line_of", "walk"]

V = TypeVar("V")
CALLS = frozenset(
    "pjit jit closed_call core_call custom_jvp_call custom_vjp_call custom_lin remat remat2 "
    "checkpoint".split()
)

# (values or arrays, an equation) -> what it gives, one for each of its outputs.
Rule = Callable[[Sequence[Any], Any], Sequence[Any]]


class Meaning(abc.ABC, Generic[V]):
    """What primitives mean for values that follow an input.

    Attributes:
      kind: the class of such values, a pytree of arrays with a leading axis in a loop; everything
        else is an array.
      rules: of primitives by name. A rule is asked only if one of its inputs follows.
    """

    kind: type[V]
    rules: Mapping[str, Rule]

    @abc.abstractmethod
    def constant(self, array: Array) -> V:
        """What follows nothing, where a loop needs a value that does."""

    @abc.abstractmethod
    def settled(self, value: V) -> V:
        """The same value as it goes into and out of a loop or a branch."""

    @abc.abstractmethod
    def alike(self, value: V, other: V) -> V:
        """`value` with the structure that both can have."""

    @abc.abstractmethod
    def decided(self, value: V, equation: Any) -> Array:
        """Which branch of a condition is taken.

        Raises:
          ConfigError: the meaning does not say.
        """


def walk(meaning: Meaning[V], jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr by the meaning of its primitives.

    Args:
      meaning: of primitives.
      jaxpr: an open one (`jax.make_jaxpr(fn)(x).jaxpr`).
      consts: of its constants.
      args: arrays and values, one for each of its inputs.
    Raises:
      ConfigError: a primitive that follows the input has no rule; names it and its line.
    """
    env: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        env.update(zip(equation.outvars, evaluated(meaning, equation, inputs), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def evaluated(meaning: Meaning[V], equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """What one equation gives."""
    name = equation.primitive.name
    if name in CALLS:
        inner, consts = opened(equation.params)
        return walk(meaning, inner, consts, inputs)
    if not any(isinstance(each, meaning.kind) for each in inputs):
        return bound(equation, inputs)
    if name == "scan":
        return looped(meaning, equation, inputs)
    if name == "cond":
        return branched(meaning, equation, inputs)
    rule = meaning.rules.get(name)
    if rule is None:
        raise ConfigError(
            f"nothing is known of {name!r}, which follows the input: {line_of(equation)}"
        )
    return rule(inputs, equation)


def opened(params: Mapping[str, Any]) -> tuple[Any, Sequence[Any]]:
    """(open jaxpr, constants) of an equation that calls one."""
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    return (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())


def bound(equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """An equation's outputs as ever, of arrays."""
    found = equation.primitive.bind(*inputs, **equation.params)
    return found if equation.primitive.multiple_results else [found]


def line_of(equation: Any) -> str:
    """Where an equation is from: file, line and function."""
    return source_info_util.summarize(equation.source_info)


def looped(meaning: Meaning[V], equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """A scan. What it carries follows the input if it does so after some turn."""
    params = equation.params
    inner, constants = opened(params)
    consts, carried = scan_groups(params)
    inputs = [settled(meaning, each) for each in inputs]
    fixed, carry, xs = (
        inputs[:consts],
        inputs[consts : consts + carried],
        inputs[consts + carried :],
    )

    def turn(carry: Sequence[Any], xs: Sequence[Any]) -> tuple[list, list]:
        found = walk(meaning, inner, constants, [*fixed, *carry, *xs])
        return halves([settled(meaning, each) for each in found], carried)

    one = [jax.tree.map(lambda leaf: leaf[0], each) for each in xs]
    while True:  # ends: what follows once stays so
        after, _ = jax.eval_shape(turn, carry, one)
        wanted = common(meaning, carry, after)
        if jax.tree.structure(wanted) == jax.tree.structure(carry):
            break
        carry = wanted

    def step(carry: Sequence[Any], xs: Sequence[Any]) -> tuple[list, list]:
        after, ys = turn(carry, xs)
        return common(meaning, after, carry), ys

    options = {key: params[key] for key in ("length", "reverse", "unroll")}
    last, ys = jax.lax.scan(step, carry, list(xs), **options)
    return [*last, *ys]


def branched(meaning: Meaning[V], equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """A condition: the branch that is taken, by an index that follows nothing."""
    index, *operands = inputs
    if isinstance(index, meaning.kind):
        index = meaning.decided(index, equation)
    operands = [settled(meaning, each) for each in operands]

    def branch(closed: Any, *operands: Any) -> list[Any]:
        found = walk(meaning, closed.jaxpr, closed.consts, operands)
        return [settled(meaning, each) for each in found]

    branches = [functools.partial(branch, closed) for closed in equation.params["branches"]]
    wanted = jax.eval_shape(branches[0], *operands)
    for other in branches[1:]:
        wanted = common(meaning, wanted, jax.eval_shape(other, *operands))
    alike = [lambda *operands, run=run: common(meaning, run(*operands), wanted) for run in branches]
    return jax.lax.switch(index, alike, *operands)


def halves(values: list, count: int) -> tuple[list, list]:
    """The first ones, and the others."""
    return values[:count], values[count:]


def settled(meaning: Meaning[V], each: Any) -> Any:
    """A value as it goes into a loop; an array as it is."""
    return meaning.settled(each) if isinstance(each, meaning.kind) else each


def common(meaning: Meaning[V], values: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """`values`, each with the structure that it and its other can have."""

    def one(value: Any, other: Any) -> Any:
        if not isinstance(other, meaning.kind):
            return value
        if not isinstance(value, meaning.kind):
            value = meaning.settled(meaning.constant(value))
        return meaning.alike(value, other)

    return [one(value, other) for value, other in zip(values, others, strict=True)]
