"""PfLayer: bottlenecks and transformer blocks whose mixing learns nothing, on 8 x 8 digits.

The paper's counts, of parameters and of products, are repeated on its own sizes without training
anything. What can be learned is asked of small networks: five spatial steps in the same
bottlenecks, and a vision transformer with and without parameter-free layers, each tuned alike on
validation rows.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from ffnlab import transform
from ffnlab.bench import bottleneck
from ffnlab.data import Labelled, as_images, digits
from ffnlab.learning import backprop, members
from ffnlab.losses import labelled, measuring
from ffnlab.models import ResNet, ResNetConfig, ViT, ViTConfig, account, resnet50
from ffnlab.models.cost import multiply_adds
from ffnlab.models.vit import abstract
from ffnlab.rule import Rule
from ffnlab.storage.files import StrPath
from ffnlab.structure import pflayer
from ffnlab.studies import STUDIES, tuning
from ffnlab.studies.classify import grouped_bars, learned
from ffnlab.studies.result import Claim, Result

__all__ = ["Reached", "Sizes", "run"]

OPS = ("conv", "depthwise", "max", "average", "identity")
ATTENTION, MIXED = "attention", "attention and max"
BATCH, STEPS, QUICK_STEPS = 32, 400, 200
DIGITS = "8 x 8 digits of scikit-learn: 1150 rows, 287 for validation, 360 test"
NETWORK = ResNetConfig(
    (4,), (16,), 10, channels=1, image=(8, 8), block="bottleneck", expansion=2, stem_width=32
)
TRANSFORMER = ViTConfig((8, 8), 2, 32, 128, 4, 4, channels=1, classes=10, pool="mean")
# Sizes of the paper's own networks: parameters, and thousand millions of products.
PAPER = {"conv": (25_557_032, 4.1), "max": (14_232_232, 2.2), "hybrid": (17_330_600, 2.6)}
TRANSFORMERS = {192: 6_159_400, 384: 23_819_368, 768: 93_644_008}


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      seeds: of networks.
      rates: of AdamW, that each side tries.
      ops: spatial steps that are trained.
      steps: of training.
      turns: of the times.
    """

    seeds: Sequence[int]
    rates: Sequence[float]
    ops: Sequence[str] = OPS
    steps: int = STEPS
    turns: int = 15


