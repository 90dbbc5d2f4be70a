"""Domain-Adversarial Training of Neural Networks (arXiv 1505.07818, 2016), on any network.

Features are to tell the classes of a labelled source, and not to tell the source from a target
whose classes are unknown. With G_f the features, G_y what reads classes off them and G_d what reads
the domain (0 source, 1 target),

    E = mean_source L_y(G_y(G_f(x)), y) - lambda [mean_source L_d(G_d(G_f(x)), 0)
                                                  + mean_target L_d(G_d(G_f(x)), 1)]

falls in G_f and G_y and rises in G_d. With the gradient reversed between G_f and G_d
(`ffnlab.layers.reverse_gradient`) both are one descent. There are two conventions of lambda:

- "features": it scales what comes back to the features; G_d learns at full speed. That of the deep
  experiments, and of the third-party code (fungtion/DANN).
- "everything": it scales all of L_d, what G_d learns by too. That of the shallow algorithm.

Means are taken of each domain, whose rows may differ in number. Both domains pass the network one
after the other, so that a batch norm normalizes each by its own moments, as the third-party code
has it; the running statistics are moved by both together, where that code moves them twice.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError, at_least, is_known
from ffnlab.layers import MLP, BatchNorm, measured, reverse_gradient
from ffnlab.layers.gradient_reversal import check_strength
from ffnlab.learning.backprop import BackpropState, backprop
from ffnlab.learning.labels import check_labels
from ffnlab.losses import InformedLoss, Loss, Moment, labelled, measuring
from ffnlab.rule import Rule

__all__ = [
    "Players",
    "adversarial",
    "dann",
    "domain_classifier",
    "domain_parts",
    "features_of",
    "reader_of",
    "strength_at",
]

SCALED = ("features", "everything")
STEEPNESS = 10.0  # gamma of the schedule of lambda


class Players(NamedTuple):
    """What learns.

    Attributes:
      network: G_f and G_y as one model, inputs -> scores.
      domain: G_d, features [n, …] -> a logit of the target [n, 1] or [n].
    """

    network: PyTree
    domain: PyTree


def strength_at(progress: float | Array) -> Float[Array, ""]:
    """The schedule of lambda, as a share of its end: 2 / (1 + exp(-10 p)) - 1.

    Args:
      progress: p, 0 at the beginning of training and 1 at its end.
    Raises:
      ConfigError: it is known and outside of 0..1.
    Source: section 5.2.2.

    >>> float(strength_at(0.0)), round(float(strength_at(1.0)), 4)
    (0.0, 0.9999)
    """
    if is_known(progress) and not 0 <= float(progress) <= 1:
        raise ConfigError(f"progress={progress} must lie in 0..1")
    return 2 / (1 + jnp.exp(-STEEPNESS * progress)) - 1


def reader_of(network: PyTree) -> str:
    """The path of the module that reads scores off features: `head`, or an MLP's last map.

    Raises:
      ConfigError: the network has neither.
    """
    if isinstance(network, MLP):
        return f"maps[{len(network.maps) - 1}]"
    if isinstance(getattr(network, "head", None), nnx.Module):
        return "head"
    raise ConfigError(
        f"a {type(network).__name__} has no head; reader=… names the module that reads its "
        "features, by path"
    )


def domain_classifier(hidden: int = 100) -> Callable[[nnx.Module, Array], MLP]:
    """Makes G_d beside what reads the features: a perceptron of one hidden layer, or of none.

    Args:
      hidden: its width; 0 for a logistic regression, which begins at zero as in the shallow
        algorithm.
    Raises:
      ConfigError: below 0; from what is returned, the reader has no weight to take a width from.
    """
    at_least(0, hidden=hidden)

    def make(reader: nnx.Module, key: Array) -> MLP:
        if not hasattr(reader, "weight"):
            raise ConfigError(
                f"domain: a {type(reader).__name__} reads the features and has no weight whose "
                "rows say how many; give domain=… (reader, key) -> a module"
            )
        width, dtype = reader.weight.shape[0], reader.weight.dtype
        options = {"key": key, "dtype": dtype}
        if not hidden:
            return MLP((width, 1), init=jax.nn.initializers.zeros, **options)
        return MLP((width, hidden, 1), **options)

    return make


class Passes(nnx.Module):
    """A network that is shown both domains, one after the other.

    Attributes:
      network: inputs -> scores.
    """

    def __init__(self, network: PyTree):
        self.network = network

    def __call__(self, reader: str, source: PyTree, target: PyTree) -> tuple[Array, Array, Array]:
        """(scores of the source, features of the source, features of the target)."""
        scores, here = seen(self.network, reader, source)
        return scores, here, seen(self.network, reader, target)[1]


def seen(network: PyTree, reader: str, x: PyTree) -> tuple[Array, Array]:
    """(scores, features): what a network gives, and what its reader is given."""
    args, options = ((), x) if isinstance(x, Mapping) else ((x,), {})
    scores, found = tree.capture(network, tree.at(reader), *args, **options)
    if len(found) != 1:
        raise ConfigError(f"reader={reader!r} selects {list(found)}; one module is needed")
    return scores, next(iter(found.values())).input[0]


def features_of(network: PyTree, x: PyTree, reader: str | None = None) -> Array:
    """The features that a network reads its scores off.

    Args:
      network: inputs -> scores.
      x: inputs [n, …], or several by the names of the network's arguments.
      reader: path of the module that reads the features; `reader_of` the network when None.
    Returns:
      [n, …].
    Raises:
      ConfigError: no module reads the features, or several.
    """
    return seen(network, reader or reader_of(network), x)[1]


def adversarial(
    strength: float | Array = 1.0,
    *,
    ramp: int = 0,
    scaled: str = "features",
    loss: Loss = labelled,
    reader: str | None = None,
) -> InformedLoss:
    """The loss of `Players`, on batches of two domains or of the source alone.

    Args:
      strength, ramp, scaled, loss, reader: see `dann`.
    Returns:
      (players, batch, moment) -> (loss of the labels + that of the domains, metrics, statistics).
    Raises:
      ConfigError: as `dann`.
    """
    check_strength(strength)
    at_least(0, ramp=ramp)
    if scaled not in SCALED:
        raise ConfigError(f"scaled={scaled!r} is not one of {SCALED}")

    def total(players: Players, batch: PyTree, moment: Moment) -> tuple:
        source, target = domain_parts(batch)
        network, path = players.network, reader or reader_of(players.network)
        if target is None:
            mean, metrics, *more = measuring(loss)(network, source)
            return mean, metrics, {f"network.{k}": v for k, v in (more[0] if more else {}).items()}
        passes, has_norms = Passes(network), any(map(is_norm, tree.walk(network)))
        given = path, source[0], target
        found, new = measured(passes, *given) if has_norms else (passes(*given), {})
        scores, here, there = found  # type: ignore[not-iterable]
        label, metrics = loss(lambda _: scores, source)[:2]
        share = strength_at(jnp.minimum(moment.step / ramp, 1.0)) if ramp else 1.0
        weight = strength * share
        back, whole = (weight, 1.0) if scaled == "features" else (1.0, weight)
        logits = [score(players.domain, reverse_gradient(f, back)) for f in (here, there)]
        nats = jax.nn.softplus(logits[0]).mean() + jax.nn.softplus(-logits[1]).mean()
        right = [(logits[0] < 0).mean(), (logits[1] > 0).mean()]
        metrics = metrics | {"label": label, "domain": nats / 2, "domain_accuracy": sum(right) / 2}
        return label + whole * nats, metrics, new

    return total


def is_norm(found: tuple[str, object]) -> bool:
    """Whether a node is a batch norm."""
    return isinstance(found[1], BatchNorm)


def score(domain: Callable, features: Array) -> Float[Array, "n"]:
    """Logits of the target, float32 or wider.

    Raises:
      ValueError: other than one for each row.
    """
    logits = domain(features)
    if logits.shape not in ((len(features),), (len(features), 1)):
        raise ValueError(
            f"domain gives {logits.shape} for {len(features)} rows of features; one logit of the "
            "target for each is needed, [n, 1] or [n]"
        )
    return logits.reshape(-1).astype(jnp.promote_types(logits.dtype, jnp.float32))


def domain_parts(batch: PyTree) -> tuple[tuple[PyTree, ...], PyTree | None]:
    """The source and the target of a batch.

    Args:
      batch: ((x, y), target), as `ffnlab.data.Zipped` gives it of two sources, or (x, y) alone.
    Returns:
      ((x, y), inputs of the target, None where there is no target).
    Raises:
      ValueError: another structure, or the target has classes.
    """
    is_pair = isinstance(batch, tuple) and len(batch) == 2
    if not is_pair:
        raise ValueError(
            f"batch is a {type(batch).__name__}; ((x, y), target) is accepted: "
            "data.Zipped(source, target), the source with classes"
        )
    source, target = batch
    if not isinstance(source, tuple):
        return batch, None
    if len(source) != 2:
        raise ValueError(f"source has {len(source)} parts; inputs and classes are needed, (x, y)")
    if isinstance(target, tuple):
        raise ValueError("target has several parts: give its inputs alone, its classes are unknown")
    return source, target


def check_batch(network: PyTree, batch: PyTree, reader: str, *, needs_target: bool = True) -> None:
    """Checks a batch of two domains; of the network only shapes are looked at.

    Args:
      network: that is to learn from it.
      batch: as `domain_parts` takes it.
      reader: path of the module that reads the features.
      needs_target: whether the source alone is not enough.
    Raises:
      ValueError: see `dann`.
    """
    (x, y), target = domain_parts(batch)
    if target is None and needs_target:
        raise ValueError(
            "batch has no target, or a source without classes: ((x, y), target) is needed, as "
            "data.Zipped(source, target) gives it; (x, y) alone with strength=0"
        )
    parts = {"source": x} | ({} if target is None else {"target": target})
    rows = {name: len(next(iter(jax.tree.leaves(part)), ())) for name, part in parts.items()}
    for name, count in rows.items():
        if not count:
            raise ValueError(f"{name} has no rows; at least one is needed")
    if np.shape(y)[:1] != (rows["source"],):
        raise ValueError(f"source has {rows['source']} rows and classes of shape {np.shape(y)}")
    here, there = (
        jax.tree.map(lambda leaf: np.shape(leaf)[1:], p) for p in (x, parts.popitem()[1])
    )
    if here != there:
        raise ValueError(f"target has inputs of shape {there}, the source of {here}")
    classes = classes_of(network, reader)
    if classes is not None and np.ndim(y) == 1:
        check_labels(y, classes)


def classes_of(network: PyTree, reader: str) -> int | None:
    """How many scores what reads the features gives; None where it has no weight that says so.

    The path is followed and not looked for: this is asked of every batch.
    """
    node = network
    for name, index in re.findall(r"(\w+)|\[(\w+)\]", reader):
        node = getattr(node, name, None) if name else node[int(index)]
    weight = getattr(node, "weight", None)
    return None if weight is None else weight.shape[1]


def dann(
    optimizer: optax.GradientTransformation | None = None,
    *,
    strength: float | Array = 1.0,
    ramp: int = 0,
    scaled: str = "features",
    loss: Loss = labelled,
    reader: str | None = None,
    domain: Callable[[nnx.Module, Array], PyTree] | None = None,
    microbatches: int = 1,
) -> Rule:
    """The rule: a classifier of the source whose features hide the domain.

    A batch is ((x, y), target), that of `ffnlab.data.Zipped(source, target)`: inputs with classes,
    and inputs alone, of as many rows as one likes. The model is any network that has a module which
    reads scores off features, as every kind of classifier has: that module is the label's part, all
    before it the features'. With strength 0 batches may be of the source alone, (x, y), and
    the step is that of backpropagation.

    Settings are not to be chosen by the target's classes: by the error on the source, or by
    training back from the target's predicted classes to the source (section 5.1.2).

    Args:
      optimizer: of all three parts; Adam at 1e-3 when None.
      strength: lambda at its end, at least 0.
      ramp: steps over which lambda rises from 0, by `strength_at`; 0 for a constant one.
      scaled: what lambda scales, "features" or "everything": see above.
      loss: of the network on (x, y).
      reader: path of the module that reads the features; `reader_of` the network when None.
      domain: (reader, key) -> G_d; `domain_classifier()` when None.
      microbatches: as of `backprop`; each takes its share of either domain.
    Returns:
      a Rule; its state is that of backpropagation of `Players`, and it gives, and predicts by, the
      network. Metrics are "loss", those of `loss`, and with a target "label", "domain" (nats per
      input, .69 where nothing is told) and "domain_accuracy", means of both domains.
    Raises:
      ConfigError: a strength that is negative or not finite, a ramp below 0, another `scaled`; from
        `init`, no module reads the features, or several.
      ValueError: from `check`, no rows in one domain, a source without classes or with others than
        the network has, a target with classes or with inputs of another shape, or no target.

    >>> from ffnlab.data import ArrayBatches, Zipped, moons
    >>> source, target = moons()
    >>> batches = Zipped(ArrayBatches(source, 8), ArrayBatches(target.x, 8))
    >>> rule = dann(optax.sgd(0.1), strength=0.5)
    >>> state = rule.init(MLP((2, 15, 2), key=jax.random.key(0)), jax.random.key(1))
    >>> state, metrics = rule.step(state, batches(0))
    >>> sorted(metrics)
    ['accuracy', 'domain', 'domain_accuracy', 'gradient_norm', 'label', 'loss']
    """
    options = {"ramp": ramp, "scaled": scaled, "loss": loss, "reader": reader}
    both = backprop(
        adversarial(strength, **options),
        optax.adam(1e-3) if optimizer is None else optimizer,
        informed=True,
        microbatches=microbatches,
    )
    make = domain_classifier() if domain is None else domain
    needs_target = not is_known(strength) or float(strength) > 0

    def init(network: PyTree, key: Array) -> BackpropState:
        draw, own = jax.random.split(key)
        found = tree.select(network, tree.at(reader or reader_of(network)))
        if len(found) != 1:
            raise ConfigError(f"reader={reader!r} selects {list(found)[:5]}; one module is needed")
        return both.init(Players(network, make(next(iter(found.values())), draw)), own)

    def check(state: BackpropState, batch: PyTree) -> None:
        network = state.model.network
        check_batch(network, batch, reader or reader_of(network), needs_target=needs_target)

    predict = jax.jit(lambda state, inputs: state.model.network(inputs))
    return Rule("dann", init, both.step, predict, lambda state: state.model.network, check)
