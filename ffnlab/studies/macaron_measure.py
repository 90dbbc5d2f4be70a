"""What the study of the Macaron measures: errors of splittings, a trained decoder, and training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from ffnlab import models, transform
from ffnlab.data import TextBatches, stdlib_text, validation_split
from ffnlab.formats.embedded import embedded
from ffnlab.layers import Block, Context
from ffnlab.learning import backprop, members
from ffnlab.losses import next_token
from ffnlab.models import Decoder, DecoderConfig, Encoder, EncoderConfig, trunk
from ffnlab.models.account import parameters
from ffnlab.models.cost import multiply_adds
from ffnlab.rule import Rule
from ffnlab.structure.macaron import euler, exact, lie, macaron, slope, strang
from ffnlab.studies.side_by_side import learned_members

__all__ = [
    "FULL",
    "QUICK",
    "SCHEMES",
    "STEPS",
    "WAYS",
    "Counts",
    "Errors",
    "Kept",
    "Run",
    "Sizes",
    "compared",
    "counts",
    "kept",
    "linear_errors",
    "trained_errors",
]

WIDTH, HIDDEN, LAYERS, HEADS, BATCH, LENGTH = 64, 256, 4, 4, 32, 64
# What is trained: None is the block of two slots, else options of `macaron`.
WAYS: Mapping[str, Mapping[str, float] | None] = {
    "attention, FFN": None,
    "Macaron": {"scale": 0.5},
    "Macaron, whole steps": {"scale": 1.0},
}
STEPS = tuple(2.0**-k for k in range(2, 8))  # h of linear fields, as in the paper's setting of ODEs
OWN_STEPS = tuple(2.0**-k for k in range(6))  # h of a trained decoder's fields; its own is 1
DIMENSIONS = 8  # of linear fields
SCHEMES = {"Lie": lie, "Strang": strang}
SUBSTEPS = 32  # of the Runge-Kutta scheme that a step is held against


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      seeds: of every way, with the rate that the first one chose.
      rates: of Adam, that every way tries.
      steps: of training.
      validation, test: windows of held-out text to choose by, and to report.
      draws: of linear fields.
      ways: which of `WAYS`.
    """

    seeds: int
    rates: tuple[float, ...]
    steps: int
    validation: int
    test: int
    draws: int
    ways: tuple[str, ...]


FULL = Sizes(3, (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), 700, 400, 1000, 20, tuple(WAYS))
QUICK = Sizes(1, (4e-3,), 100, 100, 100, 20, tuple(WAYS)[:2])


class Errors(NamedTuple):
    """Errors of one step, by scheme.

    Attributes:
      sizes: h of the steps.
      errors: of each draw, or layer, and size, [n, k].
      slopes: exponent of h of each draw or layer, [n].
    """

    sizes: tuple[float, ...]
    errors: Mapping[str, Float[np.ndarray, "n k"]]
    slopes: Mapping[str, Float[np.ndarray, "n"]]


def linear_errors(draws: int, seed: int) -> Errors:
    """Linear fields x -> A x and x -> F x, entries N(0, 1 / n), in float64: their exact flows, and
    Euler's steps, split both ways."""
    draw, n = np.random.default_rng(seed), DIMENSIONS
    found: dict[str, list] = {}
    for _ in range(draws):
        a, f = draw.normal(size=(2, n, n)) / n**0.5
        x, truth = draw.normal(size=n), exact(a + f)
        flows = {"exact": (exact(a), exact(f))}
        flows["Euler"] = (euler(lambda x, a=a: a @ x), euler(lambda x, f=f: f @ x))
        for inside, parts in flows.items():
            for name, split in SCHEMES.items():
                one = slope(split(*parts), truth, x, STEPS)
                found.setdefault(f"{name}, {inside}", []).append(one)
    return collected(STEPS, found)


def collected(sizes: Sequence[float], found: Mapping[str, Sequence[tuple]]) -> Errors:
    """What `slope` gave, by scheme."""
    slopes, errors = (
        {name: np.array([one[i] for one in each]) for name, each in found.items()} for i in (0, 1)
    )
    return Errors(tuple(sizes), errors, slopes)


