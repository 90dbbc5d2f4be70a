"""What the study of ScaleLong measures: linear networks, drawn and trained U-ViTs, and samples."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from ffnlab import models, transform
from ffnlab.errors import NumericalError
from ffnlab.layers import scale_skips
from ffnlab.learning import backprop
from ffnlab.losses import Moment, denoising
from ffnlab.models import UViT, UViTConfig
from ffnlab.models.account import parameters
from ffnlab.models.noise import TIMES, noised
from ffnlab.models.sample_diffusion import multistep
from ffnlab.rule import Rule
from ffnlab.structure import scalelong
from ffnlab.structure.scalelong import Response, block_gradients, noise_response, rms, seen
from ffnlab.studies.classify import at_rate, learned, paced
from ffnlab.studies.tuning import Splits, Tuned

__all__ = [
    "BATCH",
    "COUNTS",
    "FULL",
    "HIDDEN",
    "KAPPA",
    "QUICK",
    "WAYS",
    "WIDTH",
    "Run",
    "Sizes",
    "Start",
    "compared",
    "distances",
    "frechet",
    "gains",
    "longer",
    "network",
    "starts",
    "steps_to",
]

WAYS = ("original", "root", "constant", "learned", "apart")  # of `scalelong`
KAPPA = 0.7  # of "constant"
COUNTS = (4, 8, 16, 32, 64)  # skips of linear networks
WIDTH, HIDDEN, HEADS, BATCH = 32, 128, 4, 32
WARMUP, DECAY = 30, 0.03  # steps; of weights, as the authors have it
FEW, RATE = 4, 1e-2  # blocks, beside the one in the middle, and rate, of what is trained longer
ROWS = 256  # of held-out images that errors are of

Images = Float[Array | np.ndarray, "n h w c"]


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      seeds: how many, of networks and of all that is drawn.
      depths: of networks that are looked at as they are drawn.
      depth: of those that are trained.
      ways: which of `WAYS`.
      rates: of AdamW, that every way tries; none where nothing is compared.
      steps: of training.
      every: steps between looks at a network that is trained.
      samples: images drawn of each.
      solver: steps of the solver that draws them.
      longer: steps of one more network, of few blocks, whose images are shown.
    """

    seeds: int
    depths: tuple[int, ...]
    depth: int
    ways: tuple[str, ...]
    rates: tuple[float, ...]
    steps: int
    every: int
    samples: int
    solver: int
    longer: int


FULL = Sizes(3, (12, 64), 12, WAYS, (5e-3, 1.5e-2, 5e-2), 300, 20, 180, 40, 2000)
QUICK = Sizes(1, (64,), 0, ("original", "constant"), (), 0, 0, 60, 20, 300)


def gains(count: int) -> dict[str, float]:
    """dy/dx of y = x + sum_j kappa_j s_j with all `count` skips s_j = x, by constant scaling."""

    def slope(way: str) -> Float[Array, ""]:
        scaling = scale_skips(way, kappa=KAPPA)
        return jax.grad(lambda x: x + sum(scaling([x] * count)))(1.0)

    return {way: float(slope(way)) for way in WAYS[:3]}


def network(way: str, depth: int, seed: int) -> UViT:
    """A U-ViT for digits, stacked; those of one seed differ in nothing but their scaling."""
    change = scalelong(method=way, kappa=KAPPA, seed=seed)
    return transform.apply(change, unscaled(depth, seed))[0]


@functools.cache
def unscaled(depth: int, seed: int) -> UViT:
    """A U-ViT whose skips are given as they are."""
    config = UViTConfig((8, 8), 2, WIDTH, HIDDEN, depth, HEADS, channels=1)
    return models.stack(UViT(config, key=jax.random.key(seed)))


class Start(NamedTuple):
    """Networks as they are drawn.

    Attributes:
      response: to noise in the images, leaves [n].
      gradients: norms by block, [n, layers].
    """

    response: Response
    gradients: Float[np.ndarray, "n layers"]


