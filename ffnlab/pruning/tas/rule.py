"""Transformable architecture search as a rule: weights and sizes are learned in turn.

Paper: Network Pruning via Transformable Architecture Search (Dong, Yang, arXiv 1905.09717, NeurIPS
2019). Every layer has a logit for each number of channels that it may keep, every stage one for
each number of blocks. A forward pass draws two sizes of every layer and mixes them
(`ffnlab.pruning.tas.network`); a term of the expected multiply-adds steers the logits to a budget.

    weights  <- weights - optimizer(d loss(net(sizes drawn), rows) )
    logits   <- logits - Adam(d loss(net(sizes drawn again), other rows) + strength * S)
    S = +- log E[macs] while the most likely network is above the budget or well below it, else 0

Different from the authors' code (D-X-Y/AutoDL-Projects):
    convolutions that a sum of residuals joins have one width, so that what is found is a part of
    the network and keeps its weights (`ffnlab.models.narrow`); tied=False is their way;
    besides ResNets also MLPs and models of Blocks, whose FFNs and depth are chosen;
    the last architecture that met the budget is kept, of every step; theirs is that of the last
    epoch, or the best one on validation rows of the epochs that met it;
    work behind a stage that is cut is counted as it is (`ffnlab.pruning.tas.work`).
"""

import dataclasses
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError, at_least, is_known
from ffnlab.losses import Loss, labelled
from ffnlab.models.stack import Stacked, unstack
from ffnlab.pruning.tas import core
from ffnlab.pruning.tas.found import found_network, shape_of
from ffnlab.pruning.tas.network import (
    Architecture,
    Seen,
    as_draw,
    drawn,
    likely,
    most_likely,
    network,
    plain_of,
    started,
    with_candidates,
    with_moments,
)
from ffnlab.pruning.tas.sites import sites_of
from ffnlab.pruning.tas.work import Work, work_of
from ffnlab.rule import Rule

__all__ = ["TASOptions", "TASState", "tas"]

ROUNDED = 1 + 1e-6  # float32 sums of a network that meets a budget to the last product


@dataclasses.dataclass(frozen=True)
class TASOptions:
    """How sizes are searched; defaults are the authors' for CIFAR.

    Attributes:
      target: multiply-adds of the network that is looked for, over those of the whole one, in
        (0, 1].
      slack: how far below the target they may be, likewise.
      strength: lambda, weight of the term of the expected multiply-adds, >= 0.
      ratios: of a layer's channels that may be kept.
      depth: choose blocks too. A few of a large share each change the work in steps that are wider
        than the slack: then the budget is met now and then only.
      tied: convolutions of a ResNet that a sum joins have one width; else each its own.
      rate, decay: learning rate of the logits' Adam, and its weight decay.
      high, low: temperatures that the draws begin and end with.
    """

    target: float | Array = 0.5
    slack: float | Array = 0.05
    strength: float | Array = 2.0
    ratios: tuple[float, ...] = core.RATIOS
    depth: bool = True
    tied: bool = True
    rate: float | Array = 1e-3
    decay: float = 1e-3
    high: float = 5.0
    low: float = 0.1

    def __post_init__(self) -> None:
        for name, low in (("target", False), ("slack", True), ("strength", True), ("rate", True)):
            value = getattr(self, name)
            if is_known(value) and not (value >= 0 if low else value > 0):
                raise ConfigError(f"{name}={value} must be {'at least' if low else 'above'} 0")
        if is_known(self.target) and self.target > 1:
            raise ConfigError(f"target={self.target} is a share of the whole network, at most 1")
        if not 0 < self.low <= self.high:
            raise ConfigError(f"low={self.low} and high={self.high}: 0 < low <= high is accepted")
        core.width_choices(10**6, self.ratios)  # whose checks say what ratios are


class TASState(NamedTuple):
    """What a search changes.

    Attributes:
      model: the whole network, with a batch norm for every candidate of its convolutions.
      architecture: logits of the candidates.
      kept: those of the last step whose most likely network met the budget; the current ones
        before any did.
      met: [] int32, steps whose network met the budget.
      optimizer: optax state of the weights.
      architecture_optimizer: that of the logits.
      step: [] int32, steps taken.
      key: that of the run.
    """

    model: PyTree
    architecture: Architecture
    kept: Architecture
    met: Int[Array, ""]
    optimizer: PyTree
    architecture_optimizer: PyTree
    step: Int[Array, ""]
    key: Array


