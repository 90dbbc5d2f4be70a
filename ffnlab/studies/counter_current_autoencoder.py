"""Counter-current learning without labels: autoencoders of digits, beside what they must beat.

Small enough codes make it a task: through 8 numbers random hidden layers and a trained last map
lose more than half of an image. Errors are those of test images, divided by the error of the mean
image. The split is always the same one: a fifth of its training images chose the contrasts, among
0, .1, .3, 1, 3 and 10 for rows and 0, .1, .3, 1 and 10 for images.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ffnlab.data import digits
from ffnlab.layers import MLP
from ffnlab.learning import MapLoss, backprop, counter_current
from ffnlab.learning.counter_current import mirrored
from ffnlab.models.convnet import ConvAutoencoder
from ffnlab.rule import Rule
from ffnlab.studies.classify import grouped_bars, learned
from ffnlab.studies.result import Claim

__all__ = ["CASES", "WAYS", "bars", "claim", "errors", "measured", "rows", "settings"]

BATCH, RATE = 64, 2e-3
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
      contrast: of `MapLoss`.
      steps: of training.
    """

    name: str
    make: Callable[[Array], PyTree]
    mirror: Callable[[PyTree, Array], PyTree]
    shape: tuple[int, ...]
    last: str
    contrast: float
    steps: int


CASES = (
    Case(
        "rows, 64 to 8",
        lambda key: MLP((64, 128, 8, 128, 64), key=key, activation="elu"),
        mirrored,
        (64,),
        ".maps[3]",
        1.0,
        2000,
    ),
    Case(
        "images, 64 to 64",
        lambda key: ConvAutoencoder((1, 64, 16), key=key),
        ConvAutoencoder.mirror,
        (8, 8, 1),
        ".up[1]",
        0.1,
        500,
    ),
)


def reconstruction(
    model: Callable, batch: Float[Array, "n *d"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The mean squared error of an autoencoder's output; there are no other metrics."""
    return jnp.mean(jnp.square(model(batch) - batch)), {}


def rules(case: Case) -> dict[str, Rule]:
    """What is compared, by name: Adam at a rate that falls to 0, everywhere."""
    adam = optax.adam(optax.cosine_decay_schedule(RATE, case.steps))
    rest = optax.set_to_zero()

    def is_last(model: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: case.last in jax.tree_util.keystr(path), model
        )

    last = optax.multi_transform({True: adam, False: rest}, is_last)
    against = lambda *optimizers: counter_current(  # noqa: E731
        MapLoss(contrast=case.contrast), *optimizers, mirror=case.mirror
    )
    made = (backprop(reconstruction, adam), against(adam), against(adam, rest), against(last, rest))
    return dict(zip(WAYS, made, strict=True))


def errors(case: Case, seed: int) -> dict[str, float]:
    """Each way's error on test images, the mean image's being 1."""
    train, test = (split.x.reshape(-1, *case.shape) for split in digits())
    unit = np.mean((test - train.mean(0)) ** 2)
    model = case.make(jax.random.key(seed))
    found = {}
    for name, rule in rules(case).items():
        state = learned(rule, model, train, batch=BATCH, steps=case.steps, seed=seed)
        output = np.asarray(rule.predict(state, jnp.asarray(test)))
        found[name] = float(np.mean((output - test) ** 2) / unit)
    return found


def measured(seeds: Sequence[int]) -> dict[tuple[str, str], list[float]]:
    """Errors of the seeds by (case, way)."""
    found = {}
    for case in CASES:
        each = [errors(case, seed) for seed in seeds]
        found |= {(case.name, way): [lost[way] for lost in each] for way in WAYS}
    return found


def settings() -> dict[str, object]:
    """What the study writes about them."""
    return {
        "optimizer": f"Adam at {RATE}, falling to 0 as a cosine",
        "batch": BATCH,
        "steps": {case.name: case.steps for case in CASES},
        "contrast": {case.name: case.contrast for case in CASES},
    }


def rows(found: dict[tuple[str, str], list[float]]) -> list[dict[str, object]]:
    """Of the study's table."""
    return [
        {"data": f"autoencoder, {name}", "rule": way, "error": float(np.mean(values))}
        for (name, way), values in found.items()
    ]


def claim(found: dict[tuple[str, str], list[float]]) -> Claim:
    """Whether it works without labels.

    Args:
      found: see `measured`.
    """
    mean = {key: float(np.mean(values)) for key, values in found.items()}
    names = list(dict.fromkeys(name for name, _ in found))

    def say(name: str) -> str:
        return f"{name}: " + ", ".join(f"{way} {mean[name, way]:.3f}" for way in WAYS)

    return Claim(
        "an autoencoder learns without labels",
        "works unsupervised (STL-10; no figures)",
        "; ".join(map(say, names)),
        all(mean[n, "counter-current"] <= 0.95 * mean[n, "hidden frozen"] for n in names),
        "test error, the mean image's being 1: at most .95 of that with random hidden layers",
    )


def bars(figure, found: dict[tuple[str, str], list[float]]) -> None:
    """Test error by network and way; `found` as of `claim`."""
    axes = figure.subplots()
    grouped_bars(axes, found)
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("test error, the mean image's being 1")
    axes.set_title("Autoencoders of digits: lower is better")