def starts(
    ways: Sequence[str], depth: int, seeds: Sequence[int], images: Images
) -> dict[str, Start]:
    """Drawn networks, shown noised images."""

    @jax.jit
    def one(model: UViT, key: Key[Array, ""]) -> Start:
        moment = Moment(jnp.int32(0), key)
        return Start(respond(model, images, key), block_gradients(model, images, moment))

    return {
        way: jax.tree.map(
            lambda *leaves: np.stack(leaves),
            *(one(network(way, depth, seed), jax.random.key(seed)) for seed in seeds),
        )
        for way in ways
    }


def respond(model: UViT, images: Images, key: Key[Array, ""]) -> Response:
    """What a little noise in noised images changes."""
    x, t, _ = noised(jnp.asarray(images), key)
    return noise_response(model, x, TIMES * t, jax.random.fold_in(key, 1))


class Run(NamedTuple):
    """What one way reached.

    Attributes:
      tuned: the rate chosen by validation images, and errors of the noise in test images.
      curves: likewise with one draw, while it was trained [n, k].
      streams: size of the stream behind the last block, meanwhile [n, k].
      response: of the trained networks, leaves [n].
      samples: drawn images in 0..1, [n, samples, 8, 8, 1].
    """

    tuned: Tuned
    curves: Float[np.ndarray, "n k"]
    streams: Float[np.ndarray, "n k"]
    response: Response
    samples: Float[np.ndarray, "n m h w c"]


class Trained(NamedTuple):
    """One network after training.

    Attributes:
      model: the network, the mean of its weights at looks in the second half; the authors take a
        moving average.
      curve, stream: rows of those of `Run`.
    """

    model: UViT
    curve: Float[np.ndarray, "k"]
    stream: Float[np.ndarray, "k"]


def compared(sizes: Sizes, data: Splits, seed: int) -> dict[str, Run]:
    """Every way, tuned alike: the rate by the first seed, then the other seeds with that.

    Args:
      sizes: how much.
      data: images [n, 8, 8, 1].
      seed: the first one.
    """
    few = data._replace(validation=data.validation[:ROWS], test=data.test[:ROWS])
    return {way: run_of(way, sizes, few, range(seed, seed + sizes.seeds)) for way in sizes.ways}


def run_of(way: str, sizes: Sizes, data: Splits, seeds: Sequence[int]) -> Run:
    """One way of scaling."""
    train = functools.partial(trained, way, sizes, data)
    tried = [train(rate, seeds[0]) for rate in sizes.rates]
    scores = [math.inf if one is None else error(one.model, data.validation, 2) for one in tried]
    best = int(np.argmin(scores))
    rate = sizes.rates[best]
    kept = [one for one in (tried[best], *(train(rate, s) for s in seeds[1:])) if one is not None]
    if len(kept) < len(seeds):
        raise NumericalError(f"{way} diverged at a rate of {rate:g}, chosen with seed {seeds[0]}")
    keys = [jax.random.key(seed) for seed in seeds]
    measure = jax.jit(respond)
    responses = [measure(one.model, data.test, key) for one, key in zip(kept, keys, strict=True)]
    return Run(
        tuned=Tuned(
            setting={"rate": rate},
            tried=[({"rate": r}, score) for r, score in zip(sizes.rates, scores, strict=True)],
            parameters=parameters(kept[0].model),
            mirror=0,
            seeds=tuple(seeds),
            scores=[error(one.model, data.test, 4) for one in kept],
        ),
        curves=np.stack([one.curve for one in kept]),
        streams=np.stack([one.stream for one in kept]),
        response=jax.tree.map(lambda *each: np.stack(each), *responses),
        samples=np.stack([drawn(one.model, sizes, k) for one, k in zip(kept, keys, strict=True)]),
    )


