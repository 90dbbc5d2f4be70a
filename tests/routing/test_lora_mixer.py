"""LoRA-Mixer: experts from adapters, their routers, and the losses of both stages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import models, transform, tree
from ffnlab.data import Packed
from ffnlab.errors import ConfigError, SelectionError
from ffnlab.formats.peft import load_adapter, save_adapter
from ffnlab.layers import RoutedLinear
from ffnlab.learning import backprop, next_token, packed_next_token
from ffnlab.models import adapters
from ffnlab.models.account import flops_per_token
from ffnlab.models.cost import multiply_adds
from ffnlab.routing import (
    EXPERTS,
    MIXERS,
    by_task,
    lora_experts,
    mixed,
    preserved,
    sharpened,
    specialized,
)
from ffnlab.testing import batches, equal, tiny
from ffnlab.weights import LoRA

ATTENTION = tree.at("layers**.attn.*")
ALL = tree.at("layers**")


def adapted(seed: int, where: tree.Selector = ATTENTION, rank: int = 2) -> models.Decoder:
    """The tiny model with low-rank updates that do something."""
    model, _ = transform.apply(adapters.lora(rank=rank, seed=seed, where=where), tiny())
    draw = lambda w: 0.3 * jax.random.normal(jax.random.key(seed), w.b.shape)  # noqa: E731
    changed = lambda m: m.replace(LoRA(m.weight.base, m.weight.a, draw(m.weight), 16.0))  # noqa: E731
    chosen = tree.where(lambda _, n: hasattr(n, "w") and isinstance(getattr(n, "weight", 0), LoRA))
    return tree.map_at(model, chosen, changed)


def mixture(*seeds: int) -> models.Decoder:
    """The tiny model with a router between adapters."""
    return transform.apply(mixed([adapted(seed) for seed in seeds], seed=5), tiny())[0]


def test_the_model_is_the_same_until_experts_learn():
    model, _ = transform.apply(lora_experts(experts=3, rank=2, where=ALL), tiny())
    np.testing.assert_array_equal(model(batches()[0]), tiny()(batches()[0]))
    found = tree.select(model, tree.of_type(RoutedLinear))
    assert len(found) == 3 * 7, "q, k, v, o and the maps of the FFN of each layer"


def test_directories_come_back_as_experts(tmp_path):
    """With all weight on one expert the mixture is that adapter's model."""
    for i in (1, 2):
        save_adapter(adapted(i), tmp_path / str(i))
    read = [load_adapter(tiny(), tmp_path / str(i)) for i in (1, 2)]
    model, _ = transform.apply(mixed(read), tiny())
    x = batches()[0]
    for i, adapter in enumerate((adapted(1), adapted(2))):
        one = jnp.full(2, i)
        told = tree.map_at(model, tree.of_type(RoutedLinear), lambda m, one=one: m.told(one))
        np.testing.assert_allclose(told(x), adapter(x), rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(adapted(1)(x) - adapted(2)(x))).max() > 0.01


def test_a_map_that_an_adapter_leaves_has_a_zero_expert():
    both = [adapted(1), adapted(2, where=tree.at("layers[0].attn.q"))]
    model, _ = transform.apply(mixed(both), tiny())
    assert model.layers[1].attn.q.lora_b[...][0].any()
    assert not model.layers[1].attn.q.lora_b[...][1].any()
    assert model.layers[0].attn.q.lora_b[...][1].any()


def test_the_form_is_kept_and_both_forms_are_equal():
    model, x = mixture(1, 2, 3), batches()[0]
    stacked, _ = transform.apply(
        mixed([models.stack(adapted(i)) for i in (1, 2, 3)], seed=5), models.stack(tiny())
    )
    assert equal(models.unstack(stacked), model)
    for one in (model, sharpened(model, k=2)):
        np.testing.assert_allclose(models.stack(one)(x), one(x), rtol=1e-5, atol=1e-5)
    assert equal(sharpened(sharpened(model, k=2), k=None), model)


@pytest.mark.parametrize("certainty", [0.5, -0.5])
def test_the_loss_of_routers_by_hand(certainty):
    model, batch = mixture(1, 2, 3), batches()[0]
    nats, metrics = specialized(balance=0.3, certainty=certainty)(model, batch)
    routers = tree.where(lambda path, _: path.endswith("router"))
    output, seen = tree.capture(model, routers, batch[:, :-1])
    p = jax.nn.softmax(jnp.stack([found.output for found in seen.values()]), -1)
    p = np.asarray(p, np.float64)
    f = np.eye(3)[p.argmax(-1)].mean((1, 2))
    spread = (p.mean((1, 2)) * f).sum(-1).mean()
    entropy = -(p * np.log(p)).sum(-1).mean()
    plain, _ = next_token(lambda _: output, batch)
    assert float(nats) == pytest.approx(float(plain) + 0.3 * spread + certainty * entropy, rel=1e-5)
    assert float(metrics["entropy"]) == pytest.approx(entropy, rel=1e-5)
    assert float(metrics["share"]) == pytest.approx(p.mean((1, 2)).max(), rel=1e-5)
    stacked = specialized(balance=0.3, certainty=certainty)(models.stack(model), batch)[0]
    assert float(stacked) == pytest.approx(float(nats), rel=1e-5)


