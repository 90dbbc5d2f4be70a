"""Duo-LLM: a small FFN beside the big one of every layer, and how the two are trained.

Stage 1 trains both with a choice drawn for each token and layer, so that any pattern of choices
works (`random_choices`). What the best choices would be is asked of `ffnlab.routing.oracle`. Stage
3 trains routers that keep to a budget (`budgeted`).

    model, _ = transform.apply(duo(ratio=16), model)
    rule = backprop(random_choices(), optimizer, informed=True)
    …
    model, _ = transform.apply(with_routers(), model)
    rule = backprop(budgeted(0.5), optimizer, trainable=ROUTERS, informed=True)

Source: Duo-LLM (arXiv 2410.10846), sections 2 and 3.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ffnlab import tree
from ffnlab.errors import ConfigError, at_least, check_seed, is_known
from ffnlab.layers import ByChoice, LayerInputs, LayerOutputs, Linear, MoE
from ffnlab.layers.balance import budget_loss
from ffnlab.layers.feed_forward.ffn import is_plain
from ffnlab.losses import InformedLoss, Moment, PackedRows, next_token, packed_next_token
from ffnlab.models import Decoder
from ffnlab.models.rewriting import key_of, rewriting
from ffnlab.models.stack import layers_of
from ffnlab.rule import Metrics
from ffnlab.transform import Transform
from ffnlab.tree import Predicate

__all__ = [
    "BIG",
    "ROUTERS",
    "budgeted",
    "duo",
    "random_choices",
    "softened",
    "with_routers",
]

BIG = 0  # the choice of the branch that was there before
ROUTERS = tree.at("layers**.router**")

every_ffn = tree.at("layers**.ffn")


def duo(
    *, ratio: int = 16, skip: bool = False, where: Predicate = every_ffn, seed: int = 0
) -> Transform:
    """A small FFN beside each FFN of a decoder, and a choice between them for every token.

    Without a choice and without a router the big one is taken: the model computes the same.

    Args:
      ratio: hidden channels of the big FFN over those of the small one, which has one at least.
      skip: whether a token may also take neither; attention runs in any case.
      where: which `FFN`s and `GatedFFN`s, by their paths in the list form.
      seed: of the small FFNs.
    Returns:
      a transform that observes nothing; each FFN becomes a `ByChoice` of (big, small).
    Raises:
      ConfigError: ratio < 2; of a model, it is no decoder or its FFNs have a choice already.
      SelectionError: of a model, no FFN is selected.
    """
    at_least(2, ratio=ratio)
    check_seed(seed)

    def problems(model: Any) -> list[str]:
        if not isinstance(model, Decoder):
            return [f"model is a {type(model).__name__}; a Decoder is accepted"]
        if choices_of(model):
            return [f"{list(choices_of(model))[:3]} have a choice already"]
        found = tree.select(model, where)
        odd = [path for path, node in found.items() if not is_plain(node)]
        said = "are no FFN or GatedFFN of linear maps, which are accepted"
        return [f"{odd[:3]} {said}"] if odd else []

    def beside(path: str, big: Any, layers: int) -> ByChoice:
        width, hidden = big.up.weight.shape
        small = type(big)(
            width,
            max(1, hidden // ratio),
            key=key_of(seed, path),
            activation=big.activation,
            bias=big.up.b is not None,
            out_scale=(2 * layers) ** -0.5,
            dtype=big.up.weight.dtype,
        )
        return ByChoice([big, small], skip=skip)

    def change(model: Decoder) -> Decoder:
        layers = len(model.blocks())
        return tree.map_at_path(model, where, lambda path, big: beside(path, big, layers))

    return rewriting("duo", problems, change)


def with_routers(*, seed: int = 0) -> Transform:
    """A router for each `ByChoice`: a linear map to its choices, to be trained alone (`ROUTERS`).

    Args:
      seed: of the draw, N(0, 1 / width).
    Returns:
      a transform that observes nothing.
    Raises:
      ConfigError: of a model, nothing is chosen in it, or there are routers already.
    """
    check_seed(seed)

    def problems(model: Any) -> list[str]:
        found = choices_of(model)
        there = [path for path, layer in found.items() if layer.router is not None]
        said = [] if found else ["the model has no choices; `ffnlab.routing.duo` makes them"]
        return said + ([f"{there[:3]} have routers already"] if there else [])

    def routed(path: str, layer: Any, width: int) -> ByChoice:
        router = Linear(width, layer.choices, key=key_of(seed, path), axes=("embed", "router"))
        return ByChoice(list(layer.branches), skip=layer.skip, router=router)

    def change(model: Any) -> Any:
        width = model.config.width
        return tree.map_at_path(
            model, tree.of_type(ByChoice), lambda path, layer: routed(path, layer, width)
        )

    return rewriting("with_routers", problems, change)


def random_choices(probabilities: Sequence[float] | None = None) -> InformedLoss:
    """Stage 1: next-token loss with a choice drawn for each token and each layer.

    Args:
      probabilities: of each choice; all alike when None, as in the paper.
    Returns:
      an informed loss of tokens [b, t + 1] or packed rows.
    Raises:
      ConfigError: they are not in [0, 1] or do not add up to 1; from the loss, other than one for
        each choice of the model.
    """
    given = None if probabilities is None else tuple(probabilities)
    if given is not None and not (given and min(given) >= 0 and abs(sum(given) - 1) <= 1e-6):
        raise ConfigError(f"probabilities={given}: numbers in [0, 1] with sum 1 are accepted")

    def loss(model: Decoder, batch: Any, moment: Moment) -> tuple[Float[Array, ""], Metrics]:
        count = choice_count(model)
        if given is not None and len(given) != count:
            raise ConfigError(f"probabilities={given}: the model has {count} choices")
        p = jnp.full(count, 1 / count) if given is None else jnp.asarray(given)
        tokens = batch.tokens if isinstance(batch, PackedRows) else batch
        shape = (layers_of(model), tokens.shape[0], tokens.shape[1] - 1)
        choice = jax.random.choice(moment.key, count, shape, p=p)
        nats, metrics, _ = predict(model, batch, LayerInputs(choice=choice))
        return nats, metrics

    return loss


def budgeted(
    budget: float | Float[Array, ""],
    *,
    alpha: float = 10.0,
    temperatures: tuple[float, float] = (1.0, 0.1),
    steps: int = 1000,
) -> InformedLoss:
    """Stage 3: next-token loss of a soft choice by the routers, and their budget.

        nats + alpha mean over rows of (mean over layers and tokens of P_big - budget)^2

    The budget is one for all layers, which may differ: no layer is balanced by itself.

    Args:
      budget: share of tokens and layers that take the big branch, in [0, 1].
      alpha: weight of the budget, >= 0.
      temperatures: of the softmax over choices, at first and at last, > 0; it falls geometrically,
        so that choices become hard.
      steps: until it has fallen; then it stays.
    Returns:
      an informed loss of tokens [b, t + 1] or packed rows; its metrics have "big", the share.
    Raises:
      ConfigError: an option out of range; from the loss, a model without routers.
    Source:
      Equation 2 of arXiv 2410.10846, with the temperature dividing the logits.
    """
    if is_known(budget, alpha) and not (0 <= budget <= 1 and alpha >= 0):
        raise ConfigError(f"budget={budget}, alpha={alpha}: [0, 1] and >= 0 are accepted")
    at_least(1, steps=steps)
    first, last = temperatures
    if not 0 < last <= first:
        raise ConfigError(f"temperatures={temperatures}: 0 < last <= first is accepted")

    def loss(model: Decoder, batch: Any, moment: Moment) -> tuple[Float[Array, ""], Metrics]:
        bare = [path for path, layer in choices_of(model).items() if layer.router is None]
        if bare or not choices_of(model):
            raise ConfigError(f"{bare[:3] or 'the model'}: no router; `with_routers` adds them")
        others = [path for path, node in tree.walk(model) if isinstance(node, MoE)]
        if others:
            raise ConfigError(f"{others[:3]} are mixtures, which have no big branch to budget")
        soft = first * (last / first) ** jnp.minimum(moment.step / steps, 1.0)
        nats, metrics, outputs = predict(softened(model, soft), batch, LayerInputs())
        (routing,) = outputs.reports.values()
        is_big = jnp.arange(routing.experts) == BIG
        cost = budget_loss(routing, is_big.astype(jnp.float32), budget)
        share = routing.scores[..., BIG].sum() / jnp.maximum(routing.valid.sum(), 1)
        return nats + alpha * cost, {**metrics, "big": share, "budget_cost": cost}

    return loss


def softened(model: Decoder, temperature: float | Float[Array, ""]) -> Decoder:
    """The model with all its choices soft, by its routers at a temperature.

    Raises:
      SelectionError: there is nothing to choose in it.
    """

    def soft(layer: Any) -> ByChoice:
        return layer.softened(jnp.float32(temperature))

    return tree.map_at(model, tree.of_type(ByChoice), soft)


def predict(
    model: Decoder, batch: Any, inputs: LayerInputs
) -> tuple[Float[Array, ""], Metrics, LayerOutputs]:
    """The next-token loss of tokens or packed rows, and what the layers report."""
    reported = []

    def call(tokens: Int[Array, "b t"], **given: Any) -> Float[Array, "b t v"]:
        h, outputs = model.run(tokens, inputs=inputs, **given)
        reported.append(outputs)
        return model.logits(h)

    nats, metrics = (packed_next_token if isinstance(batch, PackedRows) else next_token)(
        call, batch
    )
    return nats, metrics, reported[0]


def choices_of(model: Any) -> dict[str, ByChoice]:
    """The layers of a model in which tokens choose, by path; none, perhaps."""
    return {path: node for path, node in tree.walk(model) if isinstance(node, ByChoice)}


def choice_count(model: Any) -> int:
    """How many choices a token has in each layer.

    Raises:
      ConfigError: there are none, or they differ in number.
    """
    counts = {layer.choices for layer in choices_of(model).values()}
    if len(counts) != 1:
        raise ConfigError(
            f"the model's layers have {sorted(counts) or 'no'} choices; one number is accepted "
            "(`ffnlab.routing.duo` makes them)"
        )
    return counts.pop()