@dataclasses.dataclass(frozen=True)
class Reached:
    """What a side reached.

    Attributes:
      parameters: of the network.
      products: multiply-adds of one image.
      rate: the chosen one.
      validation: mean accuracy over the seeds, by rate.
      scores: accuracy on test rows at the chosen rate, by seed.
    """

    parameters: int
    products: int
    rate: float
    validation: Mapping[float, float]
    scores: Sequence[float]

    @property
    def mean(self) -> float:
        """Of the scores."""
        return float(np.mean(self.scores))

    @property
    def text(self) -> str:
        """Mean and range of the scores."""
        if len(self.scores) == 1:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ({min(self.scores):.3f} to {max(self.scores):.3f})"


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    if quick:
        sizes = Sizes(
            [seed], (3e-3, 1e-2), ("conv", "depthwise", "max", "identity"), QUICK_STEPS, 5
        )
    else:
        sizes = Sizes([seed, seed + 1, seed + 2], (1e-3, 3e-3, 1e-2))
    data = tuning.splits(tuple(as_images(part) for part in digits()))
    found = {
        op: reached(functools.partial(ResNet, dataclasses.replace(NETWORK, op=op)), data, sizes)
        for op in sizes.ops
    }
    found |= {name: reached(make, data, sizes) for name, make in transformers().items()}
    return Result(
        slug="pflayer",
        title=STUDIES["pflayer"].title,
        settings={
            "data": DIGITS,
            "bottlenecks": "4 of 32 -> 16 -> 32 channels after a 3 x 3 stem",
            "transformer": "4 blocks of width 32 on 4 x 4 patches",
            "training": f"{sizes.steps} steps of AdamW, {BATCH} rows each",
            "rates tried": list(sizes.rates),
            "chosen": {name: side.rate for name, side in found.items()},
            "validation": {
                name: {f"{rate:g}": value for rate, value in side.validation.items()}
                for name, side in found.items()
            },
            "seeds": list(sizes.seeds),
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[*counted_claims(), time_claim(sizes.turns), *learned_claims(found, sizes)],
        table=[
            {
                "side": name,
                "parameters": side.parameters,
                "multiply-adds": side.products,
                "rate": side.rate,
                "accuracy": side.mean,
                "lowest": min(side.scores),
                "highest": max(side.scores),
            }
            for name, side in found.items()
        ],
        pictures={"accuracy": lambda figure: bars(figure, found)},
    ).write(out)


def transformers() -> dict[str, Callable[..., ViT]]:
    """The transformer as it is, and with every other attention replaced."""

    def mixed(*, key: jax.Array) -> ViT:
        return transform.apply(pflayer(), ViT(TRANSFORMER, key=key))[0]

    return {ATTENTION: functools.partial(ViT, TRANSFORMER), MIXED: mixed}


def reached(make: Callable[..., Any], data: tuning.Splits, sizes: Sizes) -> Reached:
    """Trains all seeds at all rates side by side; the rate is chosen on validation rows.

    Args:
      make: key -> the network.
      data: images with classes.
      sizes: seeds and rates.
    """
    count = len(sizes.seeds)
    networks = [make(key=jax.random.key(seed)) for seed in sizes.seeds] * len(sizes.rates)
    joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
    rates = np.repeat(sizes.rates, count)

    def one(rate: float) -> Rule:
        schedule = lambda step: rate * jnp.minimum(1.0, (step + 1) / 20)  # noqa: E731
        return backprop(measuring(labelled), optax.adamw(schedule))

    rule = members(one, len(rates), vary={"rate": rates.tolist()})
    rows = Labelled(np.asarray(data.train.x), np.asarray(data.train.y))
    state = learned(rule, joined, rows, batch=BATCH, steps=sizes.steps, seed=sizes.seeds[0])
    validation = accuracies(rule, state, data.validation).reshape(-1, count)
    best = int(validation.mean(1).argmax())
    test = accuracies(rule, state, data.test).reshape(-1, count)[best]
    network, image = networks[0], jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    return Reached(
        account.parameters(network),
        multiply_adds(lambda model, x: model(x), network, image),
        float(sizes.rates[best]),
        dict(zip(map(float, sizes.rates), validation.mean(1).tolist(), strict=True)),
        test.tolist(),
    )


def accuracies(rule: Rule, state: PyTree, rows: Labelled) -> np.ndarray:
    """Of every member."""
    scores = np.asarray(rule.predict(state, jnp.asarray(rows.x)))
    return (scores.argmax(-1) == rows.y).mean(1)


def counted_claims() -> list[Claim]:
    """Parameters and products of the paper's networks, of the official code's counts."""
    image, counts, products = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32), {}, {}
    for op in PAPER:
        make = functools.partial(ResNet, resnet50(op))
        model = jax.eval_shape(lambda key, make=make: make(key=key), jax.random.key(0))
        counts[op] = account.parameters(model)
        products[op] = multiply_adds(lambda model, x: model(x), model, image) / 1e9
    transformers = {width: of_transformer(width) for width in TRANSFORMERS}
    shares = [products[op] / products["conv"] for op in ("max", "hybrid")]
    listed = ", ".join(f"{op} {n:,}" for op, n in counts.items())
    listed += "; " + ", ".join(f"ViT {width} {n:,}" for width, n in transformers.items())
    wanted = {op: n for op, (n, _) in PAPER.items()}
    return [
        Claim(
            "networks of the paper's sizes have its parameters",
            "ResNet-50 25.6 M, max 14.2 M, hybrid 17.3 M; ViT-S-max 23.8 M",
            listed,
            counts == wanted and transformers == TRANSFORMERS,
            "equal to the integers that the official code gives, without allocating",
            seeds=0,
        ),
        Claim(
            "a maximum for 3 x 3 convolutions nearly halves the products of ResNet-50",
            "4.1, 2.2 (max) and 2.6 (hybrid) GFLOPs at 224 x 224: 0.54 and 0.63",
            f"{', '.join(f'{n:.2f} G' for n in products.values())}: {shares[0]:.2f}, "
            f"{shares[1]:.2f}",
            shares[0] <= 0.60 and shares[1] <= 0.68,
            "multiply-adds counted in the traced program; max at most .60, hybrid at most .68",
            seeds=0,
        ),
    ]