def trained_errors(tokens: Int[Array | np.ndarray, "b t"]) -> Errors:
    """The fields of the embedded decoder's blocks, at the stream that comes to them.

    The FFN's flow is taken for h / 2 twice, or once for h, by one step of Euler each. The truth is
    a Runge-Kutta scheme of the fourth order. Errors are over the length of what h = 1 adds.
    """
    model, tokens = embedded()[0], jnp.asarray(tokens)
    angles = trunk.angles(model.layers, jnp.arange(tokens.shape[1])[None])
    context = Context(angles, {spec.window: None for spec in trunk.specs(model.layers)})
    found: dict[str, list] = {}
    h = model.embed_tokens(tokens)
    run = jax.jit(lambda block, x: block(x, context)[0])
    steps = {
        name: jax.jit(lambda block, x, h, split=split: split(*flows_of(block, context))(x, h))
        for name, split in SCHEMES.items()
    }
    reference = jax.jit(lambda block, x, h: runge_kutta(block, context, x, h))
    for block in model.blocks():
        truth = lambda x, h, block=block: reference(block, x, h)  # noqa: E731
        length = float(jnp.linalg.norm(run(block, h) - h))
        for name, step in steps.items():
            taken = lambda x, h, step=step, block=block: step(block, x, h)  # noqa: E731
            power, errors = slope(taken, truth, h, OWN_STEPS)
            found.setdefault(f"{name}, Euler", []).append((power, errors / length))
        h = run(block, h)
    return collected(OWN_STEPS, found)


def flows_of(block: Block, context: Context) -> tuple[Callable, Callable]:
    """Euler's steps along attention and FFN of a block, each of the normed stream."""
    attention, ffn = (block.without(name) for name in ("ffn", "attn"))
    return tuple(euler(lambda x, b=b: b(x, context)[0] - x) for b in (attention, ffn))  # type: ignore[return-value]


def runge_kutta(block: Block, context: Context, x: Array, h: float | Array) -> Array:
    """Where dx/dt = A(x) + F(x) is after a time of h."""
    parts = [block.without(name) for name in ("ffn", "attn")]
    step = h / SUBSTEPS

    def field(x: Array) -> Array:
        return sum((part(x, context)[0] - x for part in parts), jnp.zeros_like(x))

    def one(_: Any, x: Array) -> Array:
        a = field(x)
        b = field(x + step / 2 * a)
        c = field(x + step / 2 * b)
        d = field(x + step * c)
        return x + step / 6 * (a + 2 * b + 2 * c + d)

    return jax.lax.fori_loop(0, SUBSTEPS, one, x)


class Kept(NamedTuple):
    """The embedded decoder as a Macaron, untrained.

    Attributes:
      nats: held-out nats per byte, by `start`; "" as it was, "moved" with the FFN before the
        attention.
      change: largest change of a logit over the largest logit, likewise.
    """

    nats: Mapping[str, float]
    change: Mapping[str, float]


