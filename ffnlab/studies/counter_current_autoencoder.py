"""Counter-current learning without labels: autoencoders of digits, beside what they must beat.

Small enough codes make it a task: through 8 numbers random hidden layers and a trained last map
lose more than half of an image. Errors are those of test images, divided by the error of the mean
image. Every way tries as many settings on a fifth of the training images: of rates alone where a
way has nothing else to choose, else of rates and contrasts.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ffnlab.data import digits
from ffnlab.layers import MLP
from ffnlab.learning import MapLoss, backprop, counter_current
from ffnlab.learning.counter_current.rule import mirrored
from ffnlab.models.convnet import ConvAutoencoder
from ffnlab.rule import Rule
from ffnlab.studies import tuning
from ffnlab.studies.classify import at_rate, grouped_bars, paced
from ffnlab.studies.result import Claim
from ffnlab.studies.tuning import Found, Setting, Side, Splits

__all__ = ["CASES", "WAYS", "bars", "claims", "measured", "settings"]

BATCH, CONTRASTS = 64, (0.1, 1.0)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
MATCHED_RATES = (1e-3, 3e-3, 1e-2)  # of ways that choose a contrast too: as many settings in all
WAYS = ("backprop", "counter-current", "feedback frozen", "hidden frozen")


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and how it is trained.

    Attributes:
      name: in the results.
      make: key -> the network.
      mirror: (network, key) -> the one that runs against it.
      shape: of an input.
      last: part of the path of the last map's parameters.
      steps: of training.
    """

    name: str
    make: Callable[[Array], PyTree]
    mirror: Callable[[PyTree, Array], PyTree]
    shape: tuple[int, ...]
    last: str
    steps: int


CASES = (
    Case(
        "rows, 64 to 8",
        lambda key: MLP((64, 128, 8, 128, 64), key=key, activation="elu"),
        mirrored,
        (64,),
        ".maps[3]",
        2000,
    ),
    Case(
        "images, 64 to 64",
        lambda key: ConvAutoencoder((1, 64, 16), key=key),
        ConvAutoencoder.mirror,
        (8, 8, 1),
        ".up[1]",
        500,
    ),
)


def reconstruction(
    model: Callable, batch: Float[Array, "n *d"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The mean squared error of an autoencoder's output; there are no other metrics."""
    return jnp.mean(jnp.square(model(batch) - batch)), {}


def rules(case: Case, steps: int) -> dict[str, Callable[[Setting], Rule]]:
    """What is compared, by name: Adam at a rate that falls to 0, everywhere."""
    adam, rest = optax.adam(optax.cosine_decay_schedule(1.0, steps)), optax.set_to_zero()

    def is_last(model: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: case.last in jax.tree_util.keystr(path), model
        )

    def against(up: optax.GradientTransformation, *down: optax.GradientTransformation):
        # The last map's loss has no contrast, so a way that trains nothing else is given none.
        made = functools.cache(
            lambda contrast: counter_current(
                MapLoss(contrast=contrast), paced(up), *down, mirror=case.mirror
            )
        )
        return lambda s: at_rate(made(s.get("contrast", 0.0)), s["rate"])

    through = backprop(reconstruction, paced(adam))
    last = optax.multi_transform({True: adam, False: rest}, is_last)
    made = (
        lambda s: at_rate(through, s["rate"]),
        against(adam),
        against(adam, rest),
        against(last, rest),
    )
    return dict(zip(WAYS, made, strict=True))


def grids(quick: bool) -> dict[str, list[dict[str, float]]]:
    """The settings of each way, as many for all."""
    alone, both = tuning.grid(rate=RATES), tuning.grid(contrast=CONTRASTS, rate=MATCHED_RATES)
    if quick:
        alone, both = alone[1:3], both[4:]
    return dict(zip(WAYS, (alone, both, both, alone), strict=True))


def sides(case: Case, quick: bool) -> list[Side]:
    """What is compared of a case."""
    steps = max(1, case.steps // 10) if quick else case.steps
    made, tried = rules(case, steps), grids(quick)
    start = lambda seed: case.make(jax.random.key(seed))  # noqa: E731
    return [Side(way, tried[way], made[way], start, BATCH, steps) for way in WAYS]


def images(case: Case) -> Splits:
    """The digits without their classes, in a case's shape."""
    rows, test = (split.x.reshape(-1, *case.shape) for split in digits())
    return tuning.splits((rows, test))


def measured(seeds: Sequence[int], quick: bool) -> Found:
    """Errors by case and way, the mean image's being 1; the quick form takes the first case."""
    found = {}
    for case in CASES[:1] if quick else CASES:
        data = images(case)
        mean = data.train.mean(0)

        def error(rule: Rule, state: PyTree, rows: np.ndarray, mean: np.ndarray = mean) -> float:
            output = np.asarray(rule.predict(state, jnp.asarray(rows)))
            return float(np.mean((output - rows) ** 2) / np.mean((rows - mean) ** 2))

        sides_of = sides(case, quick)
        found[case.name] = tuning.compare(sides_of, data, seeds, score=error, lower=True)
    return found


def settings(found: Found, quick: bool) -> dict[str, object]:
    """What the study writes about them."""
    return {
        "optimizer": "Adam, its rate falling to 0 as a cosine",
        "batch": BATCH,
        "steps": {c.name: sides(c, quick)[0].steps for c in CASES if c.name in found},
        "validation": tuning.trials(found),
    }


def claims(found: Found) -> list[Claim]:
    """Whether it works without labels, and what the feedback's learning adds.

    Args:
      found: see `measured`.
    """
    through, ours, frozen, random = WAYS
    return [
        tuning.tuned_claim(
            "an autoencoder's hidden layers learn without labels",
            "works unsupervised (STL-10; no figures)",
            "test error, the mean image's being 1: at most .95 of that with random hidden layers, "
            "for each network with each seed",
            largest_ratio(found, ours, random) <= 0.95,
            found,
            ours,
            random,
            through,
        ),
        tuning.tuned_claim(
            "an autoencoder: feedback that learns errs at most 1.05 times as much as frozen one",
            "the feedback network learns too",
            "ratio of test errors, for each network with each seed",
            largest_ratio(found, ours, frozen) <= 1.05,
            found,
            ours,
            frozen,
        ),
    ]


def largest_ratio(found: Found, ours: str, theirs: str) -> float:
    """The most that a way's error is of another's, over networks and seeds."""
    pairs = zip(tuning.scores(found, ours), tuning.scores(found, theirs), strict=True)
    return max(a / b for a, b in pairs)


def bars(figure, found: Found) -> None:
    """Test error by network and way."""
    axes = figure.subplots()
    grouped_bars(axes, tuning.values(found))
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("test error, the mean image's being 1")
    axes.set_title("Autoencoders of digits: lower is better")
