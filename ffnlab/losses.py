"""Losses: what a batch costs a model, for any rule that follows one.

A loss is `(model, batch) -> (mean, metrics)`. `mean` is what is minimized, float32, and metrics are
scalars by name, means over what is counted; where rows count for unequal amounts,
`metrics["count"]` says for how much the rows it was given count, so that parts of a batch add up
to the batch. A loss that needs the step or draws something is `(model, batch, moment)`; one whose
model measures something returns a third item, `{path: new statistic}`, paths as `ffnlab.tree`
names them.

    def loss(model, batch, moment):
        logits, mean, variance = model(batch[0], key=moment.key)
        return *labelled(lambda _: logits, batch), {"norm.mean": mean, "norm.variance": variance}
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError, is_known
from ffnlab.layers.balance import upkeep
from ffnlab.layers.batch_norm import BatchNorm, measured
from ffnlab.layers.exchange import loads
from ffnlab.layers.routers import Routing
from ffnlab.models.noise import denoising
from ffnlab.models.watching import watched
from ffnlab.rule import Metrics

__all__ = [
    "InformedLoss",
    "Loss",
    "Moment",
    "PackedRows",
    "Taught",
    "Unsettled",
    "denoising",
    "distillation",
    "distilled",
    "labelled",
    "masked",
    "measuring",
    "next_token",
    "packed_next_token",
    "routed",
    "span",
]

Host = Array | np.ndarray
Costs = tuple[Float[Array, ""], Metrics]
MeasuredCosts = tuple[Float[Array, ""], Metrics, Mapping[str, PyTree]]
Loss = Callable[[PyTree, PyTree], Costs | MeasuredCosts]


class Moment(NamedTuple):
    """When a loss is asked: what schedules and draws inside it depend on.

    Attributes:
      step: [] int32, steps taken before this one.
      key: of this step's draws, and of this part's where a batch is taken in parts.
    """

    step: Int[Array, ""]
    key: Array


@runtime_checkable
class Unsettled(Protocol):
    """A statistic that is no mean over rows, a variance say, in terms of means that are.

    It is a pytree whose arrays are means over the rows a loss was given, so that those of parts
    average to those of the batch; the statistic is made of them once, when the step is over.

        @ffnlab.weights.register
        @dataclasses.dataclass(frozen=True)
        class Variance:
            mean: Array; square: Array        # of x and of x^2
            def settle(self, parts): return self.square - self.mean**2
    """

    def settle(self, parts: int) -> Array:
        """The new statistic, when the rows of so many parts have been averaged."""
        ...


InformedLoss = Callable[[PyTree, PyTree, Moment], Costs | MeasuredCosts]


@runtime_checkable
class PackedRows(Protocol):
    """Rows of several documents each (`ffnlab.data.Packed`); iterates over its three arrays."""

    @property
    def tokens(self) -> Int[Host, "b t"]:
        """Token ids."""
        ...

    @property
    def segments(self) -> Int[Host, "b t"]:
        """1 for a row's first document, 2 for the next, …; 0 for none."""
        ...

    @property
    def positions(self) -> Int[Host, "b t"]:
        """Positions in the document."""
        ...