def tas(
    loss: Loss = labelled,
    optimizer: optax.GradientTransformation | None = None,
    *,
    example: PyTree,
    steps: int,
    options: TASOptions | None = None,
) -> Rule:
    """The rule that looks for a smaller network while it trains the whole one.

    A batch is a pair: rows that the weights learn from, and others for the sizes
    (`ffnlab.data.Zipped` of two halves).

    Args:
      loss: (model, rows) -> (mean, metrics), of the weights and of the sizes; it may call its
        model once.
      optimizer: of the weights; SGD of rate 0.1 with Nesterov momentum 0.9 and weight decay 5e-4,
        falling to 0 by a cosine, when None.
      example: what a model is called with, one row of it; leaves may be abstract. Multiply-adds
        are those of such a call.
      steps: over which the temperature falls.
      options: see `TASOptions`.
    Returns:
      a Rule; its state is `TASState`, its `result` the network that was found. `model` is the whole
      network, `predict` asks the most likely one. Metrics: "loss" and those of the loss, on the
      weights' rows; "architecture_loss", the loss on the others; "megamacs", expected; "ratio", of
      the most likely network's multiply-adds to the whole one's; "tau". `step` donates its state.
    Raises:
      ConfigError: steps below 1; from `init`, a model with nothing to choose (see `sites_of`), or a
        target below the share of the smallest network; from `check`, a batch that is no pair.
    """
    at_least(1, steps=steps)
    options = TASOptions() if options is None else options
    of_sizes = optax.chain(
        optax.add_decayed_weights(options.decay), optax.adam(options.rate, b1=0.5)
    )
    optimizer = authors(steps) if optimizer is None else optimizer
    search = Search(loss, optimizer, of_sizes, example, steps, options)
    return Rule(
        "tas",
        search.init,
        jax.jit(search.step, donate_argnums=0),
        jax.jit(search.predict),
        lambda state: plain_of(state.model),
        check_pair,
        search.result,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Search:
    """The functions of the rule, and what they close over.

    Attributes:
      loss, optimizer, example, steps, options: see `tas`.
      of_sizes: optimizer of the logits.
    """

    loss: Loss
    optimizer: optax.GradientTransformation
    of_sizes: optax.GradientTransformation
    example: PyTree
    steps: int
    options: TASOptions

    def work(self, plain: Any) -> Work:
        """What may be chosen in a model, and what it costs; shapes alone are looked at."""
        chosen = self.options
        sites = sites_of(plain, ratios=chosen.ratios, depth=chosen.depth, tied=chosen.tied)
        return work_of(plain, sites, self.example)

    def init(self, model: PyTree, key: Array) -> TASState:
        """See `Rule`."""
        # The step donates both; the caller's stay intact.
        model, key = jax.tree.map(jnp.copy, (model, key))
        model = unstack(model) if isinstance(getattr(model, "layers", None), Stacked) else model
        cost = self.work(model)
        check_target(self.options.target, cost.least)
        whole = with_candidates(model, cost.sites)
        architecture = started(cost.sites, jax.random.fold_in(key, self.steps))
        kept = jax.tree.map(jnp.copy, architecture)
        memory = self.optimizer.init(tree.trained(whole)[0]), self.of_sizes.init(architecture)
        return TASState(whole, architecture, kept, jnp.int32(0), *memory, jnp.int32(0), key)

    def step(self, state: TASState, batch: PyTree) -> tuple[TASState, dict[str, Array]]:
        """See `Rule`."""
        cost, options = self.work(plain_of(state.model)), self.options
        tau = core.temperature(state.step, self.steps, options.high, options.low)
        keys = jax.random.split(jax.random.fold_in(state.key, state.step))
        model, memory, found = self.weights_learned(cost, state, batch[0], tau, keys[0])
        given = model, state.architecture, batch[1], tau, keys[1]
        gradient, seen, more = self.pull_on_sizes(cost, *given)
        updates, of_sizes = self.of_sizes.update(
            gradient, state.architecture_optimizer, state.architecture
        )
        architecture = optax.apply_updates(state.architecture, updates)
        ratio = cost.ratio(*most_likely(cost.sites, architecture))
        met = (ratio >= options.target - options.slack) & (ratio <= options.target * ROUNDED)
        is_open = met | (state.met == 0)
        keep = lambda new, old: jnp.where(is_open, new, old)  # noqa: E731
        kept = jax.tree.map(keep, architecture, state.kept)
        model, times = with_moments(model, seen), state.met + met.astype(jnp.int32)
        after = model, architecture, kept, times, memory, of_sizes, state.step + 1, state.key
        return TASState(*after), found | more | {"ratio": ratio, "tau": tau}

    def drawn_loss(
        self,
        cost: Work,
        model: PyTree,
        architecture: Architecture,
        rows: PyTree,
        tau: Array,
        key: Array,
    ) -> tuple[Array, tuple[dict[str, Array], dict[str, Seen]]]:
        """What rows cost a network that is drawn, with metrics and what its norms met."""
        draw = drawn(cost.sites, architecture, tau, key)
        net, seen = network(model, cost.sites, draw, training=True)
        mean, metrics, *_ = self.loss(net, rows)
        return mean, (dict(metrics), dict(seen))

    def weights_learned(
        self, cost: Work, state: TASState, rows: PyTree, tau: Array, key: Array
    ) -> tuple[PyTree, PyTree, dict[str, Array]]:
        """(The model after a step of its weights, the optimizer's state, metrics)."""
        trained, fixed = tree.trained(state.model)

        def of_trained(trained: PyTree) -> tuple:
            model = tree.combine(trained, fixed)
            return self.drawn_loss(cost, model, state.architecture, rows, tau, key)

        (value, (metrics, seen)), gradient = jax.value_and_grad(of_trained, has_aux=True)(trained)
        updates, memory = self.optimizer.update(gradient, state.optimizer, trained)
        model = tree.combine(optax.apply_updates(trained, updates), fixed)
        return with_moments(model, seen), memory, {"loss": value, **metrics}

    def pull_on_sizes(
        self,
        cost: Work,
        model: PyTree,
        architecture: Architecture,
        rows: PyTree,
        tau: Array,
        key: Array,
    ) -> tuple[Architecture, dict[str, Seen], dict[str, Array]]:
        """(Gradient of the logits, what norms met, metrics)."""
        full, target = cost.whole / 1e6, self.options.target * ROUNDED
        exact = cost.megamacs(*most_likely(cost.sites, architecture), bridges=True)

        def of_logits(architecture: Architecture) -> tuple:
            mean, (_, seen) = self.drawn_loss(cost, model, architecture, rows, tau, key)
            expected = cost.megamacs(*likely(cost.sites, architecture), bridges=False)
            term = core.budget_term(expected, exact, target * full, self.options.slack * full)
            return mean + self.options.strength * term, (mean, expected, seen)

        (_, (mean, expected, seen)), gradient = jax.value_and_grad(of_logits, has_aux=True)(
            architecture
        )
        return gradient, seen, {"architecture_loss": mean, "megamacs": expected}

    def predict(self, state: TASState, inputs: PyTree) -> PyTree:
        """See `Rule`."""
        sites = self.work(plain_of(state.model)).sites
        draw = as_draw(most_likely(sites, state.kept))
        return network(state.model, sites, draw, training=False)[0](inputs)

    def result(self, state: TASState) -> PyTree:
        """See `Rule`.

        Warns:
          UserWarning: no step met the budget.
        """
        sites = self.work(plain_of(state.model)).sites
        if not int(state.met):
            warnings.warn(
                f"no step of the search met target={self.options.target}: the network is that of "
                "the last one; search longer, or raise strength or rate",
                stacklevel=2,
            )
        key = jax.random.fold_in(state.key, self.steps + 1)
        return found_network(state.model, sites, shape_of(sites, state.kept), key)


def authors(steps: int) -> optax.GradientTransformation:
    """The authors' optimizer of the weights, for CIFAR."""
    rate = lambda step: core.temperature(step, steps, 0.1, 0.0)  # noqa: E731 - the same cosine
    return optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9, nesterov=True)
    )


def check_target(target: float | Array, least: float) -> None:
    """Raises ConfigError for a budget that no network meets."""
    if is_known(target) and target * ROUNDED < least:
        raise ConfigError(
            f"target={target} is below {least:.4f}, the share of multiply-adds of the smallest "
            "network that may be chosen; allow smaller ratios, or aim higher"
        )


def check_pair(state: TASState, batch: PyTree) -> None:
    """Raises ConfigError for a batch that is no pair of equal structure."""
    del state
    is_pair = isinstance(batch, tuple) and len(batch) == 2
    kinds = [
        (jax.tree.structure(part), *(leaf.shape[1:] for leaf in jax.tree.leaves(part)))
        for part in (batch if is_pair else ())
    ]
    if not is_pair or kinds[0] != kinds[1]:
        raise ConfigError(
            "a batch of a search is a pair, rows for the weights and others for the sizes: "
            "ffnlab.data.Zipped(one_half, other_half)"
        )
