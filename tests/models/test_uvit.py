"""U-ViT: the official network with every scaling, its loss, its samplers, training, bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import losses, models, transform
from ffnlab.cli.train import run as train_run
from ffnlab.cli.training import TrainConfig
from ffnlab.errors import ConfigError
from ffnlab.formats import load
from ffnlab.layers import LayerInputs, Linear, SkipGate, scale_skips
from ffnlab.layers.long_skips import SCALINGS
from ffnlab.learning import backprop
from ffnlab.models import UViT, UViTConfig
from ffnlab.models.noise import noised, preserving
from ffnlab.models.sample_diffusion import euler_maruyama, multistep
from ffnlab.parallel import from_table
from ffnlab.pruning import finercut
from ffnlab.quantization import nearest
from ffnlab.structure import structured
from ffnlab.testing import equal
from ffnlab.weights import Dense
from tests import hashed
from tests.fixtures.uvit import record

TOLERANCE = 1e-5  # float32, outputs of about one
CONFIG = UViTConfig(
    (record.SIDE,) * 2,
    record.PATCH,
    record.WIDTH,
    record.HIDDEN,
    record.DEPTH,
    record.HEADS,
    record.CHANNELS,
    kappa=record.KAPPA,
)
IMAGES = jnp.asarray(record.X.transpose(0, 2, 3, 1))
TIMES = jnp.asarray(record.TIMES)
run = jax.jit(lambda model, x, t: model(x, t))


@functools.cache
def uvit(scaling="original"):
    return UViT(dataclasses.replace(CONFIG, scaling=scaling), key=jax.random.key(0))


def given(name, shape):
    return jnp.asarray(hashed.parameter(name, shape))


def fill(linear, name):
    """A map with the parameters of an official linear one or convolution."""
    rows, out = linear.weight.shape
    size = getattr(linear, "size", None)
    if size is None:
        w = given(f"{name}.weight", (out, rows)).T
    else:
        w = given(f"{name}.weight", (out, rows // size**2, size, size))
        w = w.transpose(2, 3, 1, 0).reshape(rows, out)
    return linear.replace(Dense(w), None if linear.b is None else given(f"{name}.bias", (out,)))


def fill_norm(norm, name):
    for part, key in (("scale", "weight"), ("bias", "bias")):
        held = getattr(norm, part)
        setattr(norm, part, held.replace(given(f"{name}.{key}", held.get_value().shape)))


def fill_gate(gate, name):
    gate.down, gate.up = fill(gate.down, f"{name}layer1"), fill(gate.up, f"{name}layer2")


def official(scaling):
    """Our network with the parameters of the official one."""
    classes = 3 if scaling == "constant" else None
    config = dataclasses.replace(CONFIG, scaling=scaling, classes=classes)
    model, d, n = UViT(config, key=jax.random.key(0)), CONFIG.width, CONFIG.depth // 2
    model.patches = fill(model.patches, "patch_embed.proj")
    table = given("pos_embed", (1, config.tokens + 16, d))[0]
    model.positions = model.positions.replace(Dense(table))
    if classes is not None:
        held = model.label_embed.w
        model.label_embed.w = held.replace(Dense(given("label_emb.weight", (3, d))))
    names = [f"in_blocks.{i}" for i in range(n)] + ["mid_block"]
    names += [f"out_blocks.{i}" for i in range(n)]
    for block, name in zip(model.layers, names, strict=True):
        fill_norm(block.attn_norm, f"{name}.norm1")
        fill_norm(block.ffn_norm, f"{name}.norm2")
        qkv = given(f"{name}.attn.qkv.weight", (3 * d, d))
        for i, part in enumerate("qkv"):
            old = getattr(block.attn, part)
            setattr(block.attn, part, old.replace(Dense(qkv[i * d : (i + 1) * d].T)))
        block.attn.o = fill(block.attn.o, f"{name}.attn.proj")
        block.ffn.up = fill(block.ffn.up, f"{name}.mlp.fc1")
        block.ffn.down = fill(block.ffn.down, f"{name}.mlp.fc2")
    for j in range(n):
        model.fusions[j] = fill(model.fusions[j], f"out_blocks.{j}.skip_linear")
    for j, gate in enumerate(model.scaling.gates):
        fill_gate(gate, "se." if scaling == "learned" else f"se.{j}.")
    fill_norm(model.norm, "norm")
    model.head = fill(model.head, "decoder_pred")
    model.smooth = fill(model.smooth, "final_layer")
    return model


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_official_network_gives_the_same(fixtures, scaling):
    with np.load(fixtures / "uvit" / "expected.npz") as file:
        want = file[scaling].transpose(0, 2, 3, 1)
    model = official(scaling)
    labels = None if model.config.classes is None else jnp.asarray(record.LABELS)
    np.testing.assert_allclose(model(IMAGES, TIMES, labels=labels), want, atol=TOLERANCE)


def test_the_official_gate_of_as_many_tokens_as_it_divides(fixtures):
    gate = SkipGate(record.SKIP.shape[1], key=jax.random.key(0))
    fill_gate(gate, "")
    with np.load(fixtures / "uvit" / "expected.npz") as file:
        want = file["gate"] * record.SKIP
    np.testing.assert_allclose(gate(jnp.asarray(record.SKIP)), want, atol=TOLERANCE)


def test_factors_in_the_order_of_use():
    factors = scale_skips("constant", kappa=0.7).factors(6)
    np.testing.assert_allclose(factors, [0.7**5, 0.7**4, 0.7**3, 0.7**2, 0.7, 1])
    assert scale_skips("root").factors(2) == (2**-0.5,) * 2
    skips = list(jax.random.normal(jax.random.key(0), (3, 2, 20, 4)))
    for kept in (scale_skips("original"), scale_skips("constant", kappa=1.0)):
        assert equal(kept(skips), skips)
    for method, count in (("learned", 1), ("apart", 3)):
        learned = scale_skips(method, sizes=(20,) * 3, key=jax.random.key(1))
        assert len(learned.gates) == count
        gates = [y / s for y, s in zip(learned(skips), skips, strict=True)]
        for gate in gates:
            assert ((gate > 0) & (gate < 1)).all()
            np.testing.assert_allclose(gate, np.broadcast_to(gate[..., :1], gate.shape), rtol=1e-4)


def test_skips_of_a_convolutional_network_are_scaled_by_channel():
    """Three levels of images that shrink while their channels grow, innermost first."""
    shapes = [(2, 2, 2, 64), (2, 4, 4, 32), (2, 8, 8, 16)]
    skips = [jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes)]
    sizes = [s[-1] for s in shapes]
    learned = scale_skips("apart", sizes=sizes, over="channels", key=jax.random.key(0))
    for y, s in zip(learned(skips), skips, strict=True):
        gate = np.asarray(y / s)
        np.testing.assert_allclose(gate, np.broadcast_to(gate[:, :1, :1], gate.shape), rtol=1e-4)
        assert gate.std(-1).max() > 0
    constant = scale_skips("constant", kappa=0.5)(skips)
    for y, s, factor in zip(constant, skips, (0.25, 0.5, 1), strict=True):
        np.testing.assert_allclose(y, factor * s, rtol=1e-6)


@pytest.mark.parametrize("count", [4, 16, 64])
def test_the_linear_network_is_bounded_by_a_geometric_sum(count):
    """out = x + sum kappa_j s_j with all s_j = x: the Jacobian is 1 + sum kappa_j."""
    slope = lambda how: jax.grad(lambda x: x + sum(how([x] * count)))(1.0)  # noqa: E731
    assert slope(scale_skips("original")) == 1 + count
    for kappa in (0.5, 0.7):
        found = slope(scale_skips("constant", kappa=kappa))
        assert found == pytest.approx(1 + (1 - kappa**count) / (1 - kappa), rel=1e-6)
        assert found <= 1 + 1 / (1 - kappa) + 1e-6


def test_skips_are_stored_unscaled_and_used_last_first():
    """Only the fusion that a skip goes to feels its scale."""
    model = uvit()
    seen = []

    def watch(skips):
        seen.append(skips)
        return [0 * skips[0], *skips[1:]]

    changed = jax.tree.map(lambda leaf: leaf, model)
    object.__setattr__(changed, "scaling", watch)
    out = changed(IMAGES, TIMES)
    d = model.config.width
    cut = jax.tree.map(lambda leaf: leaf, model)
    w = cut.fusions[0].weight.w
    cut.fusions[0] = cut.fusions[0].replace(Dense(w.at[d:].set(0)))
    np.testing.assert_allclose(out, cut(IMAGES, TIMES), atol=TOLERANCE)
    assert len(seen[0]) == 2


@pytest.mark.parametrize("scaling", ["constant", "apart"])
def test_stacked_blocks_are_two_loops_of_the_same_function(scaling):
    model = uvit(scaling)
    stacked = models.stack(model)
    gates = jnp.linspace(0.5, 1.5, 2 * len(model.layers)).reshape(-1, 2)
    every = jax.jit(lambda m: m.run(IMAGES, TIMES, inputs=LayerInputs(gates), branches=True))
    (h, outputs), (want, wanted) = every(stacked), every(model)
    np.testing.assert_allclose(h, want, atol=TOLERANCE)
    assert jax.tree.structure(outputs) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(outputs), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def products(depth):
    """How many products a traced stack of blocks has, of a network whose loops count once."""
    config = dataclasses.replace(CONFIG, depth=depth)
    model = jax.eval_shape(lambda key: models.stack(UViT(config, key=key)), jax.random.key(0))
    return str(jax.make_jaxpr(lambda m: m(IMAGES, TIMES))(model)).count("dot_general[")


def test_a_stack_is_compiled_once_for_all_blocks():
    assert products(8) == products(4) < 60


def test_blocks_that_differ_run_in_turn_in_a_stack():
    model = uvit()
    small, _ = transform.apply(structured(rank=2), model)
    stacked = models.stack(small)
    assert len(stacked.layers.period) == len(model.layers)
    np.testing.assert_allclose(
        run(stacked, IMAGES, TIMES), run(small, IMAGES, TIMES), atol=TOLERANCE
    )
    mixed = models.stack(model)
    mixed.fusions[1] = Linear(16, 8, key=jax.random.key(0), axes=("embed", "embed"))
    assert run(mixed, IMAGES, TIMES).shape == IMAGES.shape
    with pytest.raises(ConfigError, match="the model has 5 layers"):
        model(IMAGES, TIMES, inputs=LayerInputs(jnp.ones((6, 2))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_stacked_quantized_and_cut(tmp_path, dtype):
    model = jax.tree.map(lambda leaf: leaf.astype(dtype), uvit("learned"))
    models.save(model, tmp_path / "m", format="ffnlab")
    back = load(tmp_path / "m")
    assert equal(back, model)
    stacked = models.stack(back)
    want = run(model, IMAGES, TIMES)
    np.testing.assert_allclose(run(stacked, IMAGES, TIMES), want, atol=TOLERANCE)
    assert equal(models.unstack(stacked), model)
    if dtype == "bfloat16":
        return
    packed, _ = transform.apply(nearest(format="int8", group=None), model)
    off = jnp.abs(run(packed, IMAGES, TIMES) - want).max()
    assert 0 < off < 0.1 * jnp.abs(want).max()
    cut, _ = transform.apply(
        finercut(remove=1, protect=None), model, [{"images": IMAGES, "times": TIMES}]
    )
    assert sum(getattr(b, slot) is None for b in cut.layers for slot in b.slots) == 1


@pytest.mark.slow
def test_it_is_trained_from_a_configuration_and_sampled(tmp_path):
    table = {
        "model": {"kind": "uvit", "image": [8, 8], "patch": 2, "width": 8, "hidden": 16}
        | {"depth": 2, "heads": 2, "channels": 1, "scaling": "learned"},
        "data": {"kind": "images", "batch": 8},
        "run": {"steps": 3, "log_every": 1, "dtype": "float32"},
        "optimizer": {"name": "sgd", "rate": 0.01, "warmup": 0},
    }
    out = train_run(from_table(table, TrainConfig), tmp_path / "run")
    assert 0 < out["held_out_error"] < 10
    model = load(tmp_path / "run" / "model")
    for sample in (euler_maruyama, multistep):
        images = sample(model, jax.random.key(0), shape=(2, 8, 8, 1), steps=3)
        assert images.shape == (2, 8, 8, 1) and np.isfinite(images).all()
    told = table | {"model": table["model"] | {"classes": 10}}
    with pytest.raises(ConfigError, match="told of classes has no kind of"):
        from_table(told, TrainConfig)


def test_the_loss_is_the_error_of_the_noise():
    moment = losses.Moment(jnp.int32(0), jax.random.key(3))
    images = jax.random.uniform(jax.random.key(0), (256, 4, 4, 1))
    x, t, noise = noised(images, moment.key)
    alpha, sigma = preserving(t)
    np.testing.assert_allclose(alpha**2, np.exp(-0.1 * t - 9.95 * t**2), rtol=1e-5)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-5)
    back = (x - sigma[:, None, None, None] * noise) / alpha[:, None, None, None]
    np.testing.assert_allclose(back[t < 0.5], 2 * images[t < 0.5] - 1, atol=1e-4)
    told = []
    model = lambda x, times: told.append(times) or jnp.zeros_like(x)  # noqa: E731
    mean, _ = losses.denoising(model, images, moment)
    assert mean == pytest.approx(float(jnp.mean(noise**2)), rel=1e-6)
    np.testing.assert_allclose(told[0], 999 * t, rtol=1e-6)
    perfect = losses.denoising(lambda x, times: noise, images, moment)[0]
    assert perfect == 0


def gaussian(spread):
    """The best finder of noise in independent normal pixels of a deviation."""

    def model(x, times):
        alpha, sigma = (v[:, None, None, None] for v in preserving(times / 999))
        return sigma * x / (alpha**2 * spread**2 + sigma**2)

    return jax.tree_util.Partial(model)


def test_samplers_draw_what_was_learned():
    """Of normal data: the ODE scales x by a known factor, the SDE gives the spread."""
    spread, shape, key = 0.5, (64, 8, 8, 1), jax.random.key(1)
    start = jax.random.normal(key, shape)

    def deviation(t):
        alpha, sigma = preserving(jnp.float32(t))
        return jnp.sqrt((alpha * spread) ** 2 + sigma**2)

    exact = start * deviation(1e-3) / deviation(1.0)
    errors = []
    for steps in (20, 40, 80):
        x = 2 * multistep(gaussian(spread), key, shape=shape, steps=steps) - 1
        errors.append(float(jnp.abs(x - exact).max()))
    assert errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3  # second order: about 4
    x = 2 * euler_maruyama(gaussian(spread), key, shape=shape, steps=500) - 1
    assert float(x.std()) == pytest.approx(spread, rel=0.05) and abs(float(x.mean())) < 0.03


@pytest.mark.slow
def test_a_step_learns():
    rule = backprop(losses.denoising, optax.adam(1e-2), informed=True)
    images = jnp.ones((16, 8, 8, 2)) * 0.5
    state = rule.init(jax.tree.map(jnp.copy, uvit("apart")), jax.random.key(0))
    found = []
    for _ in range(20):
        state, metrics = rule.step(state, images)
        found.append(float(metrics["loss"]))
    assert np.mean(found[-5:]) < np.mean(found[:3])
    gate, old = rule.model(state).scaling.gates[1].up, uvit("apart").scaling.gates[1].up
    assert np.abs(gate.weight.w - old.weight.w).max() > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depth": 3}, "depth=3 must be even"),
        ({"image": (8, 9)}, "must be multiples of patch=2"),
        ({"heads": 3}, "width=8 must be a multiple of heads=3"),
        ({"scaling": "half"}, "method='half' is not one of"),
        ({"kappa": 0.0}, r"kappa=0.0 must lie in \(0, 1\]"),
        ({"kappa": 1.5}, "kappa=1.5"),
        ({"kappa": float("nan")}, "kappa=nan"),
        (
            {"image": (4, 4), "scaling": "learned"},
            "size=5: a learned gate needs at least 16 tokens",
        ),
        ({"width": 0}, "width=0 must be a positive integer"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(CONFIG, **change)


def test_calls_that_do_not_fit_are_refused():
    assert scale_skips("constant", kappa=1.5, allow=True).factors(2) == (1.5, 1.0)
    for options, said in (
        ({"method": "learned"}, "needs a key and sizes"),
        ({"method": "learned", "sizes": (16, 32), "key": jax.random.key(0)}, "differ"),
        (
            {"method": "apart", "sizes": (16,), "key": jax.random.key(0), "over": "rows"},
            "over='rows'",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            scale_skips(**options)
    apart = scale_skips("apart", sizes=(16,), key=jax.random.key(0))
    with pytest.raises(ConfigError, match="2 skips for 1 gates"):
        apart([jnp.ones((1, 16, 2))] * 2)
    with pytest.raises(ConfigError, match="kappa=inf"):
        scale_skips("constant", kappa=float("inf"), allow=True)
    for over, shape in (
        ("tokens", (1, 17, 4)),
        ("tokens", (1, 4, 16, 4)),  # an image: its last side is no number of tokens
        ("channels", (1, 4, 4, 17)),
    ):
        gate = SkipGate(16, key=jax.random.key(0), over=over)
        with pytest.raises(ConfigError, match=f"is accepted by gates of {over}"):
            gate(jnp.ones(shape))
    with pytest.raises(ConfigError, match=r"images \(3, 4, 4, 2\)"):
        uvit()(IMAGES[:, :4, :4], TIMES)
    with pytest.raises(ConfigError, match="labels=True of a model with classes=None"):
        uvit()(IMAGES, TIMES, labels=jnp.zeros(3, jnp.int32))
    for sample in (euler_maruyama, multistep):
        with pytest.raises(ConfigError, match="steps=0"):
            sample(gaussian(1.0), jax.random.key(0), shape=(1, 8, 8, 2), steps=0)
        with pytest.raises(ConfigError, match=r"shape=\(1, 8\)"):
            sample(gaussian(1.0), jax.random.key(0), shape=(1, 8))