def kept(tokens: Int[Array | np.ndarray, "b t"]) -> Kept:
    """What becomes of a trained decoder's function."""
    model, tokens = embedded()[0], jnp.asarray(tokens)
    forms = {"": model}
    for start in ("kept", "twice", "split"):
        forms[start] = transform.apply(macaron(start=start), model)[0]
    moved = jax.tree.map(lambda leaf: leaf, forms["kept"])
    for block in moved.layers:
        block.ffn_in, block.ffn = block.ffn, block.ffn_in
    forms["moved"] = moved

    @jax.jit
    def of(model: Decoder) -> tuple[Array, Array]:
        logits = model(tokens[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return nats.mean(), logits

    found = {name: of(form) for name, form in forms.items()}
    was = found[""][1]
    change = {n: float(jnp.abs(y - was).max() / jnp.abs(was).max()) for n, (_, y) in found.items()}
    return Kept({name: float(nats) for name, (nats, _) in found.items()}, change)


class Counts(NamedTuple):
    """What a Macaron of half the width has more than the model of two slots.

    Attributes:
      parameters: of each layer, over the width, by model.
      products: multiplications over those of the model of two slots.
    """

    parameters: Mapping[str, float]
    products: float


def counts() -> Counts:
    """Of a decoder of RMS norms without biases, and of an encoder of layer norms with biases."""
    sizes = {"width": WIDTH, "hidden": HIDDEN, "layers": LAYERS, "heads": HEADS}
    sizes |= {"vocab": 256, "head_dim": WIDTH // HEADS}
    key = jax.random.key(0)
    forms: dict[str, Any] = {
        "decoder": Decoder(DecoderConfig(kv_heads=HEADS, **sizes), key=key),
        "encoder": Encoder(EncoderConfig(norm="before", **sizes), key=key),
    }
    more, work, tokens = {}, {}, jnp.zeros((1, LENGTH), jnp.int32)
    for name, model in forms.items():
        new, _ = transform.apply(macaron(), model)
        more[name] = (parameters(new) - parameters(model)) / (LAYERS * WIDTH)
        products = [multiply_adds(lambda m: m(tokens), m) for m in (new, model)]
        work[name] = products[0] / products[1]
    return Counts(more, max(work.values()))


class Run(NamedTuple):
    """What one way reached.

    Attributes:
      rate: chosen by the validation windows with the first seed.
      tried: validation nats of each rate.
      nats: of the test windows, per byte, by seed.
      parameters: of the model.
    """

    rate: float
    tried: Mapping[float, float]
    nats: tuple[float, ...]
    parameters: int


def decoder(way: str, seed: int) -> Decoder:
    """A decoder of bytes, with an FFN as the paper's: ungated, with biases."""
    config = DecoderConfig(
        vocab=256,
        width=WIDTH,
        hidden=HIDDEN,
        layers=LAYERS,
        heads=HEADS,
        kv_heads=HEADS,
        head_dim=WIDTH // HEADS,
        activation="gelu",
        mlp_bias=True,
        ffns=("plain",) * LAYERS,
    )
    model, options = Decoder(config, key=jax.random.key(seed)), WAYS[way]
    if options is not None:
        model, _ = transform.apply(macaron(**options, seed=seed), model)
    return models.stack(model)


def compared(sizes: Sizes, seed: int) -> dict[str, Run]:
    """Every way, tuned alike: the rate by the first seed, then the other seeds with that."""
    whole = stdlib_text()
    text = validation_split(whole)
    chosen, reported = (
        windows(part, count)
        for part, count in ((text.held_out, sizes.validation), (whole.held_out, sizes.test))
    )
    return {way: run_of(way, sizes, seed, text.train, chosen, reported) for way in sizes.ways}


def windows(text: bytes, count: int) -> Int[Array, "b t"]:
    """Windows of a held-out text, spread over it."""
    return jnp.asarray(TextBatches(text, count, LENGTH, 0)(0))


def run_of(way: str, sizes: Sizes, seed: int, text: bytes, chosen: Array, reported: Array) -> Run:
    """One way of building a block."""
    rates = list(sizes.rates)
    found = learned(way, text, rates, [seed] * len(rates), sizes.steps)
    scores = [nats_of(model, chosen) for model in found]
    best = int(np.argmin(scores))
    kept = [found[best]]
    if sizes.seeds > 1:
        seeds = [seed + i for i in range(1, sizes.seeds)]
        kept += learned(way, text, [rates[best]] * len(seeds), seeds, sizes.steps)
    nats = tuple(nats_of(model, reported) for model in kept)
    tried = dict(zip(rates, scores, strict=True))
    return Run(rates[best], tried, nats, parameters(kept[0]))


def learned(
    way: str, text: bytes, rates: Sequence[float], seeds: Sequence[int], steps: int
) -> list[Decoder]:
    """Decoders trained side by side, on the same windows."""

    def one(rate: float | Array) -> Rule:
        return backprop(next_token, optax.adam(rate))

    joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(decoder(way, s) for s in seeds))
    rule = members(one, len(rates), vary={"rate": list(rates)})
    batches = TextBatches(text, BATCH, LENGTH, seeds[0])
    return learned_members(rule, joined, batches, steps, seeds[0], len(rates))


@jax.jit
def mean_nats(model: Decoder, rows: PyTree) -> Float[Array, ""]:
    """Nats per byte of windows, a hundred at a time."""
    return jnp.mean(jax.lax.map(lambda part: next_token(model, part)[0], rows))


def nats_of(model: Decoder, rows: Int[Array, "b t"]) -> float:
    """Nats per byte of windows, whose number is a multiple of a hundred."""
    return float(mean_nats(model, rows.reshape(-1, 100, rows.shape[1])))
