"""What a hypernetwork is given, and how it is checked."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ffnlab.errors import is_known
from ffnlab.models.hypernet.spec import HypernetSpec

__all__ = ["Condition", "Task", "Tasked", "check_inputs", "check_task", "features"]

Task = Int[Array, "*b"] | Int[np.ndarray, "*b"] | np.integer | int


class Condition(NamedTuple):
    """What a hypernetwork reads; the inputs that its spec has, the others None.

    Attributes:
      task: [] number of the task, from 0.
      data: [d] features.
      noise: [z] drawn from N(0, 1).
    """

    task: Task | None = None
    data: Float[Array, "d"] | Float[np.ndarray, "d"] | None = None
    noise: Float[Array, "z"] | Float[np.ndarray, "z"] | None = None


class Tasked(NamedTuple):
    """Inputs of a target, and the task that they are of.

    Attributes:
      x: a tree of arrays [b, …].
      task: [], or [b] of a hypernetwork with dynamic inputs.
    """

    x: PyTree
    task: Task


def check_task(spec: HypernetSpec, task: Task) -> None:
    """Looks at the number of a task, or at several.

    Raises:
      ValueError: it is no whole number, or is known and there is no such task.
    """
    dtype = task.dtype if hasattr(task, "dtype") else np.asarray(task).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"task={task}: tasks 0 to {spec.tasks - 1} are whole numbers")
    if is_known(task) and np.size(task):
        numbers = np.asarray(task)  # of jax, its minimum would be traced where a function is
        low, high = int(numbers.min()), int(numbers.max())
        if not 0 <= low <= high < spec.tasks:
            raise ValueError(f"task={task}: there are tasks 0 to {spec.tasks - 1}")


def check_inputs(spec: HypernetSpec, inputs: Condition) -> None:
    """Raises ValueError for other inputs than a hypernetwork has."""
    there = tuple(name for name, value in inputs._asdict().items() if value is not None)
    if {*there} != {*spec.inputs}:
        raise ValueError(f"inputs={there} are given; this hypernetwork reads {spec.inputs}")
    if inputs.task is not None:
        check_task(spec, inputs.task)
    for name, shape in (("task", ()), ("data", (spec.data,)), ("noise", (spec.noise,))):
        value = getattr(inputs, name)
        if value is not None and np.shape(value) != shape:
            raise ValueError(f"{name} has shape {np.shape(value)}, {shape} is accepted")


def features(x: PyTree, width: int) -> Float[Array, "b d"]:
    """Examples as rows of numbers.

    Raises:
      ValueError: they have another number of them, or are no array of floats.
    """
    is_array = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
    if not is_array or math.prod(x.shape[1:]) != width:
        what = f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else type(x).__name__
        raise ValueError(f"x is {what}; data={width} needs {width} floats in each example")
    return jnp.asarray(x).reshape(len(x), width)
