"""PAL's designs against a plain loop over layers; what they cost; decoding; what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab import formats, models, transform, tree
from ffnlab.errors import ConfigError
from ffnlab.layers.attention.rope import rotate, tables
from ffnlab.learning import backprop, next_token
from ffnlab.models import AudioInput, Decoder, DecoderConfig, account
from ffnlab.models.cost import multiply_adds
from ffnlab.parallel import make_step, parse_mesh, shard
from ffnlab.parallel.sharding import place_batch
from ffnlab.pruning import finercut
from ffnlab.quantization import fireq
from ffnlab.routing import pal, upcycle
from ffnlab.routing.pal import Sounds
from ffnlab.testing import equal, tiny, tiny_encoder
from tests.often import often

TOLERANCE = 2e-5  # float32 sums in other orders; logits of order 1
KEY = jax.random.key(3)
TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 0, 64)
FEATURES = tuple(
    jax.random.normal(jax.random.fold_in(KEY, c), (2, n, c)) for n, c in ((5, 3), (4, 7))
)
VALID = (jnp.array([[1, 1, 0, 1, 0], [1] * 5]) > 0, jnp.array([[0, 1, 1, 1], [1, 1, 0, 0]]) > 0)
SOUNDS = Sounds(FEATURES, VALID)
DESIGNS = {
    "plits": AudioInput((3, 7), ("prepended", "prepended")),
    "late": AudioInput((3, 7), ("prepended", "prepended"), start=1, indexed=True),
    "attended": AudioInput((3, 7), ("attended", "attended"), indexed=True),
    "late and attended": AudioInput((3, 7), ("attended", "attended"), start=2, hidden=6),
    "hybrid": AudioInput((3, 7), ("prepended", "attended"), start=1),
}


@functools.cache
def made(name, **options):
    audio = dataclasses.replace(DESIGNS[name], **options)
    return transform.apply(pal.connect(audio, seed=4), tiny())[0]


@jax.jit
def logits_of(model, sounds, tokens):
    return pal.hear(model, sounds)(tokens)


plain = jax.jit(lambda model, tokens: model(tokens))


def difference(a, b):
    return float(jnp.abs(jnp.asarray(a) - b).max())


def brute(model, sounds, tokens):
    """One loop over layers on [audio; text]: audio rows are either frozen, or go along."""
    config, audio, t = model.config, model.config.audio, tokens.shape[1]
    heads, kv_heads, width = config.heads, config.kv_heads, config.head_dim
    rows = {"attended": [], "prepended": []}
    for features, valid, connector, way in zip(*sounds, model.connectors, audio.ways, strict=True):
        places = jnp.arange(features.shape[1]) * audio.indexed
        rows[way].append((connector(features), valid, places))
    nothing = (jnp.zeros((2, 0, config.width)), jnp.zeros((2, 0), bool), jnp.zeros(0, int))
    frozen, moving = (
        [
            jnp.concatenate(x, axis=-1 if x[0].ndim == 1 else 1)
            for x in zip(*(rows[way] or [nothing]), strict=True)
        ]
        for way in ("attended", "prepended")
    )
    text, stream = model.embed(tokens), moving[0]
    for layer, block in enumerate(model.layers):
        hears = layer >= audio.start
        a, m = (frozen[0].shape[1], stream.shape[1]) if hears else (0, 0)
        h = jnp.concatenate([stream[:, :m], text], axis=1)
        z = jnp.concatenate([block.attn_norm(frozen[0][:, :a]), block.attn_norm(h)], axis=1)
        places = jnp.concatenate([frozen[2][:a], moving[2][:m], jnp.arange(t)])
        there = [frozen[1][:, :a], moving[1][:, :m], jnp.ones((2, t), bool)]
        turn = tables(config.rope, width, places[None])
        q, k = (
            rotate(part(z).reshape(2, a + m + t, n, width), *turn)
            for part, n in ((block.attn.q, heads), (block.attn.k, kv_heads))
        )
        q, k = q[:, a:], jnp.repeat(k, heads // kv_heads, axis=2)
        v = block.attn.v(z).reshape(2, a + m + t, kv_heads, width)
        v = jnp.repeat(v, heads // kv_heads, axis=2)
        order = jnp.arange(m + t)
        seen = jnp.concatenate([jnp.ones((m + t, a), bool), order[:, None] >= order], axis=1)
        seen = seen & jnp.concatenate(there, axis=1)[:, None]
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / width**0.5
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30))
        mixed = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(2, m + t, -1)
        h = h + block.attn.o(mixed)
        h = h + block.ffn(block.ffn_norm(h))
        stream, text = (h[:, :m] if hears else stream), h[:, m:]
    return model.logits(text)


@pytest.mark.parametrize("name", DESIGNS)
def test_a_design_is_a_plain_loop_over_layers(name):
    model = made(name)
    want = brute(model, SOUNDS, TOKENS)
    assert difference(want, model(TOKENS)) > 1e-2, "sound matters"
    assert difference(logits_of(model, SOUNDS, TOKENS), want) < TOLERANCE
    stacked = models.stack(model)
    assert difference(logits_of(stacked, SOUNDS, TOKENS), want) < TOLERANCE
    assert isinstance(pal.hear(stacked, SOUNDS).layers, models.Stacked)
    assert equal(model, made(name)), "the argument is intact"


@pytest.mark.parametrize("name", DESIGNS)
def test_without_sound_it_is_the_text_model(name):
    model = made(name)
    alone = plain(model, TOKENS)
    assert difference(alone, plain(tiny(), TOKENS)) == 0
    limit = 1e-6 * float(jnp.abs(alone).max())  # float32, keys in another order
    silent = Sounds(FEATURES, tuple(jnp.zeros_like(mask) for mask in VALID))
    assert difference(logits_of(model, silent, TOKENS), alone) < limit
    empty = Sounds(tuple(f[:, :0] for f in FEATURES))
    assert difference(logits_of(model, empty, TOKENS), alone) < limit
    deaf = made(name, start=3)
    assert difference(logits_of(deaf, SOUNDS, TOKENS), alone) < limit


@pytest.mark.parametrize("name", ["plits", "hybrid"])
def test_what_padding_holds_counts_for_nothing(name):
    model = made(name)
    spoilt = tuple(jnp.where(v[..., None], f, jnp.nan) for f, v in zip(*SOUNDS, strict=True))

    def loss(model, sounds):
        return jnp.sum(jnp.sin(logits_of(model, sounds, TOKENS)))

    want, found = (jax.value_and_grad(loss)(model, Sounds(f, VALID)) for f in (FEATURES, spoilt))
    assert equal(found, want)
    longer = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 2), (0, 0)][: x.ndim]), SOUNDS)
    assert (
        difference(logits_of(model, longer, TOKENS), logits_of(model, SOUNDS, TOKENS)) < TOLERANCE
    )


@settings(max_examples=5)
@given(order=st.permutations(range(5)))
def test_the_order_of_attended_rows_without_places_counts_for_nothing(order):
    model = made("late and attended")
    order = jnp.array(order)
    turned = Sounds((FEATURES[0][:, order], FEATURES[1]), (VALID[0][:, order], VALID[1]))
    assert (
        difference(logits_of(model, turned, TOKENS), logits_of(model, SOUNDS, TOKENS)) < TOLERANCE
    )


def test_padding_of_a_sound_is_not_routed():
    """Where experts have little room, padding before the sound takes none of it."""
    model, _ = transform.apply(upcycle(experts=2, k=1, capacity=1.0), tiny())
    design = AudioInput((3,), ("prepended",), indexed=False)
    model, _ = transform.apply(pal.connect(design), model)
    sound = jax.random.normal(jax.random.key(0), (1, 4, 3))
    padding = jnp.zeros((1, 4, 3))
    tokens = jax.random.randint(jax.random.key(1), (1, 6), 0, 64)
    after, before = (jnp.concatenate(parts, 1) for parts in ((sound, padding), (padding, sound)))
    is_sound = jnp.arange(8)[None] < 4
    found = [
        logits_of(model, Sounds((features,), (mask,)), tokens)
        for features, mask in ((after, is_sound), (before, ~is_sound))
    ]
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def test_rows_of_a_batch_hear_their_own_sound_or_one_for_all():
    model = made("hybrid")
    out = logits_of(model, SOUNDS, TOKENS)
    first = jax.tree.map(lambda x: x[:1], SOUNDS)
    assert difference(logits_of(model, first, TOKENS)[0], out[0]) < TOLERANCE
    assert difference(logits_of(model, first, TOKENS)[1], out[1]) > 1e-3
    with pytest.raises(ConfigError, match="3 rows, .* beside them is of 2; as many or 1"):
        pal.hear(model, SOUNDS)(jnp.zeros((3, 4), jnp.int32))


def test_windows_are_of_text_and_soft_caps_of_all():
    config = DecoderConfig(
        *(64, 16, 32, 2, 4, 2, 4), windows=(2, None), attn_softcap=5.0, audio=DESIGNS["hybrid"]
    )
    model = Decoder(config, key=KEY)
    heard = pal.hear(model, SOUNDS)
    far = heard.layers[1].attn
    assert far.beside.get_value().shape == (2, 9, 2, 4)
    other = jax.tree.map(lambda x: x[:, ::-1] if x.ndim == 3 else x, SOUNDS)
    changed = jnp.abs(pal.hear(model, other)(TOKENS) - heard(TOKENS)).max(axis=(0, 2))
    assert (changed > 1e-4).all(), "every token hears, however far from the beginning"


# Decoding


@pytest.mark.parametrize("kv", often([None, "int4"], None))
def test_what_is_generated_is_what_the_whole_text_says(kv):
    """Greedy tokens against a pass over the whole text for each, keys rounded alike."""
    model = made("hybrid")
    if kv is not None:
        spec = lambda a: dataclasses.replace(a.spec, kv_format=kv)  # noqa: E731
        where = tree.of_type(models.decoder.Attention)
        model = tree.map_at(model, where, lambda a: with_spec(a, spec(a)))
    heard = pal.hear(model, SOUNDS)
    made_of = models.generate(heard, TOKENS, max_tokens=4).tokens
    text = TOKENS
    for _ in range(4):
        text = jnp.concatenate([text, heard(text)[:, -1:].argmax(-1)], axis=1)
    assert np.array_equal(made_of, text[:, 6:])
    silent = models.generate(model, TOKENS, max_tokens=4).tokens
    assert not np.array_equal(made_of, silent)


def with_spec(attention, spec):
    new = tree.copy(attention)
    new.spec = spec
    return new


@pytest.mark.parametrize("name", DESIGNS)
def test_a_decoded_token_pays_for_looking_at_the_sound_and_for_nothing_else(name):
    model, token = made(name), TOKENS[:, :1]
    step = lambda m: m.extend(token, m.init_cache(2, 8))[0]  # noqa: E731
    more = multiply_adds(step, pal.hear(model, SOUNDS)) - multiply_adds(step, model)
    layers = 3 - model.config.audio.start
    assert more == 2 * 2 * (5 + 4) * 16 * layers  # scores and sums of 16 channels, two rows


# Cost


def ffn_rows(fn, *args, shape):
    """Rows of every product with a matrix of a shape in a jaxpr."""
    found = []

    def look(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                left, right = (v.aval.shape for v in equation.invars)
                if right == shape:
                    found.append(int(np.prod(left[:-1])))
            for value in jax.tree.leaves(list(equation.params.values())):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    look(inner)

    look(jax.make_jaxpr(fn)(*args).jaxpr)
    return found


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("attended", [12] * 6),
        ("late and attended", [12] * 6),
        ("plits", [18, 18] * 3 + [12] * 6),
        ("hybrid", [10, 10] * 2 + [12] * 6),
    ],
)
def test_rows_that_pass_an_ffn(name, rows):
    """Gate and up of [16, 32]: 12 rows are text, 18 = 2 (5 + 4) sound of both encoders."""
    found = ffn_rows(lambda m, s: pal.hear(m, s)(TOKENS), made(name), SOUNDS, shape=(16, 32))
    assert sorted(found) == sorted(rows)


def cost(way, factor, tokens=8):
    audio = AudioInput((16,), (way,))
    model = jax.eval_shape(
        lambda key: Decoder(DecoderConfig(64, 32, 88, 2, 4, 4, 8, audio=audio), key=key), KEY
    )
    shapes = ((1, factor * tokens, 16), jnp.float32), ((1, tokens), jnp.int32)
    features, text = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    return multiply_adds(lambda m, f, x: pal.hear(m, Sounds((f,)))(x), model, features, text)


def test_attended_sound_is_cheaper_the_more_there_is():
    ratios = [cost("attended", n) / cost("prepended", n) for n in (1, 2, 4, 8)]
    assert ratios[-1] <= 0.35
    assert ratios == sorted(ratios, reverse=True)


# Models


def test_a_decoder_of_a_configuration_has_what_the_transform_gives():
    audio = DESIGNS["hybrid"]
    config = dataclasses.replace(tiny().config, audio=audio)
    drawn, connected = Decoder(config, key=KEY), made("hybrid")
    assert jax.tree.structure(drawn) == jax.tree.structure(connected)
    assert jax.tree.structure(models.decoder.abstract(config)) == jax.tree.structure(drawn)
    assert connected.config == config
    assert account.flops_per_token(connected, 6) == account.flops_per_token(tiny(), 6)


def test_it_learns_by_backpropagation_all_of_it_or_the_connectors_alone():
    model = made("hybrid")
    for trainable in (None, pal.TRAINS):
        rule = backprop(pal.heard(next_token), optax.sgd(0.1), trainable=trainable)
        state = rule.init(model, KEY)
        first = None
        for _ in range(3):
            state, metrics = rule.step(state, (SOUNDS, TOKENS))
            first = metrics["loss"] if first is None else first
        assert metrics["loss"] < first
        learned = rule.model(state)
        assert equal(learned.layers, model.layers) == (trainable is not None)
        assert not equal(learned.connectors, model.connectors)


def test_saved_loaded_cut_and_quantized(tmp_path):
    model = made("hybrid")
    formats.save(model, tmp_path / "model", format="ffnlab")
    assert equal(formats.load(tmp_path / "model"), model)
    with pytest.raises(ConfigError, match=r"no place for connectors\[0\].*format=\"ffnlab\""):
        formats.save(model, tmp_path / "foreign")
    assert not (tmp_path / "foreign").exists()
    # Both calibrate on the model that hears, and rewrite the one that does not.
    heard = pal.hear(model, SOUNDS)
    cut = finercut(remove=2, protect=None)
    stats = transform.calibrate(cut, heard, [np.asarray(TOKENS)], progress=False)
    short = cut.rewrite(model, stats)
    assert len(models.removed(short)) == 2
    assert difference(logits_of(short, SOUNDS, TOKENS), brute_removed(heard, stats)) < TOLERANCE
    step = fireq(group=8, top_k=1)
    small = step.rewrite(
        short, transform.calibrate(step, pal.hear(short, SOUNDS), [np.asarray(TOKENS)])
    )
    formats.save(small, tmp_path / "small", format="ffnlab")
    again = formats.load(tmp_path / "small")
    assert tree.nbytes(again) < tree.nbytes(short)
    out, want = (logits_of(m, SOUNDS, TOKENS) for m in (again, short))
    assert 0 < difference(out, want) < 0.5 * float(jnp.std(want)) * 6
    assert models.generate(pal.hear(again, SOUNDS), TOKENS, max_tokens=2).tokens.shape == (2, 2)


def brute_removed(heard, stats):
    """Gates in place of removal, in the text; the stream of sound is not gated."""
    gates = jnp.asarray(stats.step < 0, jnp.float32)
    return heard(TOKENS, inputs=models.decoder.LayerInputs(gates=gates))


# What is refused


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"widths": ()}, r"widths=\(\)"),
        ({"widths": (3, 0)}, r"widths=\(3, 0\)"),
        ({"ways": ("prepended",)}, r"ways=\('prepended',\).*2 encoders"),
        ({"ways": ("prepended", "mixed")}, "'mixed'.*'attended'"),
        ({"start": -1}, "start=-1"),
        ({"hidden": -2}, "hidden=-2"),
    ],
)
def test_designs_that_cannot_be(options, told):
    with pytest.raises(ConfigError, match=told):
        dataclasses.replace(DESIGNS["hybrid"], **options)


def test_models_that_cannot_hear():
    late = AudioInput((3,), ("attended",), start=4)
    for wrong, model, told in (
        (late, tiny(), "start=4 is beyond layers=3"),
        (DESIGNS["plits"], made("plits"), "has connectors already"),
        (DESIGNS["plits"], object(), "model is a object; a Decoder"),
        (DESIGNS["plits"], tiny_encoder(), "pal: a Encoder is no Decoder"),
    ):
        with pytest.raises(ConfigError, match=told):
            transform.apply(pal.connect(wrong), model)
    with pytest.raises(ConfigError, match="no connectors; pal.connect"):
        pal.hear(tiny(), SOUNDS)
    with pytest.raises(ConfigError, match="hears already"):
        pal.hear(pal.hear(made("plits"), SOUNDS), SOUNDS)


@pytest.mark.parametrize(
    ("sounds", "told"),
    [
        (Sounds(FEATURES[:1]), r"\[b, n, 3\], \[b, n, 7\] for each"),
        (Sounds(FEATURES[::-1]), r"\(2, 4, 7\), \(2, 5, 3\)\]; one array \[b, n, 3\]"),
        (Sounds((FEATURES[0][0], FEATURES[1])), r"features \[\(5, 3\)"),
        (Sounds((FEATURES[0][:1], FEATURES[1])), r"features \[\(1, 5, 3\)"),
        (Sounds(FEATURES, VALID[:1]), r"valid \[\(2, 5\)\]; .*\[\(2, 5\), \(2, 4\)\]"),
        (Sounds(FEATURES, (VALID[0], VALID[1][:, :3])), r"valid .*\(2, 3\)"),
    ],
)
def test_sounds_that_are_refused(sounds, told):
    with pytest.raises(ConfigError, match=told):
        pal.hear(made("hybrid"), sounds)


@pytest.mark.slow
def test_a_mesh_learns_the_same():
    model, sounds = made("hybrid"), SOUNDS
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x]), (sounds, TOKENS))
    rule = backprop(pal.heard(next_token), optax.sgd(0.1))
    want, metrics = rule.step(rule.init(model, KEY), batch)
    mesh = parse_mesh("dp=4,tp=2")
    state = shard(rule.init(models.stack(model), KEY), mesh)
    found, again = make_step(rule, mesh)(state, place_batch(batch, mesh))
    assert difference(again["loss"], metrics["loss"]) < TOLERANCE
    trained = models.unstack(jax.device_get(rule.model(found)))
    pairs = zip(jax.tree.leaves(trained), jax.tree.leaves(rule.model(want)), strict=True)
    assert max(difference(a, b) for a, b in pairs) < 1e-4  # gradients of order 1 times 0.1