def test_padding_has_no_mixture():
    model, (tokens, _) = mixture(1, 2), batches()
    segments = jnp.ones_like(tokens).at[1, 6:].set(0)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    loss = specialized(packed_next_token)
    found = loss(model, Packed(tokens, segments, positions))[1]["entropy"]
    changed = tokens.at[1, 6:].set(0)
    again = loss(model, Packed(changed, segments, positions))[1]["entropy"]
    assert float(found) == pytest.approx(float(again), rel=1e-6)


@pytest.mark.slow
def test_routers_alone_learn_in_the_second_stage_and_the_sign_is_the_entropy_s():
    entropies = {}
    for certainty in (1.0, -1.0):
        rule = backprop(specialized(certainty=certainty), optax.adam(0.05), trainable=MIXERS)
        model = mixture(1, 2)
        state = rule.init(model, jax.random.key(0))
        for _ in range(5):
            state, metrics = rule.step(state, batches()[0])
        entropies[certainty] = float(metrics["entropy"])
        bare = lambda m: tree.map_at(m, MIXERS & tree.at("**.router"), lambda _: None)  # noqa: E731
        assert equal(bare(state.model), bare(model))
    assert entropies[1.0] < entropies[-1.0] - 0.1


@pytest.mark.slow
def test_experts_learn_their_own_task_and_stay_near():
    model = mixture(1, 2)
    batch = (batches()[0], jnp.array([0, 0]))
    moved = {}
    for beta in (0.0, 1e3):
        loss = preserved(by_task(), model, beta=beta)
        rule = backprop(loss, optax.sgd(1e-4), trainable=EXPERTS)
        state = rule.init(model, jax.random.key(0))
        for _ in range(3):
            state, metrics = rule.step(state, batch)
        moved[beta] = float(metrics["moved"])
        for after, before in zip(state.model.layers, model.layers, strict=True):
            a, b = after.attn.q, before.attn.q
            assert not np.array_equal(a.lora_b[...][0], b.lora_b[...][0])
            np.testing.assert_array_equal(a.lora_b[...][1], b.lora_b[...][1])
            np.testing.assert_array_equal(a.base.weight.w, b.base.weight.w)
    assert 0 < moved[1e3] < moved[0.0]


def test_a_mixture_is_saved_loaded_and_generates(tmp_path):
    model = sharpened(mixture(1, 2, 3), k=2)
    models.save(model, tmp_path / "mix", format="ffnlab")
    loaded = models.load(tmp_path / "mix")
    assert equal(loaded, model) and loaded.layers[0].attn.q.k == 2
    x = batches()[0]
    logits, _ = loaded.extend(x, loaded.init_cache(2, 12))
    np.testing.assert_allclose(logits, model(x), rtol=1e-4, atol=1e-5)


def test_the_account_counts_base_router_and_updates():
    model, x = mixture(1, 2, 3), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    assert 2 * multiply_adds(lambda m, x: m(x), model, x) == flops_per_token(model, 1)


def test_what_cannot_be_is_refused():
    for wrong in ({"experts": 0}, {"experts": 2, "rank": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            lora_experts(**wrong)
    with pytest.raises(ConfigError, match="rank=9"):
        transform.apply(lora_experts(experts=2, rank=9), tiny())
    with pytest.raises(ConfigError, match="adapters="):
        mixed([])
    with pytest.raises(ConfigError, match=r"adapters \[1\]"):
        mixed([adapted(1), tiny()])
    with pytest.raises(ConfigError, match="ranks"):
        transform.apply(mixed([adapted(1), adapted(2, rank=3)]), tiny())
    config = models.DecoderConfig(
        vocab=64, width=8, hidden=32, layers=3, heads=4, kv_heads=2, head_dim=4
    )
    with pytest.raises(ConfigError, match="in the base"):
        transform.apply(mixed([adapted(1)]), models.Decoder(config, key=jax.random.key(0)))
    with pytest.raises(SelectionError):
        sharpened(tiny(), k=1)
    with pytest.raises(ConfigError, match="k="):
        sharpened(mixture(1, 2), k=3)
    with pytest.raises(ConfigError, match="balance"):
        specialized(balance=-1.0)
    with pytest.raises(ConfigError, match="beta"):
        preserved(next_token, mixture(1, 2), beta=-1.0)
    with pytest.raises(ConfigError, match="task of each row"):
        by_task()(mixture(1, 2), batches()[0])
    with pytest.raises(SelectionError):
        specialized()(tiny(), batches()[0])