def of_transformer(width: int) -> int:
    """Parameters of the paper's transformer of a width."""
    config = ViTConfig((224, 224), 16, width, 4 * width, 12, width // 64, classes=1000, pool="mean")
    changed = jax.eval_shape(lambda model: transform.apply(pflayer(), model)[0], abstract(config))
    return account.parameters(changed)


def time_claim(turns: int) -> Claim:
    """Whether the maximum saves time too."""
    found = bottleneck.compare(bottleneck.Settings(turns=turns))
    return Claim(
        "a bottleneck with a maximum takes less time than one with a convolution",
        "ResNet-50 8.7 ms, max 6.8 ms on a GPU: 0.78",
        f"{found.ratios['forward']:.2f} of its time forward, {found.ratios['gradient']:.2f} with "
        "the gradient",
        found.ratios["forward"] <= 1.0,
        f"forward at most as long; median of turns, {found.about}",
        seeds=0,
        timed=True,
    )


def learned_claims(found: Mapping[str, Reached], sizes: Sizes) -> list[Claim]:
    """What the steps learn at one budget."""
    seeds = len(sizes.seeds)
    how = (
        f"{DIGITS}; {sizes.steps} steps; each side the best of {len(sizes.rates)} rates by mean "
        f"validation accuracy over {seeds} seed{'s' * (seeds > 1)} of networks; test accuracy"
    )
    gap = worst(found["conv"], found["max"])
    lead = -worst(found["identity"], found["max"])
    ahead = found["max"].mean - found["depthwise"].mean
    loss = worst(found[ATTENTION], found[MIXED])

    def says(*names: str) -> str:
        return ", ".join(f"{name} {found[name].text}" for name in names)

    return [
        Claim(
            "bottlenecks with a maximum learn nearly what convolutions learn",
            "ImageNet 74.3 % for 76.2 %",
            says("conv", "max", *(["average"] if "average" in found else [])),
            gap <= 0.06,
            f"max at most .06 below conv with each seed (most: {gap:.3f}); {how}",
            seeds=seeds,
        ),
        Claim(
            "it is the maximum that sees neighbours: without any step far less is learned",
            "-",
            says("max", "identity"),
            lead >= 0.15,
            f"max at least .15 above identity with each seed (least: {lead:.3f}); {how}",
            seeds=seeds,
        ),
        Claim(
            "a maximum is at least as good as a depthwise convolution at this budget",
            "-",
            says("max", "depthwise"),
            ahead >= 0,
            f"mean of max at least that of depthwise ({ahead:+.3f}); {how}",
            seeds=seeds,
        ),
        Claim(
            "a transformer keeps its accuracy where every other attention becomes a maximum",
            "-",
            f"{says(ATTENTION, MIXED)}; {found[ATTENTION].parameters:,} and "
            f"{found[MIXED].parameters:,} parameters",
            loss <= tuning.CLOSE,
            f"at most {tuning.CLOSE} below with each seed (most: {loss:.3f}); {how}",
            seeds=seeds,
        ),
    ]


def worst(above: Reached, below: Reached) -> float:
    """The most that one side lies above another with a seed, less a bit of rounding."""
    pairs = zip(above.scores, below.scores, strict=True)
    return max(a - b for a, b in pairs) - tuning.SLACK


def bars(figure, found: Mapping[str, Reached]) -> None:
    """Accuracy by network and step."""
    axes = figure.subplots()
    values = {("bottlenecks", name): side.scores for name, side in found.items() if name in OPS}
    values |= {("transformer", n): found[n].scores for n in (ATTENTION, MIXED)}
    grouped_bars(axes, values)
    axes.set_ylim(0.4, 1.1)
    axes.set_ylabel("test accuracy")
    axes.set_title("8 x 8 digits, each at its best rate by validation")
