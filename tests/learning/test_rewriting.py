"""A state whose model was rewritten: what the optimizer remembers goes along with its array."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import models, transform, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import Guided
from ffnlab.learning import (
    OptimizerConfig,
    backprop,
    from_state,
    make_optimizer,
    members,
    rewritten,
)
from ffnlab.parallel import train
from ffnlab.structure import guided, self_guided, structured, unguided
from ffnlab.testing import equal, tiny
from ffnlab.transform import Transform

T = 2


def texts(position):
    """Four rows of tokens, others at each position."""
    return np.asarray(jax.random.randint(jax.random.key(position), (4, 12), 0, 64))


def whole(dtype=jnp.float32):
    """The tiny decoder with guided low-rank FFNs."""
    made = transform.chain(structured(rank=4), guided())
    return transform.apply(made, tiny(dtype=dtype))[0]


def dropped(node):
    """A tree like the model, its guides dropped by hand."""
    return tree.map_at(node, tree.of_type(Guided), lambda layer: layer.linear)


def moments(optimizer, kind):
    """The trees like the model in an optimizer's state, in order."""
    nodes = jax.tree.leaves(optimizer, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


@pytest.mark.parametrize("form", ["list", "stacked", "bfloat16"])
def test_moments_and_masters_stay_with_their_arrays(form):
    model = whole(jnp.bfloat16 if form == "bfloat16" else jnp.float32)
    model = models.stack(model) if form == "stacked" else model
    rule = backprop(self_guided(steps=T), optax.adamw(1e-2), informed=True)
    state = rule.init(model, jax.random.key(0))
    for position in range(T):
        state, _ = rule.step(state, texts(position))
    new = rewritten(state, unguided())
    assert equal(new.model, dropped(state.model)) and int(new.step) == T
    before, after = (moments(s.optimizer, models.Decoder) for s in (state, new))
    assert len(before) == len(after) == (3 if form == "bfloat16" else 2)
    assert all(equal(b, dropped(a)) for a, b in zip(before, after, strict=True))
    plain = backprop(optimizer=optax.adamw(1e-2))
    fresh = jax.eval_shape(plain.init, new.model, jax.random.key(0))
    assert jax.tree.structure(fresh) == jax.tree.structure(new), "the plain rule takes it"


def test_the_guided_run_and_the_rest_are_resumed_to_the_same_bits(tmp_path):
    """Two runs in two folders; both are cut and go on from their checkpoints."""
    guiding = backprop(self_guided(steps=T), optax.adamw(1e-2), informed=True)
    plain, key, start = backprop(optimizer=optax.adamw(1e-2)), jax.random.key(0), whole()
    rest = lambda position: texts(T + position)  # noqa: E731

    first = train(guiding, start, texts, T, key=key)
    middle = rewritten(first.state, unguided())
    last = train(from_state(plain, middle), middle.model, rest, 2, key=key)

    train(guiding, start, texts, 1, key=key, folder=tmp_path / "a")
    again = train(guiding, start, texts, T, key=key, folder=tmp_path / "a", resume=True)
    assert equal(again.state, first.state)
    begun = rewritten(again.state, unguided())
    rule = from_state(plain, begun)
    train(rule, begun.model, rest, 1, key=key, folder=tmp_path / "b")
    ended = train(rule, begun.model, rest, 2, key=key, folder=tmp_path / "b", resume=True)
    assert equal(ended.state, last.state) and int(last.state.step) == T + 2
    assert not np.array_equal(last.state.optimizer[0].mu.norm.scale[...], 0)
    anew = train(plain, middle.model, rest, 2, key=key)
    assert not equal(anew.state.model, last.state.model), "the moments are of use"


def test_optimizers_of_several_parts_and_members():
    muon = make_optimizer(OptimizerConfig(name="muon", warmup=1), 4)
    state = backprop(optimizer=muon).init(whole(), jax.random.key(0))
    new = rewritten(state, unguided(force=True))
    fresh = jax.eval_shape(backprop(optimizer=muon).init, new.model, jax.random.key(0))
    assert jax.tree.structure(fresh) == jax.tree.structure(new)

    rule = members(lambda rate: backprop(optimizer=optax.adam(rate)), 2, vary={"rate": [0.1, 0.2]})
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), whole())
    state = rule.init(both, jax.random.key(0))
    new = jax.vmap(lambda state: rewritten(state, unguided()))(state)
    assert equal(new.model, dropped(state.model))


def test_layers_may_be_removed_and_arrays_not_made():
    state = backprop(optimizer=optax.adam(1e-2)).init(tiny(), jax.random.key(0))
    cut = Transform(
        "cut",
        lambda model: (),
        None,
        lambda model, stats: tree.map_at(
            model, tree.at("layers[1]"), lambda block: block.without("ffn")
        ),
    )
    new = rewritten(state, cut)
    assert new.model.layers[1].ffn is None and new.optimizer[0].mu.layers[1].ffn is None
    with pytest.raises(ConfigError, match="unguided: the model has no guides"):
        rewritten(state, unguided())
    with pytest.raises(ConfigError, match=r"ffn.down: its guide has a share; force=True"):
        rewritten(backprop().init(whole(), jax.random.key(0)), unguided())
    turned = Transform(
        "turned",
        lambda model: (),
        None,
        lambda model, stats: jax.tree.map(lambda x: jnp.flip(x, 0) if x.ndim else x, model),
    )
    with pytest.raises(ConfigError, match="transform 'turned' makes arrays of its own"):
        rewritten(state, turned)
