"""Forward learning of graph neural networks (ForwardGNN, arXiv 2403.11004; ICLR 2024).

Every layer has a loss of its own, of its own output, so no error goes back through depth and
nothing is stored for it. The objectives:

- "single_forward": every class has a virtual node, joined with the nodes to learn from that are of
  it; a layer makes nodes resemble the virtual node of their class. No negative examples.
- "label_appending", "virtual_nodes": the forward-forward algorithm (arXiv 2212.13345). A label is
  written into the features of a node, or into its edge with a virtual node; rows are to be long
  where it is true and short where it is not.
- "links": nodes that are joined are to resemble each other.

Layers learn one after the other, or all at once and told of what is above them
(`ForwardGNNOptions.top_down`). Each ends by itself: the best parameters by validation, and how
long ago they were, are part of the state (`ffnlab.learning.stopping`).

What differs from the authors' code (facebookresearch/forwardgnn): what a layer reads is propagated
through the graph once for all its steps; layers draw their first weights as those of
`ffnlab.layers` do, where PyTorch Geometric's are Glorot's.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.learning.forward_gnn import layerwise, top_down
from ffnlab.learning.forward_gnn.checks import check_batch, check_model, classes_of
from ffnlab.learning.forward_gnn.inputs import GraphBatch, GraphInputs, parts_of
from ffnlab.learning.forward_gnn.layerwise import Held, Method, by_layer
from ffnlab.learning.forward_gnn.objectives import objective_of
from ffnlab.learning.forward_gnn.options import AUTHORS, ForwardGNNOptions
from ffnlab.learning.optimizers.masters import in_float32
from ffnlab.learning.stopping import Watch, kept, noted, unwatched
from ffnlab.models import GraphNetwork
from ffnlab.rule import Rule

__all__ = ["ForwardGNNState", "forward_gnn_answers", "forward_gnn"]


class ForwardGNNState(NamedTuple):
    """What forward learning changes.

    Attributes:
      model: the network; its finished layers are the best ones of their time.
      best: the network with the best parameters of the learning layer so far, and of the finished.
      optimizers: optax states, one of each layer.
      held: `layerwise.Held` of the learning layer; of layers that learn at once, their last rows.
      layer: [] int32, which layer learns, and after the last one how many there are; of layers that
        learn at once 0, and how many there are when they have ended.
      taken: [] int32, steps that it took.
      watch: of its validations.
    """

    model: PyTree
    best: PyTree
    optimizers: tuple[PyTree, ...]
    held: PyTree
    layer: Int[Array, ""]
    taken: Int[Array, ""]
    watch: Watch


def forward_gnn(
    like: GraphBatch,
    options: ForwardGNNOptions = AUTHORS,
    optimizer: optax.GradientTransformation | None = None,
) -> Rule:
    """The rule; a batch is a `GraphBatch` (`node_batch`, `link_batch`), the model a `GraphNetwork`.

    Args:
      like: a batch, of which only shapes are looked at: the state has room for what layers give.
      options: which of the ways, and its numbers.
      optimizer: of every layer by itself; when None Adam at 1e-3, 5e-4 of the parameters added to
        gradients (but for links told from above), which are clipped to norm 1 where the loss is.
    Returns:
      a Rule; its state is `ForwardGNNState`, its metrics "loss" (of the learning layer, or of all
      at once), 0 when all have ended, "layer", and "held_out", the best validation of the learning
      layer, 0 before the first. `predict` takes `GraphInputs` and gives scores of classes [n, C],
      or of pairs [m], of the layers that have begun. `step` donates its state.
    Raises:
      ConfigError: `like` is not of the objective; from `init`, the network is not of it.
      ValueError: from `check`, a batch of other shapes, classes out of range, one without a node to
        learn from, pairs out of range or of one kind alone, or nothing to validate on.
    """
    classes = classes_of(like, options)
    if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
        raise ConfigError(f"optimizer is a {type(optimizer).__name__}; one of optax is accepted")
    made = default_optimizer(options) if optimizer is None else optimizer
    method = Method(options, objective_of(options, classes), in_float32(made))
    step = layer_step if options.top_down == "none" else sweep_step

    def init(model: PyTree, key: Array) -> ForwardGNNState:
        check_model(model, like, options, classes)
        model, best = (jax.tree.map(jnp.copy, model) for _ in range(2))  # the step donates both
        memories = tuple(method.optimizer.init(tree.trained(la)[0]) for la in model.layers)
        if options.top_down == "none":
            held: PyTree = layerwise.held_before(method, model, like)
        else:
            rows = jax.eval_shape(lambda m, x: top_down.bottom_up(method, m, x), model, like.inputs)
            held = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rows)
        start = jnp.int32(0), jnp.int32(0), unwatched()
        return ForwardGNNState(model, best, memories, held, *start)

    return Rule(
        "forward-gnn",
        init,
        jax.jit(lambda state, batch: step(method, state, batch), donate_argnums=0),
        jax.jit(lambda state, inputs: answered(method, state, inputs)),
        model=lambda state: state.best,
        check=lambda state, batch: check_batch(batch, like, options, classes),
    )


def layer_step(
    method: Method, state: ForwardGNNState, batch: GraphBatch
) -> tuple[ForwardGNNState, dict[str, Array]]:
    """A step of the learning layer."""
    count, options = len(state.model.layers), method.options
    is_done = state.layer >= count
    at = jnp.where(is_done, count, state.layer)

    begin = [*by_layer(layerwise.begun, count, method), lambda model, held, batch: held]
    held: Held = jax.lax.switch(
        jnp.where(state.taken == 0, at, count), begin, state.model, state.held, batch
    )
    idle = lambda model, memories, held, batch: (model, memories, jnp.float32(0))  # noqa: E731
    learn = [*by_layer(layerwise.learned, count, method), idle]
    model, memories, loss = jax.lax.switch(at, learn, state.model, state.optimizers, held, batch)
    taken = state.taken + ~is_done

    is_asked = ~is_done & (taken % options.every == 0) & (options.patience > 0)
    ask = [*by_layer(layerwise.validated, count, method), lambda *_: -jnp.float32(jnp.inf)]
    score = jax.lax.switch(jnp.where(is_asked, at, count), ask, model, held, batch)
    new = state._replace(model=model, optimizers=memories, held=held, taken=taken)
    return ended(method, new, score, is_asked, 1, is_done), told(state, loss, score)


def sweep_step(
    method: Method, state: ForwardGNNState, batch: GraphBatch
) -> tuple[ForwardGNNState, dict[str, Array]]:
    """A step of all layers."""
    count, options = len(state.model.layers), method.options
    is_done = state.layer >= count

    def go(model: PyTree, memories: tuple, held: tuple, batch: GraphBatch) -> tuple:
        first = lambda: top_down.bottom_up(method, model, batch.inputs)  # noqa: E731
        held = jax.lax.cond(state.taken == 0, first, lambda: held)
        model, memories, held, losses = top_down.learned(method, model, memories, held, batch)
        return model, memories, held, jnp.float32(sum(losses))

    idle = lambda model, memories, held, batch: (model, memories, held, jnp.float32(0))  # noqa: E731
    model, memories, held, loss = jax.lax.cond(
        is_done, idle, go, state.model, state.optimizers, state.held, batch
    )
    taken = state.taken + ~is_done
    is_asked = ~is_done & (taken % options.every == 0) & (options.patience > 0)

    def ask() -> Float[Array, ""]:
        found = top_down.answers(method, model, parts_of(batch)[-1])
        return jnp.float32(method.objective.figure(found, batch.held_out))

    score = jax.lax.cond(is_asked, ask, lambda: -jnp.float32(jnp.inf))
    new = state._replace(model=model, optimizers=memories, held=held, taken=taken)
    return ended(method, new, score, is_asked, count, is_done), told(state, loss, score)


def ended(
    method: Method,
    state: ForwardGNNState,
    score: Float[Array, ""],
    is_asked: Bool[Array, ""],
    layers: int,
    is_done: Bool[Array, ""],
) -> ForwardGNNState:
    """The state after a step and its validation: `layers` of them may have ended with it."""
    options = method.options
    watch, is_best = noted(state.watch, score, is_asked)
    best = kept(is_best & ~is_done, state.model, state.best)
    has_waited = (options.patience > 0) & (watch.waited >= options.patience)
    ends = ~is_done & (has_waited | (state.taken >= options.limit))
    layer = state.layer + layers * ends
    return state._replace(
        model=kept(ends, best, state.model),
        best=best,
        layer=layer,
        taken=jnp.where(ends, 0, state.taken),
        watch=kept(ends & (layer < len(state.model.layers)), unwatched(), watch),
    )


def told(
    before: ForwardGNNState, loss: Float[Array, ""], score: Float[Array, ""]
) -> dict[str, Array]:
    """The metrics of a step."""
    best = jnp.maximum(before.watch.score, score)
    known = jnp.where(jnp.isneginf(best), 0, best)
    return {"loss": loss, "layer": before.layer.astype(jnp.float32), "held_out": known}


def answered(method: Method, state: ForwardGNNState, inputs: GraphInputs) -> Float[Array, "..."]:
    """What the layers that have begun say of what is asked."""
    begun = jnp.maximum(state.layer + (state.taken > 0), 1)
    return said(method, state.best, inputs, begun)


def said(
    method: Method, model: GraphNetwork, inputs: GraphInputs, layers: int | Int[Array, ""]
) -> Float[Array, "..."]:
    """What the first so many layers of a network say; of one that is told from above, all."""
    if method.options.top_down != "none":
        return top_down.answers(method, model, inputs)
    return layerwise.answers(method, model, inputs, layers)


def forward_gnn_answers(
    like: GraphBatch, options: ForwardGNNOptions = AUTHORS
) -> Callable[[GraphNetwork, GraphInputs], Float[Array, "..."]]:
    """What a network that has learned says, without the state that it learned in.

    Args:
      like, options: as the rule had them.
    Returns:
      (model, inputs, layers=None) -> scores of classes [n, C] or of pairs [m], of the first so many
      layers, which are a network of that depth; of all when None, and where they are told of those
      above.
    Raises:
      ConfigError: `like` is not of the objective; from the function, the network is not of it, or
        has not so many layers.
    """
    classes = classes_of(like, options)
    method = Method(options, objective_of(options, classes), optax.identity())

    def answer(
        model: GraphNetwork, inputs: GraphInputs, layers: int | None = None
    ) -> Float[Array, "..."]:
        check_model(model, like, options, classes)
        count = len(model.layers) if layers is None else layers
        if not isinstance(count, int) or not 1 <= count <= len(model.layers):
            raise ConfigError(f"layers={count}: 1 to {len(model.layers)} are there")
        return said(method, model, inputs, count)

    return answer


def default_optimizer(options: ForwardGNNOptions) -> optax.GradientTransformation:
    """The authors' optimizer: Adam whose decay is a part of the gradient (not AdamW's)."""
    parts = [optax.clip_by_global_norm(1.0)] if options.top_down == "loss" else []
    if options.objective != "links" or options.top_down == "none":
        parts.append(optax.add_decayed_weights(5e-4))
    return optax.chain(*parts, optax.adam(1e-3))
