"""A hypernetwork for any module: it gives the module's weights, and it alone is trained.

    Theta = H(c; Phi),   y = F(x; Theta),   Phi <- Phi - rate * (dTheta / dPhi)^T dL / dTheta

Source: Chauhan et al., A brief review of hypernetworks in deep learning, arXiv 2306.06955. Chunks
and embeddings of pieces as in von Oswald et al., arXiv 1906.00695. What differs from the review's
code (HyperITE): a call of "component_wise" is cut to its component, so that no array lies across
two calls; biases are vectors.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers import Embedding, Linear, Statistic
from ffnlab.models.hypernet import generator
from ffnlab.models.hypernet.frame import Frame, Pieces, gates_of, pieces_of
from ffnlab.models.hypernet.inputs import (
    Condition,
    Task,
    Tasked,
    check_inputs,
    check_task,
    features,
)
from ffnlab.models.hypernet.spec import HypernetSpec
from ffnlab.models.hypernet.targets import (
    TARGETS,
    Start,
    TargetConfig,
    check_target,
    config_of,
    drawn,
    frame_of,
    start_of,
    start_with,
)
from ffnlab.options import BY_KIND
from ffnlab.weights import Dense

__all__ = ["Hypernet", "HypernetConfig"]

EXAMPLES = 64  # of inputs, of which the last map is drawn
OPEN = 2.0  # what decides of a channel begins at, of about +-1: most are there


@dataclasses.dataclass(frozen=True)
class HypernetConfig:
    """A hypernetwork for a model of a kind.

    Attributes:
      target: configuration of the model; in a training file its `kind` says of which.
      spec: what the hypernetwork is.
    """

    target: TargetConfig = dataclasses.field(metadata={BY_KIND: TARGETS})
    spec: HypernetSpec = HypernetSpec()

    def __post_init__(self) -> None:
        check_target(self.target)

    def make(self, *, key: Array, dtype: DTypeLike = jnp.float32) -> "Hypernet":
        """A hypernetwork, drawn; its target too, which it begins with where it has no inputs."""
        mine, theirs = jax.random.split(key)
        target, start = drawn(self.target, key=theirs), start_with(self.target, self.spec.init)
        net = Hypernet(self.spec, target, key=mine, start=start)
        trained, fixed = tree.trained(net)
        return tree.combine(jax.tree.map(lambda leaf: leaf.astype(dtype), trained), fixed)


class Hypernet(nnx.Module):
    """The weights of a target from tasks, data or noise.

    Attributes:
      tasks: Embedding of tasks, or of each pair of a task and a piece; None without tasks.
      pieces: Embedding of pieces, or None.
      trunk, heads: see `ffnlab.models.hypernet.generator`.
      gates: Linear from the inputs to what decides which channels are there, or None.
      kept: nnx.List of Statistic, arrays of the target that are not generated.
      spec: HypernetSpec (static).
      config: HypernetConfig where the target is of a kind that has one, else None (static).
      frame: of a target without a configuration, else None (static).
      offsets: of each generated array what is added to all of it (static).
    """

    tasks: Any
    pieces: Any
    trunk: Any
    heads: Any
    gates: Any

    def __init__(
        self, spec: HypernetSpec, target: nnx.Module, *, key: Array, start: Start | None = None
    ):
        """Draws the hypernetwork.

        Args:
          spec: what it is.
          target: any module with floating arrays; only its structure, its constants (biases,
            scales of norms) and its statistics are taken, and its weights where `spec.inputs` is
            (): generation begins there.
          key: of the draw.
          start: what of the target's values is looked at, where it is known beforehand.
        Raises:
          ConfigError: the target has codes or counters, nothing to generate, or values that are
            not known because a function is traced.
        """
        self.spec, self.config = spec, None
        if (known := config_of(target)) is not None:
            self.config = HypernetConfig(known, spec)
        frame = Frame.of(target)
        self.frame = frame if self.config is None else None
        start = start_of(target, spec.init) if start is None else start
        self.offsets = start.offsets
        self.kept = nnx.List([Statistic(leaf) for leaf in statistics(target, frame)])
        keys, pieces = jax.random.split(key, 6), pieces_of(spec, frame)
        rows = spec.tasks * (1 if spec.shared else pieces.count)
        self.tasks = nnx.data(
            embedded(rows, spec.embedding, keys[0]) if "task" in spec.inputs else None
        )
        is_paired = spec.in_pieces and spec.shared
        self.pieces = nnx.data(
            embedded(pieces.count, spec.embedding, keys[1]) if is_paired else None
        )
        self.trunk = nnx.data(generator.draw_trunk(spec, key=keys[2]))
        wanted = generator.wanted_variances(pieces.source, start.of_numbers(frame))
        self.heads = generator.draw_heads(spec, self.examples(keys[3]), wanted, key=keys[4])
        self.gates = nnx.data(None)
        if spec.output_variability == "dynamic":
            count, width = gates_of(frame, spec.optional)[0], spec.condition
            self.gates = Linear(width, count, key=keys[5], axes=generator.LAST, bias=True)
            self.gates.b.set_value(jnp.full(count, OPEN))
        if not spec.width:  # weights that depend on nothing are those of the target
            self.heads.b.set_value(raveled(target) - offset_of(self.offsets, frame))

    def examples(self, key: Array) -> Float[Array, "n K H"]:
        """What the trunk gives for all tasks, or `EXAMPLES` of them, with drawn data and noise."""
        spec = self.spec
        is_drawn = bool(spec.data + spec.noise)
        count = EXAMPLES if is_drawn else min(spec.tasks, EXAMPLES)
        drawn = jax.random.normal(key, (count, spec.data + spec.noise))
        ids = jnp.arange(count) % spec.tasks

        def one(task: Array, drawn: Array) -> Array:
            given = {"data": drawn[: spec.data], "noise": drawn[spec.data :]}
            mine = {name: value for name, value in given.items() if name in spec.inputs}
            where = {"task": task} if "task" in spec.inputs else {}
            return self.calls(Condition(**where, **mine))

        rows = jax.vmap(one)(ids, drawn)
        return jax.vmap(lambda u: generator.run_trunk(spec, self.trunk, u))(rows)

    @property
    def layout(self) -> Frame:
        """Where which array of the target is."""
        return frame_of(self.config.target) if self.frame is None else self.frame

    @property
    def parts(self) -> Pieces:
        """The pieces that the weights come in."""
        return pieces_of(self.spec, self.layout)

    def condition(self, inputs: Condition) -> Float[Array, "c"]:
        """The inputs side by side: the task's embedding, data, noise.

        Raises:
          ValueError: another input than the spec has, of another width, or an unknown task.
        """
        check_inputs(self.spec, inputs)
        given = []
        if "task" in self.spec.inputs and self.spec.shared:
            given.append(row_of(self.tasks, inputs.task))
        given += [part for part in (inputs.data, inputs.noise) if part is not None]
        return jnp.concatenate([jnp.asarray(part) for part in given] or [jnp.zeros(0)])

    def calls(self, inputs: Condition) -> Float[Array, "K E"]:
        """What each call reads."""
        given = self.condition(inputs)
        if not self.spec.in_pieces:
            return given[None]
        if not self.spec.shared:
            by_task = self.tasks.weight.dense().reshape(self.spec.tasks, -1, self.spec.embedding)
            return jnp.take(by_task, jnp.asarray(inputs.task), axis=0, mode="fill")
        table = self.pieces.weight.dense()
        return jnp.concatenate([jnp.broadcast_to(given, (len(table), len(given))), table], axis=1)

    def come(self, inputs: Condition) -> Float[Array, "K S"]:
        """The pieces as they come, before they are joined and cut."""
        h = generator.run_trunk(self.spec, self.trunk, self.calls(inputs))
        return generator.pieces_from(self.spec, self.heads, h)

    def vector(self, inputs: Condition | Task) -> Float[Array, "P"]:
        """The target's weights in a row, in the order of `jax.flatten_util.ravel_pytree`.

        Args:
          inputs: those that the spec has; a number stands for a task alone.
        Raises:
          ValueError: as `condition`.
        """
        inputs = inputs if isinstance(inputs, Condition) else Condition(task=inputs)
        found = self.parts.joined(self.come(inputs))
        found = found + offset_of(self.offsets, self.layout).astype(found.dtype)
        if self.gates is None:
            return found
        count, channel = gates_of(self.layout, self.spec.optional)
        return found * jnp.append(self.present(inputs), 1.0).astype(found.dtype)[channel]

    def present(self, inputs: Condition | Task) -> Float[Array, "G"]:
        """1 for each channel that is there and 0 for each that is not.

        The gradient is that of a sigmoid (straight-through).

        Raises:
          ConfigError: all channels always are.
        """
        if self.gates is None:
            raise ConfigError("output_variability='static': every channel is there")
        inputs = inputs if isinstance(inputs, Condition) else Condition(task=inputs)
        given = self.condition(inputs) if self.spec.shared else self.calls(inputs).mean(0)
        score = self.gates(given)
        soft = jax.nn.sigmoid(score)
        return soft + jax.lax.stop_gradient((score > 0) - soft)

    def make(self, inputs: Condition | Task) -> Any:
        """The target with the weights that are generated: a module of its type.

        Args:
          inputs: see `vector`.
        """
        return self.build(self.vector(inputs))

    def build(self, vector: Float[Array, "P"]) -> Any:
        """The target with these weights."""
        return self.layout.build(vector, [statistic.get_value() for statistic in self.kept])

    def cached(self) -> Any:
        """The targets of all tasks in one, each leaf [tasks, …]: generated once, to be kept.

        Raises:
          ConfigError: inputs are dynamic, or not of tasks.
        """
        spec = self.spec
        if spec.input_variability != "static" or "task" not in spec.inputs:
            raise ConfigError(
                f"inputs={spec.inputs}, input_variability={spec.input_variability!r}: only static "
                "inputs of tasks are known beforehand"
            )
        each = [generate(self, jnp.int32(task)) for task in range(spec.tasks)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    def __call__(self, x: PyTree, task: Task | None = None, *, key: Array | None = None) -> PyTree:
        """The target's output.

        Static inputs make one target for all of x, dynamic ones one for each example: its task,
        its own features (x in a row) and noise of its own.

        Args:
          x: what the target is called with, leaves [b, …], or `Tasked`.
          task: [], or [b] of dynamic inputs; 0 where there is one task.
          key: of the noise; 0, its mean, when None.
        Raises:
          ValueError: no task where there are several, or one for each example of static inputs;
            or as `condition`.
        """
        x, task = (x.x, x.task) if isinstance(x, Tasked) else (x, task)
        spec = self.spec
        if "task" in spec.inputs and task is None:
            if spec.tasks > 1:
                raise ValueError(f"task: which of the {spec.tasks} tasks x is of must be told")
            task = 0
        given = {}
        if task is not None:
            check_task(spec, task)
            given["task"] = jnp.asarray(task)
        if spec.input_variability == "static":
            if task is not None and np.ndim(task):
                raise ValueError(
                    f"task has shape {np.shape(task)}: static inputs are of one task for all of x; "
                    "input_variability='dynamic' takes one for each"
                )
            return self.make(Condition(**given))(x)
        count = rows_of(x)
        for name, value in given.items():
            if np.shape(value) not in ((), (count,)):
                raise ValueError(
                    f"{name} has shape {np.shape(value)}: one for all of x, or one for each of its "
                    f"{count} examples, is accepted"
                )
        each = {name: jnp.broadcast_to(value, (count,)) for name, value in given.items()}
        if spec.data:
            each["data"] = features(x, spec.data)
        if spec.noise:
            shape = (count, spec.noise)
            each["noise"] = jnp.zeros(shape) if key is None else jax.random.normal(key, shape)

        def one(inputs: dict[str, Array], row: PyTree) -> PyTree:
            y = self.make(Condition(**inputs))(jax.tree.map(lambda leaf: leaf[None], row))
            return jax.tree.map(lambda leaf: leaf[0], y)

        return jax.vmap(one)(each, x)


def rows_of(x: PyTree) -> int:
    """How many examples there are; ValueError where x has none to count."""
    leaves = jax.tree.leaves(x)
    if not leaves or not np.ndim(leaves[0]):
        raise ValueError(f"x is a {type(x).__name__} without examples; leaves [b, …] are accepted")
    return len(leaves[0])


@jax.jit
def generate(net: Hypernet, task: Array) -> Any:
    """The target of a task: one program for all, so that what is generated again has its bits."""
    return net.make(task)


def embedded(rows: int, width: int, key: Array) -> Embedding:
    """Embeddings of mean square 1."""
    found = Embedding(rows, width, key=key)
    found.w.set_value(Dense(generator.table(rows, width, key=key)))
    return found


def row_of(table: Embedding, task: Task) -> Float[Array, "e"]:
    """The embedding of a task; NaN of an unknown one that is traced."""
    rows = table.weight.dense()
    return jnp.take(rows, jnp.asarray(task), axis=0, mode="fill")


def statistics(target: nnx.Module, frame: Frame) -> list[Array]:
    """The arrays of a target that are not generated."""
    pairs = zip(jax.tree.leaves(target), frame.arrays, strict=True)
    return [leaf for leaf, about in pairs if not about.generated]


def raveled(target: nnx.Module) -> Float[Array, "P"]:
    """The generated arrays of a target in a row."""
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree.trained(target)[0])])


def offset_of(offsets: tuple[float, ...], frame: Frame) -> Array:
    """What is added to what is generated, [P], or [] where that is 0."""
    if not any(offsets):
        return jnp.zeros(())
    pairs = zip(offsets, frame.generated, strict=True)
    return jnp.concatenate([jnp.full(leaf.size, offset) for offset, leaf in pairs])