def longer(sizes: Sizes, data: Splits, seed: int) -> Images:
    """What a network of five blocks with constant factors draws after more steps.

    Raises:
      NumericalError: it diverged.
    """
    sizes = sizes._replace(depth=FEW, steps=sizes.longer, every=sizes.longer // 10)
    found = trained(WAYS[2], sizes, data._replace(test=data.test[:ROWS]), RATE, seed)
    if found is None:
        raise NumericalError(f"{sizes.steps} steps at a rate of {RATE:g} diverged")
    return drawn(found.model, sizes, jax.random.key(seed))


@functools.cache
def rule_of() -> Rule:
    """AdamW at a rate of 1 after some steps of warm-up; one, so that a step is compiled once."""
    schedule = optax.linear_schedule(1 / WARMUP, 1.0, WARMUP)
    return backprop(denoising, paced(optax.adamw(schedule, weight_decay=DECAY)), informed=True)


def trained(way: str, sizes: Sizes, data: Splits, rate: float, seed: int) -> Trained | None:
    """A network after training; None where it diverged."""
    rule = rule_of()
    found: list[tuple[float, float]] = []
    networks: list[UViT] = []

    def evaluate(state: PyTree) -> dict[str, float]:
        networks.append(jax.tree.map(jnp.copy, rule.model(state)))  # the next step donates it
        found.append(tuple(map(float, look(networks[-1], data.test, jax.random.key(0)))))
        return {}

    start, options = network(way, sizes.depth, seed), {"batch": BATCH, "steps": sizes.steps}
    options |= {"seed": seed, "evaluate": evaluate, "every": sizes.every}
    try:
        learned(at_rate(rule, rate), start, data.train, **options)
    except NumericalError:
        return None
    late = networks[len(networks) // 2 :]
    return Trained(jax.tree.map(lambda *each: sum(each) / len(each), *late), *np.array(found).T)


@jax.jit
def look(model: UViT, images: Images, key: Key[Array, ""]) -> tuple[Array, Array]:
    """(error of the noise in images, size of the stream behind the last block)."""
    streams = []

    def output(x: Array, times: Array) -> Array:
        y, stream = seen(model, x, times)
        streams.append(rms(stream))
        return y

    error, _ = denoising(output, images, Moment(jnp.int32(0), key))
    return error, streams[0]


def error(model: UViT, images: Images, draws: int) -> float:
    """Mean error of a network over draws of times and noise, the same for all networks."""
    keys = jax.random.split(jax.random.key(1), draws)
    return float(np.mean([look(model, images, key)[0] for key in keys]))


def drawn(model: UViT, sizes: Sizes, key: Key[Array, ""]) -> Images:
    """Images that a trained network draws."""
    found = multistep(model, key, shape=(sizes.samples, 8, 8, 1), steps=sizes.solver)
    return np.clip(np.asarray(found), 0, 1)


def steps_to(curve: Float[np.ndarray, "k"], every: int, level: float) -> float:
    """Steps until a curve is at or below a level, straight between looks; infinite if it never is.

    >>> steps_to(np.array([0.5, 0.3, 0.4]), 20, 0.4), steps_to(np.array([0.5]), 20, 0.4)
    (30.0, inf)
    """
    below = np.flatnonzero(curve <= level)
    if not len(below):
        return float("inf")
    i = int(below[0])
    if i == 0:
        return float(every)
    return every * float(i + (curve[i - 1] - level) / (curve[i - 1] - curve[i]))


def frechet(a: Float[np.ndarray, "n h w c"], b: Float[np.ndarray, "m h w c"]) -> float:
    """Frechet distance of normal distributions with the moments of pixels, as the FID has it.

    |mean_a - mean_b|^2 + trace(A + B - 2 (A^(1/2) B A^(1/2))^(1/2))
    """
    first, second = (np.reshape(x, (len(x), -1)).astype(np.float64) for x in (a, b))
    of_a, of_b = (np.cov(x, rowvar=False) for x in (first, second))
    values, vectors = np.linalg.eigh(of_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    middle = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ of_b @ root), 0)).sum()
    off = np.square(first.mean(0) - second.mean(0)).sum()
    return float(off + np.trace(of_a) + np.trace(of_b) - 2 * middle)


def distances(found: Mapping[str, Run], data: Splits, seed: int) -> dict[str, list[float]]:
    """How far drawn images are from test digits, by way and seed.

    Also of as many training "digits", and of "pixels" of the digits' moments that know nothing of
    each other.
    """
    count = next(iter(found.values())).samples.shape[1]
    draw = np.random.default_rng(seed)
    noise = draw.normal(data.train.mean(0), data.train.std(0), (count, *data.train.shape[1:]))
    far = {way: [frechet(x, data.test) for x in run.samples] for way, run in found.items()}
    return far | {
        "digits": [frechet(data.train[:count], data.test)],
        "pixels": [frechet(np.clip(noise, 0, 1), data.test)],
    }
