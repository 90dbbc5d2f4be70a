"""The decorator behind the import hook: every annotation of the packages is checked at the call.

What jaxtyping puts around a function binds its arguments anew at each call and checks them twice; a
sixth of the suite's time went there. A function without shapes needs beartype alone, and one with
shapes beartype in a scope of its own for the names of axes. Only where that finds a wrong argument
jaxtyping's own decorator says so, with all shapes.
"""

import contextlib
import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

SLOW = jaxtyping.jaxtyped


class WrongArgumentError(Exception):
    """What beartype raises for an argument, until jaxtyping has said it better."""


PLAIN = BeartypeConf(violation_type=jaxtyping.TypeCheckError)
SHAPED = BeartypeConf(
    violation_type=jaxtyping.TypeCheckError, violation_param_type=WrongArgumentError
)


def has_shapes(annotation: Any) -> bool:
    """Whether names of axes are bound where a value is checked against it."""
    if type(annotation).__module__.startswith("jaxtyping"):
        return annotation is not jaxtyping.PyTree
    if isinstance(annotation, list | tuple):  # the parameters of a Callable
        return any(map(has_shapes, annotation))
    return any(map(has_shapes, typing.get_args(annotation)))


def has_names(annotation: Any) -> bool:
    """Whether a part is written as a string, which may name what only a type checker imports."""
    if isinstance(annotation, list | tuple):
        return any(map(has_names, annotation))
    parts = (
        () if type(annotation).__module__.startswith("jaxtyping") else typing.get_args(annotation)
    )
    return isinstance(annotation, str | typing.ForwardRef) or any(map(has_names, parts))


def checked(fn: Any = None, *, typechecker: object = None) -> Any:
    """Stands in the place of `jaxtyping.jaxtyped`.

    Args:
      fn: a function, a descriptor of one, or a dataclass.
      typechecker: what the hook names; beartype whatever it is.
    """
    if fn is None:
        return functools.partial(checked, typechecker=typechecker)
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn) and not hasattr(fn.__init__, "is_checked"):
            fn.__init__ = checked(fn.__init__)
        return fn
    if isinstance(fn, classmethod | staticmethod):
        return type(fn)(checked(fn.__func__))
    if isinstance(fn, property):
        parts = (fn.fget, fn.fset, fn.fdel)
        return property(*(part and checked(part) for part in parts))
    if not inspect.isfunction(fn) or any(map(has_names, fn.__annotations__.values())):
        return SLOW(fn, typechecker=beartype)
    if any(map(has_shapes, fn.__annotations__.values())):
        return scoped(fn)
    return beartype(conf=PLAIN)(fn)


def scoped(fn: Callable) -> Callable:
    """A function whose names of axes mean one size in each call."""
    fast, told = beartype(conf=SHAPED)(fn), SLOW(fn, typechecker=beartype)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        with contextlib.suppress(WrongArgumentError), SLOW("context"):
            return fast(*args, **kwargs)
        return told(*args, **kwargs)

    call.is_checked = True
    return call
