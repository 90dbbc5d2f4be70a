"""LoRA-Mixer: low-rank updates of several tasks inside the linear maps, mixed for each token.

The updates are trained apart, or together with the task of each row told (`by_task`), or taken as
they are from directories (`formats.peft`). Then routers alone are trained on a little text of all
tasks (`specialized`).

    experts = [load_adapter(base, folder) for folder in folders]
    model, _ = transform.apply(mixed(experts), base)
    rule = backprop(specialized(), optimizer, trainable=MIXERS)
    …
    model = sharpened(model, k=3)

Source: LoRA-Mixer (arXiv 2507.00029).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError, at_least, check_seed, is_known
from ffnlab.layers import Linear, RoutedLinear
from ffnlab.layers.balance import entropy, specialization
from ffnlab.layers.routers import check_k, softmax_top_k
from ffnlab.losses import Loss, PackedRows, next_token
from ffnlab.models.rewriting import key_of, rewriting
from ffnlab.models.stack import Stacked, unstack
from ffnlab.rule import Metrics
from ffnlab.transform import Transform
from ffnlab.tree import Predicate, Selector
from ffnlab.weights import LoRA

__all__ = [
    "EXPERTS",
    "MIXERS",
    "by_task",
    "lora_experts",
    "mixed",
    "preserved",
    "sharpened",
    "specialized",
]

MIXERS = tree.at("**.router**")  # those of other layers too, where a model has some
EXPERTS = tree.at("**.lora_a") | tree.at("**.lora_b")

in_attention = tree.at("layers**.attn.*") & tree.of_type(Linear)


def lora_experts(
    *,
    experts: int,
    rank: int = 8,
    alpha: float = 16.0,
    where: Predicate = in_attention,
    seed: int = 0,
) -> Transform:
    """Several low-rank updates in each linear map, at zero, and a router: the model is the same.

    Args:
      experts: updates of each map, >= 1.
      rank: of each, >= 1 and at most the smaller side of the map.
      alpha: the scale of an update is alpha / rank.
      where: which `Linear` maps, by their paths in the list form; those of attention by default.
      seed: of the draws.
    Returns:
      a transform that observes nothing; each map becomes a `RoutedLinear` of all experts (soft).
    Raises:
      ConfigError: an option out of range; of a model, a rank that a map has not.
      SelectionError: of a model, no map is selected.
    """
    at_least(1, experts=experts, rank=rank)
    check_seed(seed)

    def problems(model: Any) -> list[str]:
        found: dict[str, Any] = tree.select(model, linear(where))
        thin = [path for path, m in found.items() if rank > min(m.weight.shape)]
        return [f"rank={rank} is more than {thin[:3]} have"] if thin else []

    def routed(path: str, base: Any) -> RoutedLinear:
        d_in, d_out = base.weight.shape
        key = key_of(seed, path)
        a = jax.random.normal(key, (experts, d_in, rank), jnp.float32) * d_in**-0.5
        b = jnp.zeros((experts, rank, d_out), jnp.float32)
        return RoutedLinear(base, router_of(base, experts, key), (alpha / rank) * a, b)

    return rewriting(
        "lora_experts", problems, lambda model: tree.map_at_path(model, linear(where), routed)
    )


def mixed(adapters: Sequence[Any], *, seed: int = 0) -> Transform:
    """The low-rank updates of several models of one base in its maps, with routers between them.

    Args:
      adapters: models with `weights.LoRA` around their matrices (`formats.peft.load_adapter`),
        their layers in a list or stacked; where one has no update, its expert is zero.
      seed: of the routers.
    Returns:
      a transform of the base; it observes nothing. Each map with an update becomes a
      `RoutedLinear` of all experts (soft), the scales of their updates in its b.
    Raises:
      ConfigError: no adapters, or a model without updates; of a base, maps of other shapes than
        those of the adapters, or updates of unlike rank in one map.
    """
    check_seed(seed)
    if not adapters:
        raise ConfigError("adapters=[]; models with low-rank updates are accepted")
    found = [updates_of(adapter) for adapter in adapters]
    empty = [i for i, each in enumerate(found) if not each]
    if empty:
        raise ConfigError(f"adapters {empty} have no low-rank updates")
    paths = sorted({path for each in found for path in each})

    def problems(model: Any) -> list[str]:
        bases = {p: m for p, m in tree.walk(model) if isinstance(m, Linear)}
        said = []
        for path in paths:
            here = {i: each[path] for i, each in enumerate(found) if path in each}
            shapes = {i: tuple(update.shape) for i, update in here.items()}
            base = tuple(bases[path].weight.shape) if path in bases else None
            if set(shapes.values()) != {base}:
                said.append(f"{path} is {base} in the base and {shapes} in the adapters")
            ranks = {i: update.a.shape[-1] for i, update in here.items()}
            if len(set(ranks.values())) > 1:
                said.append(f"{path} has ranks {ranks}; one for all adapters is accepted")
        return said[:3]

    def routed(path: str, base: Any) -> RoutedLinear:
        one = next(each[path] for each in found if path in each)
        nothing = jnp.zeros_like(one.a), jnp.zeros_like(one.b)
        pairs = [
            (each[path].a, each[path].scale * each[path].b) if path in each else nothing
            for each in found
        ]
        a, b = (jnp.stack(part) for part in zip(*pairs, strict=True))
        return RoutedLinear(base, router_of(base, len(found), key_of(seed, path)), a, b)

    def change(model: Any) -> Any:
        chosen = Selector("maps with updates", lambda path, _: path in paths)
        return tree.map_at_path(model, chosen, routed)

    return rewriting("mixed", problems, change)


def sharpened(model: Any, *, k: int | None, normalize: bool = True) -> Any:
    """The model with k experts of a token in each `RoutedLinear`, as it is used after training.

    Args:
      model: with such layers, in a list or stacked.
      k: 1 to the number of experts; None for all, as in training.
      normalize: whether the chosen shares are divided by their sum.
    Raises:
      SelectionError: it has none.
      ConfigError: k out of range.
    """

    def change(layer: Any) -> RoutedLinear:
        if k is not None:
            check_k(k, layer.experts)
        new = jax.tree.map(lambda leaf: leaf, layer)
        new.k, new.normalize = k, normalize
        return new

    return tree.map_at(model, tree.of_type(RoutedLinear), change)


def specialized(
    loss: Loss = next_token,
    *,
    balance: float | Float[Array, ""] = 1e-2,
    certainty: float | Float[Array, ""] = 1e-3,
) -> Loss:
    """A loss with the routing specialization loss of all routers, which are of soft mixtures.

        loss + mean over layers of (balance sum_e mean(p_e) f_e + certainty H(p))

    Args:
      loss: (model, batch) -> (mean, metrics), which calls the model once.
      balance: >= 0, weight of the spread over experts.
      certainty: weight of the entropy H of a token's mixture; > 0 makes tokens sure of few
        experts, as the paper says; < 0 of many, as its formula does.
    Returns:
      a loss; its metrics have "entropy", of a token's mixture, and "share", the largest of an
      expert.
    Raises:
      ConfigError: balance < 0.
      SelectionError: from the loss, a model without `RoutedLinear`.
    Source:
      arXiv 2507.00029, L_RSL; both weights stand in it once.
    """
    if is_known(balance) and balance < 0:
        raise ConfigError(f"balance={balance} must be at least 0")

    def with_routing(model: Any, batch: PyTree) -> tuple[Float[Array, ""], Metrics]:
        model = unstack(model) if isinstance(getattr(model, "layers", None), Stacked) else model
        logits: list[Array] = []

        given: list[Array] = []
        routers = of_mixers(model)

        def call(*args: Any, **options: Any) -> Any:
            output, seen = tree.capture(model, routers, *args, **options)
            found: list[Any] = list(seen.values())
            logits.extend(one.output for one in found)
            if options.get("valid") is not None:
                given.append(options["valid"])
            return output

        nats, metrics = loss(call, batch)[:2]
        shared = jnp.stack([x.astype(jnp.float32) for x in logits])
        valid = given[0] if given else None
        if isinstance(batch, PackedRows):
            valid = batch.segments[:, :-1] > 0
        valid = None if valid is None else jnp.broadcast_to(valid, shared.shape[:-1])
        routing = softmax_top_k(shared, 1, valid=valid)
        cost = specialization(routing, balance=balance, certainty=certainty)
        tokens = jnp.maximum(routing.valid.sum(), 1)
        share = routing.scores.sum(range(1, shared.ndim - 1)).max() * len(shared) / tokens
        return nats + cost, {**metrics, "entropy": entropy(routing), "share": share}

    return with_routing


def by_task(loss: Loss = next_token) -> Loss:
    """A loss of batches (batch, task): the expert of each row is told, and it alone learns.

    A task that is the number of no expert leaves its row to the base, and no expert learns of it.

    Args:
      loss: of the batch without its tasks.
    Returns:
      a loss of (batch, task [rows] int).
    Raises:
      SelectionError: from the loss, a model without `RoutedLinear`.
      ConfigError: from the loss, no task for each row.
    """

    def told(model: Any, batch: PyTree) -> Any:
        if not isinstance(batch, tuple) or len(batch) != 2 or jnp.ndim(batch[1]) != 1:
            raise ConfigError("a batch of (rows, task of each row) is accepted")
        rows, task = batch
        count = len(jax.tree.leaves(rows)[0])
        if jnp.shape(task) != (count,):
            raise ConfigError(f"task {jnp.shape(task)}: one for each of {count} rows is accepted")

        def hard(layer: Any) -> RoutedLinear:
            return layer.told(jnp.asarray(task))

        return loss(tree.map_at(model, tree.of_type(RoutedLinear), hard), rows)

    return told


def preserved(loss: Loss, start: Any, *, beta: float = 1e-3) -> Loss:
    """A loss that keeps experts near where they were: beta sum |theta - theta_0|^2.

    Args:
      loss: of the model and a batch.
      start: the model with the experts to stay near, of the same form.
      beta: >= 0.
    Raises:
      ConfigError: beta < 0.
    """
    if beta < 0:
        raise ConfigError(f"beta={beta} must be at least 0")
    before = experts_of(start)

    def near(model: Any, batch: PyTree) -> Any:
        mean, metrics, *more = loss(model, batch)
        after = experts_of(model)
        squares = [jnp.sum((after[path] - x) ** 2) for path, x in before.items()]
        distance = sum(squares[1:], squares[0])
        return mean + beta * distance, {**metrics, "moved": distance}, *more

    return near


def experts_of(model: Any) -> dict[str, Array]:
    """The factors of all updates by path."""
    layers = tree.select(model, tree.of_type(RoutedLinear))
    return {
        f"{path}.{name}": getattr(layer, name).get_value().astype(jnp.float32)
        for path, layer in layers.items()
        for name in ("lora_a", "lora_b")
    }


def updates_of(model: Any) -> dict[str, LoRA]:
    """The low-rank updates of a model by the path of their map, in the list form."""
    model = unstack(model) if isinstance(getattr(model, "layers", None), Stacked) else model
    maps = {path: node for path, node in tree.walk(model) if isinstance(node, Linear)}
    return {path: m.weight for path, m in maps.items() if isinstance(m.weight, LoRA)}


def router_of(base: Linear, experts: int, key: Array) -> Linear:
    """A router for a map, drawn from N(0, 1 / in)."""
    return Linear(
        base.weight.shape[0],
        experts,
        key=jax.random.fold_in(key, 1),
        axes=(base.w.axes[0], "router"),
    )


def linear(where: Predicate) -> Selector:
    """The `Linear` maps among what a selection names."""
    name = getattr(where, "name", "where")
    return Selector(name, lambda path, node: isinstance(node, Linear) and where(path, node))


def of_mixers(model: Any) -> Selector:
    """The routers of all `RoutedLinear`, and not those of other layers.

    Raises:
      SelectionError: there is none.
    """
    layers = tree.select(model, tree.of_type(RoutedLinear))
    paths = {f"{path}.router" for path in layers}
    return tree.where(lambda path, _: path in paths)
