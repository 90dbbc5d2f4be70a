"""FinerCut on encoders: padding, heads of other shapes, blocks of other sublayers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ffnlab import models
from ffnlab.errors import ConfigError
from ffnlab.layers import FFN, Block, LayerInputs, RMSNorm
from ffnlab.models.units import slots, units
from ffnlab.pruning import finercut, removal_order
from ffnlab.pruning.removal_map import removal_map
from ffnlab.testing import batches, tiny, tiny_encoder
from ffnlab.transform import apply, calibrate
from tests.pruning.test_finercut import plain_distance

TOKENS = np.asarray(jax.random.randint(jax.random.key(1), (3, 7), 0, 64), np.int32)
VALID = np.arange(7) < np.array([7, 4, 5])[:, None]
BATCH = {"tokens": TOKENS, "valid": VALID, "types": (TOKENS % 2).astype(np.int32)}
cut = functools.cache(finercut)


@functools.cache
def encoder(**options):
    return tiny_encoder(**options)


@jax.jit
def gated(model, options, gates):
    return model(**options, inputs=LayerInputs(gates=gates))


def search(model, data, **options):
    return calibrate(cut(**options), model, data, progress=False)


def parts(head, output, valid):
    """What each position or text says, [1, positions, outputs], of all that count."""
    if head == "span":  # of each text, two distributions over its own tokens
        output = np.asarray(output)
        return [output[i, row].T[None] for i, row in enumerate(valid)]
    if head == "classes":
        return [np.asarray(output)[:, None]]
    return [np.asarray(output)[valid][None]]


def greedy(model, head, name, rounds, options=BATCH, valid=VALID):
    """The greedy search without protection, written out."""
    names = slots(model)
    mixing = [i for i, slot in enumerate(names) if slot.startswith("attn")]
    order = [i for i in range(len(names)) if i not in mixing] + mixing
    n = model.config.layers
    left, gone, scores = [i * len(names) + j for i in range(n) for j in order], [], []

    def output(drop):
        gates = np.ones((n, len(names)), np.float32)
        gates.reshape(-1)[list(drop)] = 0
        return parts(head, gated(model, options, gates), valid)

    original = output([])
    for _ in range(rounds):
        row = []
        for unit in left:
            pairs = zip(original, output([*gone, unit]), strict=True)
            found = [(plain_distance(name, a, b), a.size) for a, b in pairs]
            row.append(sum(d * s for d, s in found) / sum(s for _, s in found))
        scores.append(min(row))
        gone.append(left.pop(int(np.argmin(row))))
    return gone, scores


@pytest.mark.parametrize(
    ("head", "name", "options"),
    [
        ("masked", "js", {}),
        (None, "angular", {}),
        ("tokens", "kl", {"classes": 5}),
        ("classes", "js", {"classes": 3, "pooler": "tanh"}),
        ("span", "js", {}),
    ],
)
def test_order_equals_brute_force_over_what_is_valid(head, name, options):
    model = encoder(head=head, **options)
    stats = search(model, [BATCH], remove=2, distance=name, protect=None)
    order, scores = greedy(model, head, name, 2)
    assert removal_order(stats) == order
    if head != "span":  # padding counts as elements of probability 0
        ours = [stats.scores[r].reshape(-1)[u] for r, u in enumerate(order)]
        np.testing.assert_allclose(ours, scores, rtol=2e-4)  # float32 outputs and sums
    removed, _ = apply(cut(remove=2, distance=name, protect=None), model, [BATCH])
    assert models.removed(removed) == sorted(order)


def test_padding_and_the_form_of_the_model_change_nothing():
    model, options = encoder(), {"remove": 2, "protect": None}
    want = search(model, [BATCH], **options)
    other = BATCH | {"tokens": np.where(VALID, TOKENS, 63 - TOKENS)}
    longer = {name: np.pad(array, ((0, 0), (0, 2))) for name, array in BATCH.items()}
    for found in (
        search(model, [other], **options),
        search(models.stack(model), [longer], **options),
    ):
        assert removal_order(found) == removal_order(want)
        np.testing.assert_allclose(found.scores, want.scores, rtol=1e-4)  # other orders of sums


def test_embeddings_are_a_batch_and_tokens_are_checked():
    model = encoder()
    given = {"embeddings": np.asarray(model.embed(jnp.asarray(TOKENS)))} | {"valid": VALID}
    plain = {"tokens": TOKENS, "valid": VALID}
    one, two = (search(model, [data], remove=1) for data in (given, plain))
    np.testing.assert_allclose(one.scores, two.scores, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"from 64 to 64; the vocabulary is 0\.\.63"):
        search(model, [{"tokens": np.full((1, 3), 64)}], remove=1)
    with pytest.raises(ConfigError, match="next tokens; the model is of type Encoder"):
        search(model, [plain], remove=1, distance="perplexity")


def macaron():
    """A decoder whose blocks have an FFN on either side of the attention."""
    model = tiny()
    keys = jax.random.split(jax.random.key(4), 3)
    model.layers = nnx.List(
        [
            Block(
                *(block.attn_norm, block.attn, block.ffn_norm, block.ffn),
                slots=("ffn_in", "attn", "ffn"),
                others={"ffn_in": (RMSNorm(16), FFN(16, 8, key=key))},
            )
            for block, key in zip(model.layers, keys, strict=True)
        ]
    )
    return model


def test_blocks_of_three_sublayers():
    model, tokens = macaron(), batches()[0]
    stats = search(model, [tokens], remove=3, protect=None)
    assert stats.step.shape == (3, 3)
    everything = np.ones(tokens.shape, bool)
    order, _ = greedy(model, "masked", "js", 3, {"tokens": tokens}, everything)
    assert removal_order(stats) == order
    removed, _ = apply(cut(remove=3, protect=None), model, [tokens])
    assert models.removed(removed) == sorted(removal_order(stats))
    gates = (stats.step < 0).astype(np.float32)
    want = gated(model, {"tokens": tokens}, gates)
    assert jnp.abs(removed(tokens) - want).max() < 1e-5  # the same sums
    only = search(model, [tokens], remove="all", units="attention", protect=None)
    kinds = {units(model)[unit].slot for unit in removal_order(only)}
    assert kinds == {"attn"}
    blocks = search(model, [tokens], remove=1, units="block", protect=None)
    assert (blocks.step >= 0).sum(axis=1).tolist().count(3) == 1
    drawn = str(removal_map(stats, kinds=slots(model)))
    assert [line.split()[0] for line in drawn.splitlines()] == ["block", "ffn_in", "attn", "ffn"]
    with pytest.raises(ConfigError, match="for 3 sublayers"):
        removal_map(stats)