def next_token(
    model: Callable, batch: Int[Host, "b t"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean cross-entropy of every token given those before it in its row.

    Args:
      model: tokens [b, t - 1] -> logits [b, t - 1, v].
      batch: token ids, [b, t], t >= 2.
    Returns:
      (nats per token [], {"bits": bits per token []}).
    """
    logits = model(batch[:, :-1]).astype(jnp.float32)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()
    return nats, {"bits": nats / math.log(2)}


def packed_next_token(
    model: Callable, batch: PackedRows
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross-entropy of every token given those before it in its document.

    The first token of a document is not predicted, and tokens see their own document only.

    Args:
      model: (tokens [b, t - 1], positions=, segments=) -> logits [b, t - 1, v].
      batch: rows of t >= 2 tokens (`ffnlab.data.PackedBatches`).
    Returns:
      (nats per predicted token [], {"bits": bits per predicted token [], "count": predicted tokens
      []}); 0 where none is.
    """
    tokens, segments, positions = batch.tokens, batch.segments, batch.positions
    inputs = {"positions": positions[:, :-1], "segments": segments[:, :-1]}
    logits = model(tokens[:, :-1], **inputs).astype(jnp.float32)
    counted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    mean, count = mean_of(nats, counted)
    return mean, {"bits": mean / math.log(2), "count": count}


def routed(
    loss: Loss = next_token,
    *,
    balance: float = 1e-2,
    z: float = 0.0,
    choices: int | None = None,
    per_sequence: bool = False,
    keyed: bool = False,
) -> Loss | InformedLoss:
    """A loss of a model that routes tokens, with what keeps its routers in order.

        loss + balance * load_balance + z * z_loss        (`ffnlab.layers.balance`)

    Args:
      loss: of a model's call; its metrics gain those of `upkeep` and `exchange.loads`.
      balance: weight of the load balance, which is 1 where experts are used alike, >= 0.
      z: weight of the mean squared log-norm of the router's logits, >= 0.
      choices, per_sequence: see `ffnlab.layers.balance.load_balance`.
      keyed: the loss is informed, and every layer is given a key for what its router draws.
    Returns:
      a loss of a model as `ffnlab.models.watching.watched` takes it.
    Raises:
      ConfigError: a weight below 0; from the loss, no layer reports a routing.
    """
    if not (balance >= 0 and z >= 0):
        raise ConfigError(f"balance={balance} and z={z} must be 0 or more")

    def whole(model: PyTree, batch: PyTree, key: Array | None = None) -> Costs:
        seen: list[Routing] = []
        total, metrics = loss(watched(model, seen, key), batch)[:2]
        told = upkeep(seen, choices=choices, per_sequence=per_sequence) | loads(seen)
        return total + balance * told["balance"] + z * told["z"], {**metrics, **told}

    informed = lambda model, batch, moment: whole(model, batch, moment.key)  # noqa: E731
    return informed if keyed else lambda model, batch: whole(model, batch)


def labelled(
    model: Callable, batch: tuple[PyTree, Int[Host, "b"] | Float[Host, "b c"]]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean cross-entropy of labelled inputs.

    Args:
      model: inputs -> logits [b, classes].
      batch: inputs (an array [b, …], or a tree of them) and their classes [b]
        (`ffnlab.data.Labelled`), or rows [b, classes] of the share of each class.
    Returns:
      (nats per input [], {"accuracy": fraction whose (largest) class has the largest logit []}).
    """
    logits, classes = model(batch[0]).astype(jnp.float32), batch[1]
    if jnp.ndim(classes) == 2:
        each = optax.softmax_cross_entropy(logits, jnp.asarray(classes, jnp.float32))
        classes = jnp.argmax(classes, -1)
    else:
        each = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
    return each.mean(), {"accuracy": jnp.mean(logits.argmax(-1) == classes)}


def measuring(loss: Loss) -> Loss:
    """A loss whose model's batch norms use and move by the moments of the batch.

    Its third item are their statistics (`ffnlab.layers.measured`), where a model has some. The loss
    calls its model once.

    >>> from ffnlab.layers import ConvNorm
    >>> loss, net = measuring(lambda m, x: (m(x).mean(), {})), ConvNorm(2, 3, key=jax.random.key(0))
    >>> sorted(loss(net, jnp.ones((1, 4, 4, 2)))[2])
    ['norm.mean', 'norm.variance']
    """

    @functools.wraps(loss)
    def of_moments(model: PyTree, batch: PyTree) -> tuple:
        if not any(isinstance(node, BatchNorm) for _, node in tree.walk(model)):
            return loss(model, batch)
        found: dict[str, PyTree] = {}

        def noting(*args: PyTree, **options: PyTree) -> PyTree:
            output, new = measured(model, *args, **options)
            found.update(new)
            return output

        return *loss(noting, batch), found

    return of_moments


def span(
    model: Callable, batch: tuple[PyTree, Int[Host, "b 2"]]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross-entropy of the two ends of an answer: half that of its start, half of its end.

    Args:
      model: inputs -> logits [b, t, 2], of every token that the answer starts and that it ends
        there.
      batch: inputs, and the positions [b, 2] of an answer's first and last token, in 0..t - 1; a
        row with a negative one has no answer and is not counted (BERT gives such rows the answer
        0, 0, which counts).
    Returns:
      (nats per end [], {"exact": fraction of the counted rows both of whose ends have the largest
      logits [], "count": counted rows []}); 0 where none is.
    Raises:
      ValueError: logits of another shape.
    """
    inputs, ends = batch
    logits = model(inputs).astype(jnp.float32)
    if logits.ndim != 3 or logits.shape[-1] != 2:
        raise ValueError(f"model gives logits {logits.shape}; a span needs [b, t, 2]")
    counted = (jnp.asarray(ends) >= 0).all(-1)
    by_end, wanted = logits.swapaxes(1, 2), jnp.where(counted[:, None], ends, 0)
    nats = optax.softmax_cross_entropy_with_integer_labels(by_end, wanted).mean(-1)
    mean, count = mean_of(nats, counted)
    exact, _ = mean_of((by_end.argmax(-1) == wanted).all(-1), counted)
    return mean, {"exact": exact, "count": count}


def masked(
    model: Callable, batch: tuple[PyTree, Int[Host, "*b"]]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross-entropy of the tokens that stood where the inputs are masked.

    Args:
      model: inputs -> logits [b, t, v].
      batch: inputs, and at each masked place the token that stood there, else a negative number
        [b, t]. Likewise of any other shape: classes of some nodes, [n] of logits [n, c].
    Returns:
      (nats per masked token [], {"bits": likewise, "accuracy": fraction of them with the largest
      logit [], "count": masked tokens []}); 0 where none is.
    """
    inputs, targets = batch
    logits = model(inputs).astype(jnp.float32)
    counted = jnp.asarray(targets) >= 0
    wanted = jnp.where(counted, targets, 0)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
    mean, count = mean_of(nats, counted)
    accuracy, _ = mean_of(logits.argmax(-1) == wanted, counted)
    return mean, {"bits": mean / math.log(2), "accuracy": accuracy, "count": count}


def mean_of(
    values: Float[Array, "*b"] | Bool[Array, "*b"], counted: Bool[Host, "*b"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """(mean of the counted values, 0 where there are none; how many)."""
    count = jnp.sum(counted)
    return jnp.sum(values * counted) / jnp.maximum(count, 1), count


class Taught(NamedTuple):
    """A labelled batch with what a teacher says of it.

    Attributes:
      inputs: an array [b, …], or a tree of them.
      classes: [b] int.
      logits: the teacher's, [b, classes].
    """

    inputs: PyTree
    classes: Int[Host, "b"]
    logits: Float[Host, "b c"]


REDUCTIONS = ("batchmean", "mean")


def distillation(
    student: Float[Array, "*b c"],
    teacher: Float[Host, "..."],
    *,
    temperature: float | Array = 1.0,
    reduction: str = "batchmean",
) -> Float[Array, ""]:
    """How far a student's classes are from a teacher's, who learns nothing from it.

        T^2 sum_c q_c (log q_c - log p_c),   p = softmax(student / T),  q = softmax(teacher / T)

    averaged over the rows of a batch, or over rows and classes. (arXiv 1503.02531, section 2; T^2
    keeps the size of gradients.)

    Args:
      student: logits.
      teacher: logits of the same classes; no gradient reaches them.
      temperature: T > 0.
      reduction: "batchmean" divides the sum by the rows, "mean" by rows times classes, as torch's
        `kl_div` calls them.
    Raises:
      ConfigError: T is not positive, or another reduction.
      ValueError: other numbers of rows or classes.
    """
    check_distillation(temperature, reduction)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student has logits {student.shape} and teacher {teacher.shape}; both need the same "
            "rows and the same classes"
        )
    fixed = jax.lax.stop_gradient(jnp.asarray(teacher)).astype(jnp.float32)
    q = jax.nn.log_softmax(fixed / temperature)
    p = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    # exp(q) is 0 where a teacher excludes a class, whose logit may be -inf.
    terms = jnp.where(q == -jnp.inf, 0.0, jnp.exp(q) * (q - p))
    each = terms.sum(-1) if reduction == "batchmean" else terms
    return temperature**2 * each.mean()


def check_distillation(temperature: float | Array, reduction: str) -> None:
    """Raises ConfigError for a temperature or a reduction that there is not."""
    if is_known(temperature) and not 0 < temperature < math.inf:
        raise ConfigError(f"temperature={temperature} must be positive and finite")
    if reduction not in REDUCTIONS:
        raise ConfigError(f"reduction={reduction!r} is not one of {REDUCTIONS}")


def distilled(
    *, temperature: float | Array = 1.0, weight: float | Array = 0.5, reduction: str = "batchmean"
) -> Loss:
    """A loss that learns from classes and from a teacher's logits.

        (1 - weight) * cross-entropy(classes) + weight * distillation(logits)

    The teacher's logits are part of the batch and may be computed once for many runs. A model that
    is its own teacher takes `distillation`. Batch norms of the student are `measuring`.

    Args:
      temperature, reduction: see `distillation`.
      weight: of the teacher, 0 to 1.
    Returns:
      the loss: (model: inputs -> logits [b, c], batch: `Taught`) -> (nats per input [], {"labels":
      cross-entropy [], "teacher": distillation [], "accuracy": of the classes []}).
    Raises:
      ConfigError: as `distillation`, or another weight; from the loss ValueError, as there.

    >>> batch = Taught(jnp.ones((1, 2)), jnp.array([1]), jnp.array([[0.0, 1.0]]))
    >>> float(distilled(weight=1.0)(lambda x: jnp.array([[2.0, 3.0]]), batch)[0])
    0.0
    """
    check_distillation(temperature, reduction)
    if is_known(weight) and not 0 <= weight <= 1:
        raise ConfigError(f"weight={weight} must lie in 0..1")

    def loss(model: Callable, batch: Taught) -> tuple[Float[Array, ""], dict[str, Array]]:
        inputs, classes, logits = batch
        found = model(inputs)
        options = {"temperature": temperature, "reduction": reduction}
        far = distillation(found, logits, **options)
        nats, metrics = labelled(lambda _: found, (inputs, classes))
        mean = (1 - weight) * nats + weight * far
        return mean, {"labels": nats, "teacher": far, **metrics}

    return measuring(loss)
